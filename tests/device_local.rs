//! Ranks that are threads work on tensors where they are: on a GPU, or on what Vulkan offers in its place.
//!
//! Without any such device the tests are reported as ignored.

mod transport_suite;

use std::panic::catch_unwind;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, DeviceKind, Tensor, TensorData};
use burn_parallel::layout;
use burn_parallel::prelude::*;
use libtest_mimic::{Arguments, Trial};
use transport_suite::device::{CHECKS, same, values};

fn main() {
    // burn panics where there is no device.
    let found = catch_unwind(|| Tensor::<1>::ones([1], &device()).into_data()).is_ok();
    let trial = |name: &str, test: fn()| {
        let test = move || {
            test();
            Ok(())
        };
        Trial::test(name, test).with_ignored_flag(!found)
    };
    let mut trials = vec![
        trial("a_tensor_on_the_host_does_not_meet_one_on_a_device", a_tensor_on_the_host_does_not_meet_one_on_a_device),
        trial("what_is_cut_in_another_way_is_another_call", what_is_cut_in_another_way_is_another_call),
        trial("calls_that_do_not_belong_together", calls_that_do_not_belong_together),
        trial("widths_that_padded_blocks_do_not_tell_apart", widths_that_padded_blocks_do_not_tell_apart),
        trial("messages_that_are_not_what_was_asked_for", messages_that_are_not_what_was_asked_for),
        trial("a_vector_can_be_received_from_a_device", a_vector_can_be_received_from_a_device),
        trial("ranks_with_devices_of_their_own", ranks_with_devices_of_their_own),
    ];
    for (name, check) in CHECKS {
        let test = move || {
            for size in [1, 2, 3, 4] {
                launch::threads(size).run(|rank| check(&rank, &device(), &DTYPES)).unwrap();
            }
            Ok(())
        };
        trials.push(Trial::test(name, test).with_ignored_flag(!found));
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// What WGSL has.
const DTYPES: [DType; 3] = [DType::F32, DType::I32, DType::U32];

fn device() -> Device {
    Device::wgpu(DeviceKind::DefaultDevice)
}

fn a_tensor_on_the_host_does_not_meet_one_on_a_device() {
    let device = device();
    let error = launch::threads(2)
        .run(|rank| {
            let device = if rank.rank() == 0 { Device::flex() } else { device.clone() };
            rank.all_reduce(Tensor::<1>::ones([4], &device), ReduceOp::Sum)
        })
        .unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    assert!(error.to_string().contains("on its device"), "{error}");
}

fn what_is_cut_in_another_way_is_another_call() {
    let device = device();
    let error = launch::threads(2)
        .run(|rank| {
            let ones = |len| Tensor::<1>::ones([len], &device);
            let cut = if rank.rank() == 0 { 3 } else { 4 };
            rank.all_reduce_coalesced(vec![ones(cut), ones(10 - cut)], ReduceOp::Sum).map(drop)
        })
        .unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
}

/// One rank calls `odd`, the others `usual`, on worlds of 2 to 4: every rank returns the same mismatch, soon.
fn mismatch(usual: Script, odd: Script, words: &[&str]) {
    for size in [2, 3, 4] {
        for culprit in [0, size - 1] {
            let began = Instant::now();
            let outcomes = launch::threads(size).timeout(Duration::from_secs(60)).run(|rank| {
                let call = if rank.rank() == culprit { odd } else { usual };
                Ok(call(&rank, &device()))
            });
            let outcomes = outcomes.unwrap();
            let first = outcomes[0].as_ref().expect_err("the calls do not belong together");
            assert!(matches!(first, Error::Mismatch { .. }), "{first}");
            assert!(outcomes.iter().all(|outcome| outcome.as_ref() == Err(first)), "{outcomes:?}");
            for word in words {
                assert!(first.to_string().contains(word), "`{word}` is missing in: {first}");
            }
            assert!(began.elapsed() < Duration::from_secs(20), "somebody waited for {:?}", began.elapsed());
        }
    }
}

type Script = fn(&Communicator, &Device) -> Result<(), Error>;

fn calls_that_do_not_belong_together() {
    let sum: Script = |comm, device| comm.all_reduce(ones([4, 6], device), ReduceOp::Sum).map(drop);
    mismatch(sum, |comm, device| comm.all_reduce(ones([4, 6], device), ReduceOp::Max).map(drop), &["(Sum)", "(Max)"]);
    mismatch(sum, |comm, device| comm.all_reduce(ones([6, 4], device), ReduceOp::Sum).map(drop), &["[4, 6]", "[6, 4]"]);
    mismatch(sum, |comm, device| comm.all_gather(ones([4, 6], device)).map(drop), &["called all_gather"]);
    mismatch(sum, |comm, _| comm.barrier(), &["called barrier"]);
    mismatch(
        sum,
        |comm, device| comm.all_reduce(ones([4, 6], device).int(), ReduceOp::Sum).map(drop),
        &["of F32 [4, 6] on its device", "of I32 [4, 6] on its device"],
    );
    let root: Script = |comm, device| comm.broadcast(ones([4, 6], device), 0).map(drop);
    mismatch(root, |comm, device| comm.broadcast(ones([4, 6], device), 1).map(drop), &["(root 0)", "(root 1)"]);
    let gathered: Script = |comm, device| comm.all_gather(ones([4, 6], device)).map(drop);
    mismatch(gathered, |comm, device| comm.all_gather(ones([4, 7], device)).map(drop), &["[4, 6]", "[4, 7]"]);
    let exchanged: Script = |comm, device| comm.all_to_all(ones([4, 6], device)).map(drop);
    mismatch(exchanged, |comm, device| comm.all_to_all(ones([4, 5], device)).map(drop), &["[4, 6]", "[4, 5]"]);
    let together: Script = |comm, device| {
        comm.all_reduce_coalesced(vec![ones([4, 3], device), ones([2, 6], device)], ReduceOp::Sum).map(drop)
    };
    mismatch(sum, together, &["[4, 6] on its device", "on its device in 2 pieces"]);
}

/// The all-to-all of a layout fills its blocks up to one length, so their dims are alike where the widths are not.
fn widths_that_padded_blocks_do_not_tell_apart() {
    let wide: Script = |comm, device| layout::all_to_all(ones([2, 2 * comm.size()], device), 0, 1, comm).map(drop);
    let narrow: Script =
        |comm, device| layout::all_to_all(ones([2, 2 * comm.size() - 1], device), 0, 1, comm).map(drop);
    mismatch(wide, narrow, &["all_to_all of F32", "on its device (cut from"]);
}

fn ones(dims: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::ones(dims, device)
}

fn messages_that_are_not_what_was_asked_for() {
    let device = device();
    let error = launch::threads(2)
        .run(|rank| {
            if rank.rank() == 1 {
                rank.send(Tensor::<2>::ones([3, 5], &device), 0, 4)?;
                return rank.barrier();
            }
            rank.recv::<Tensor<3>>(1, 4).map(drop)
        })
        .unwrap_err();
    assert!(matches!(error, Error::UnexpectedMessage { from: 1, to: 0, tag: 4, .. }), "{error}");
    assert!(error.to_string().contains("F32 [3, 5]"), "{error}");
}

fn a_vector_can_be_received_from_a_device() {
    let device = device();
    launch::threads(2)
        .run(|rank| {
            let other = 1 - rank.rank();
            rank.send(Tensor::<2>::ones([2, 2], &device).mul_scalar(rank.rank() as f32), other, 0)?;
            assert_eq!(rank.recv::<Vec<f32>>(other, 0)?, [other as f32; 4]);
            // The other way round: what was in host memory is put on the device that is asked for.
            rank.send(vec![rank.rank() as f32; 3], other, 1)?;
            let there: Tensor<1> = rank.recv_on(&device, other, 1)?;
            assert_eq!((there.device(), there.into_data()), (device.clone(), TensorData::from([other as f32; 3])));
            Ok(())
        })
        .unwrap();
}

/// Ranks whose tensors are on different devices, as far as burn knows: the same software device under two names.
fn ranks_with_devices_of_their_own() {
    let cpu = Device::wgpu(DeviceKind::Cpu);
    if catch_unwind(|| Tensor::<1>::ones([1], &cpu).into_data()).is_err() {
        println!("there is no second device: ranks_with_devices_of_their_own was skipped");
        return;
    }
    for size in [2, 3] {
        launch::threads(size)
            .run(|rank| {
                let device = if rank.rank() == 1 { cpu.clone() } else { device() };
                for len in [5, 40_000] {
                    let data = TensorData::new(values(rank.rank(), len), [len]);
                    let there = || Tensor::<1>::from_data(data.clone(), &device);
                    let host = || Tensor::<1>::from_data(data.clone(), &Device::flex());
                    let same = |ours: Tensor<1>, expected: Tensor<1>| same(ours, expected, &device);
                    same(rank.all_reduce(there(), ReduceOp::Sum)?, rank.all_reduce(host(), ReduceOp::Sum)?);
                    same(rank.all_gather(there())?, rank.all_gather(host())?);
                    same(rank.broadcast(there(), 1)?, rank.broadcast(host(), 1)?);
                    let next = (rank.rank() + 1) % size;
                    let previous = (rank.rank() + size - 1) % size;
                    rank.send(there(), next, 0)?;
                    rank.send(host(), next, 1)?;
                    same(rank.recv_on(&device, previous, 0)?, rank.recv(previous, 1)?);
                }
                Ok(())
            })
            .unwrap();
    }
}
