//! What callers give at the edge of what makes sense: time-outs, sizes, dims.

use std::thread;
use std::time::Duration;

use burn::prelude::*;
use burn_parallel::comm::tcp::{Rendezvous, Session};
use burn_parallel::comm::{WorldConfig, local};
use burn_parallel::prelude::*;

use crate::common::failing::fails;
use crate::common::ports::free_port;

/// Runs ranks over threads, and over TCP.
fn on_both(ranks: usize, timeout: Duration, f: impl Fn(&Communicator) -> Result<(), Error> + Sync) {
    launch::threads(ranks).timeout(timeout).run(|rank| f(&rank)).unwrap();
    over_tcp(ranks, timeout, f).into_iter().for_each(|result| result.unwrap());
}

fn over_tcp(
    ranks: usize,
    timeout: Duration,
    f: impl Fn(&Communicator) -> Result<(), Error> + Sync,
) -> Vec<Result<(), Error>> {
    let port = free_port();
    let run = |rank| {
        let session = Session::new();
        let meeting = Rendezvous::new(rank, ranks, "127.0.0.1", port, b"s", timeout);
        let world = session.world(&meeting, WorldConfig::from_env()?.with_timeout(timeout))?;
        f(&world)
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn the_longest_time_out() {
    for ranks in [1, 2, 3] {
        on_both(ranks, Duration::MAX, |comm| {
            assert_eq!(comm.all_reduce(vec![1.0f32; 5], ReduceOp::Sum)?, [ranks as f32; 5]);
            let pending = comm.start(|comm| comm.all_gather(vec![comm.rank() as u8]));
            assert_eq!(pending.wait()?.len(), ranks);
            comm.split(0, 0)?.barrier()?;
            comm.send(vec![7u8], (comm.rank() + 1) % ranks, 1)?;
            assert_eq!(comm.recv::<Vec<u8>>((comm.rank() + ranks - 1) % ranks, 1)?, [7]);
            Ok(())
        });
    }
    assert!(WorldConfig::from_env().unwrap().with_timeout(Duration::MAX).timeout() > Duration::from_secs(1 << 31));
}

#[test]
fn no_time_out_at_all_is_refused() {
    let words = ["0 s is no time-out", "with_timeout", "BURN_PARALLEL_TIMEOUT_S"];
    fails(&launch::threads(2).timeout(Duration::ZERO).run(|_| Ok(())), &words);
    fails(&local::world(1, WorldConfig::from_env().unwrap().with_timeout(Duration::ZERO)), &words);
    over_tcp(2, Duration::ZERO, |_| Ok(())).into_iter().for_each(|result| fails(&result, &words));
}

#[test]
fn more_ranks_than_a_process_has() {
    for size in [usize::MAX, 1 << 40, (1 << 16) + 1] {
        fails(&launch::threads(size).run(|_| Ok(())), &[&format!("a world of {size} ranks"), "65536 are the most"]);
    }
    fails(&launch::threads(0).run(|_| Ok(())), &["at least 1 rank"]);
}

/// A tensor of nine dims with these last two.
fn nine(rows: usize, last: [usize; 2], first: f32) -> Tensor<9> {
    let dims = [rows, 1, 2, 1, 1, 1, 1, last[0], last[1]];
    let elements = rows * 2 * last[0] * last[1];
    Tensor::<1, Int>::arange(0..elements as i64, &Device::flex()).float().add_scalar(first).reshape(dims)
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

#[test]
fn tensors_of_nine_dims() {
    for ranks in [1, 2, 3] {
        on_both(ranks, Duration::from_secs(60), |comm| {
            let (me, n) = (comm.rank(), ranks);
            let mine = |rows| nine(rows, [2, 3], 1000.0 * me as f32);
            let of = |rank: usize, rows| floats(nine(rows, [2, 3], 1000.0 * rank as f32));
            let all: Vec<f32> = (0..n).flat_map(|rank| of(rank, 2)).collect();
            let gathered = comm.all_gather(mine(2))?;
            assert_eq!(gathered.dims(), [2 * n, 1, 2, 1, 1, 1, 1, 2, 3]);
            assert_eq!(floats(gathered), all);
            let sum = comm.all_reduce(mine(2), ReduceOp::Sum)?;
            assert_eq!(sum.dims(), [2, 1, 2, 1, 1, 1, 1, 2, 3]);
            let part = comm.reduce_scatter(mine(2 * n), ReduceOp::Max)?;
            assert_eq!(part.dims(), [2, 1, 2, 1, 1, 1, 1, 2, 3]);
            assert_eq!(floats(part), of(n - 1, 2 * n)[24 * me..][..24]);
            let dealt = comm.all_to_all(mine(2 * n))?;
            assert_eq!(dealt.dims(), [2 * n, 1, 2, 1, 1, 1, 1, 2, 3]);
            assert_eq!(
                floats(dealt),
                (0..n).flat_map(|rank| of(rank, 2 * n)[24 * me..][..24].to_vec()).collect::<Vec<_>>()
            );
            assert_eq!(floats(comm.broadcast(mine(2), n - 1)?), of(n - 1, 2));
            let at_root = comm.gather(mine(2), 0)?;
            assert_eq!(at_root.map(floats), (me == 0).then_some(all));
            comm.send(mine(2), (me + 1) % n, 3)?;
            let received: Tensor<9> = comm.recv((me + n - 1) % n, 3)?;
            assert_eq!(floats(received), of((me + n - 1) % n, 2));
            Ok(())
        });
    }
}

/// Dims that a shape folds are compared all the same.
#[test]
fn nine_dims_that_differ() {
    let differ = |comm: &Communicator| {
        let last = if comm.rank() == 1 { [3, 2] } else { [2, 3] };
        assert!(matches!(comm.all_gather(nine(2, last, 0.0)), Err(Error::Mismatch { .. })));
        Ok(())
    };
    launch::threads(2).run(|rank| differ(&rank)).unwrap();
    over_tcp(2, Duration::from_secs(60), differ).into_iter().for_each(|result| result.unwrap());
    let scattered = launch::threads(2).run(|rank| {
        let payload = (rank.rank() == 0).then(|| nine(2, [2, 3], 0.0));
        Ok(rank.scatter(payload, 0).map(|_| ()))
    });
    for result in scattered.unwrap() {
        fails(&result, &["scatter: a tensor of rank 9", "8 dims are the most", "reshape"]);
    }
}
