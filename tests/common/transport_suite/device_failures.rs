//! Whatever one rank does wrong with tensors of devices, every rank returns, soon, and with the same error.

use std::thread::sleep;
use std::time::Duration;

use burn::tensor::{Device, Tensor};
use burn_parallel::comm::{Communicator, ReduceOp};
use burn_parallel::{Error, layout};

use super::failures::{drop_of, failure, mismatch};
use super::{LONG, WorldFactory};
use crate::common::failing::{SHORT, says, until_it_fails};

/// A check that two ranks or more run, each on its own device.
type Check = fn(&dyn WorldFactory, &Device);

/// All of them.
pub const FAILURES: [(&str, Check); 5] = [
    ("calls that do not match", mismatches),
    ("widths that padded blocks do not tell apart", widths),
    ("a rank that leaves while others wait for its tensor", leaving),
    ("a rank that comes too late", too_late),
    ("an abort while messages are on their way", abort),
];

fn ones(dims: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::ones(dims, device)
}

fn mismatches(factory: &dyn WorldFactory, device: &Device) {
    type Script = fn(&Communicator, &Device) -> Result<(), Error>;
    let differ = |usual: Script, odd: Script, words: &[&str]| {
        mismatch(factory, words, &|comm| usual(&comm, device), &|comm| odd(&comm, device));
    };
    let sum: Script = |comm, device| drop_of(comm.all_reduce(ones([4, 6], device), ReduceOp::Sum));
    let largest: Script = |comm, device| drop_of(comm.all_reduce(ones([4, 6], device), ReduceOp::Max));
    differ(sum, largest, &["(Sum)", "(Max)"]);
    let turned: Script = |comm, device| drop_of(comm.all_reduce(ones([6, 4], device), ReduceOp::Sum));
    differ(sum, turned, &["[4, 6] on its device", "[6, 4] on its device"]);
    let integers: Script = |comm, device| drop_of(comm.all_reduce(ones([4, 6], device).int(), ReduceOp::Sum));
    differ(sum, integers, &["of F32 [4, 6] on its device", "of I32 [4, 6] on its device"]);
    let host: Script = |comm, _| drop_of(comm.all_reduce(ones([4, 6], &Device::flex()), ReduceOp::Sum));
    differ(sum, host, &["[4, 6] on its device"]);
    differ(sum, |comm, _| comm.barrier(), &["called barrier"]);
    let gather: Script = |comm, device| drop_of(comm.all_gather(ones([4, 6], device)));
    differ(sum, gather, &["called all_gather of F32 [4, 6]"]);
    let wider: Script = |comm, device| drop_of(comm.all_gather(ones([4, 7], device)));
    differ(gather, wider, &["[4, 6]", "[4, 7]"]);
    let exchange: Script = |comm, device| drop_of(comm.all_to_all(ones([4, 6], device)));
    let narrower: Script = |comm, device| drop_of(comm.all_to_all(ones([4, 5], device)));
    differ(exchange, narrower, &["[4, 6]", "[4, 5]"]);
    let root: Script = |comm, device| drop_of(comm.broadcast(ones([4, 6], device), 0));
    let other_root: Script = |comm, device| drop_of(comm.broadcast(ones([4, 6], device), 1));
    differ(root, other_root, &["(root 0)", "(root 1)"]);
    let cut = |comm: &Communicator, device: &Device, rows: usize| {
        let pieces = vec![ones([rows, 2], device), ones([10 - rows, 2], device)];
        drop_of(comm.all_reduce_coalesced(pieces, ReduceOp::Sum))
    };
    mismatch(factory, &["in 2 buffers"], &|comm| cut(&comm, device, 3), &|comm| cut(&comm, device, 4));
    let whole = |comm: Communicator| drop_of(comm.all_reduce(Tensor::<1>::ones([20], device), ReduceOp::Sum));
    mismatch(factory, &["[20] on its device in 2 buffers"], &whole, &|comm| cut(&comm, device, 4));
}

/// The all-to-all of a layout fills its blocks up to one length, so their dims are alike where the widths are not.
fn widths(factory: &dyn WorldFactory, device: &Device) {
    let exchange = |comm: &Communicator, less: usize| {
        drop_of(layout::all_to_all(ones([2, 2 * comm.size() - less], device), 0, 1, comm))
    };
    let words = ["all_to_all of F32", "on its device (agreed number"];
    mismatch(factory, &words, &|comm| exchange(&comm, 0), &|comm| exchange(&comm, 1));
}

/// Whoever waits for the device as well: nothing is left there that would keep it.
fn leaving(factory: &dyn WorldFactory, device: &Device) {
    let size = factory.world(LONG).size();
    for culprit in [0, size - 1] {
        let error = failure(factory, LONG, Some(culprit), &|comm| {
            let sum = comm.all_reduce(ones([300, 200], device), ReduceOp::Sum)?;
            if comm.rank() == culprit {
                sleep(Duration::from_millis(30));
                return Ok(());
            }
            let again = comm.all_reduce(sum, ReduceOp::Sum)?;
            assert!(again.into_data().iter::<f32>().all(|x| x == (size * size) as f32));
            comm.recv::<Tensor<2>>(culprit, 3).map(drop)
        });
        match &error {
            Error::User(text) => assert!(text.contains(&format!("rank {culprit} left group `world`")), "{text}"),
            error => assert!(matches!(error, Error::RankLost { rank, .. } if *rank == culprit), "{error:?}"),
        }
    }
}

fn too_late(factory: &dyn WorldFactory, device: &Device) {
    let size = factory.world(LONG).size();
    for culprit in [0, size - 1] {
        // Its first tensor is made before: kernels may have to be compiled.
        let warm = ones([5, 5], device).into_data();
        let error = failure(factory, SHORT, None, &|comm| {
            if comm.rank() == culprit {
                until_it_fails(&comm);
            }
            drop_of(comm.all_reduce(ones([5, 5], device), ReduceOp::Sum))
        });
        drop(warm);
        assert!(matches!(&error, Error::Timeout { rank, .. } if *rank != culprit), "{error:?}");
        says(&error, &["all_reduce(Sum) of F32 [5, 5] on its device", &format!("rank {culprit}")]);
    }
}

/// What was sent and never received, and what is expected and never sent, keep nobody.
fn abort(factory: &dyn WorldFactory, device: &Device) {
    let size = factory.world(LONG).size();
    for culprit in [0, size - 1] {
        let error = failure(factory, LONG, None, &|comm| {
            let (next, previous) = ((comm.rank() + 1) % size, (comm.rank() + size - 1) % size);
            comm.send(ones([70, 70], device), next, 1)?;
            let never = comm.start_recv::<Tensor<2>>(previous, 2);
            let begun = comm.start_recv::<Tensor<2>>(previous, 1);
            comm.barrier()?;
            if comm.rank() == culprit {
                comm.abort("the loss is NaN");
            }
            drop(begun);
            drop_of(never.wait())
        });
        assert!(matches!(&error, Error::Aborted { rank, .. } if *rank == culprit), "{error:?}");
        says(&error, &["the loss is NaN"]);
    }
}
