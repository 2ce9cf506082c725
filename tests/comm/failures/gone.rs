//! Ranks that go: by a panic, an error, or without a word.

use std::thread;
use std::time::Duration;

use burn_parallel::Error;
use burn_parallel::comm::WorldConfig;
use burn_parallel::comm::{Communicator, ReduceOp, local};

use super::harness::{LONG, PURPOSE, SIZES, failure, failure_of_threads, says, tells_the_log, within};

#[test]
fn a_rank_that_panics() {
    for size in SIZES {
        let culprit = size - 1;
        let error = failure(size, LONG, Some(culprit), move |rank| {
            assert!(rank.rank() != culprit, "{PURPOSE} on rank {culprit}");
            rank.all_reduce(vec![1.0f32; 10], ReduceOp::Sum).map(drop)
        });
        assert!(matches!(&error, Error::RankPanicked { rank, .. } if *rank == culprit), "{error:?}");
        says(&error, &[&format!("rank {culprit} panicked: {PURPOSE} on rank {culprit}")]);
        tells_the_log(&error, size);
    }
}

#[test]
fn a_rank_that_returns_an_error() {
    for size in SIZES {
        let error = failure(size, LONG, Some(0), |rank| match rank.rank() {
            0 => Err(Error::user("the disk is full")),
            _ => rank.broadcast(vec![0u8; 100], 0).map(drop),
        });
        let cause = Box::new(Error::User("the disk is full".into()));
        assert!(matches!(&error, Error::RankFailed { rank: 0, cause: c, .. } if *c == cause), "{error:?}");
        says(&error, &["rank 0 failed: the disk is full"]);
        tells_the_log(&error, size);
    }
}

#[test]
fn a_rank_that_returns_early() {
    for size in SIZES {
        let error = failure(size, LONG, Some(1), |rank| match rank.rank() {
            1 => Ok(()),
            _ => rank.reduce_scatter(vec![1.0f64; 9], ReduceOp::Mean).map(drop),
        });
        assert!(matches!(&error, Error::RankLost { rank: 1, .. }), "{error:?}");
        says(&error, &["rank 1 left group `world`", "reduce_scatter(Mean) of F64 [9]"]);
        tells_the_log(&error, size);
    }
}

#[test]
fn a_rank_that_drops_its_communicator() {
    for size in SIZES {
        let culprit = size - 1;
        let error = failure_of_threads(size, LONG, culprit, move |comm| match comm.rank() == culprit {
            true => {
                thread::sleep(Duration::from_millis(30));
                Ok(())
            }
            false => comm.all_reduce(vec![1i32; 4], ReduceOp::Sum).map(drop),
        });
        assert!(matches!(&error, Error::RankLost { rank, .. } if *rank == culprit), "{error:?}");
        says(&error, &[&format!("rank {culprit} left group `world`"), "all_reduce(Sum) of I32 [4]", "keep"]);
        tells_the_log(&error, size);
    }
}

#[test]
fn a_thread_that_panics_with_its_communicator() {
    for size in SIZES {
        let error = failure_of_threads(size, LONG, 0, move |comm| {
            assert!(comm.rank() != 0, "{PURPOSE}");
            comm.all_to_all(vec![1i32; 4]).map(drop)
        });
        assert!(matches!(&error, Error::RankPanicked { rank: 0, .. }), "{error:?}");
        tells_the_log(&error, size);
    }
}

#[test]
fn an_abort() {
    for size in SIZES {
        let error = failure(size, LONG, Some(0), |rank| match rank.rank() {
            0 => {
                rank.abort("the loss is NaN");
                rank.barrier()
            }
            1 => rank.recv::<Vec<f32>>(0, 0).map(drop),
            _ => rank.all_reduce(vec![0.0f32], ReduceOp::Sum).map(drop),
        });
        assert!(matches!(&error, Error::Aborted { rank: 0, .. }), "{error:?}");
        says(&error, &["rank 0 of group `world`", "the loss is NaN"]);
        tells_the_log(&error, size);
    }
}

#[test]
fn many_ranks_that_find_one_gone_do_not_stand_in_each_others_way() {
    within(Duration::from_secs(30), || {
        for round in 0..30 {
            let mut world = local::world(6, WorldConfig::from_env().unwrap().with_timeout(LONG)).unwrap();
            let gone = world.pop();
            let errors: Vec<Error> = thread::scope(|scope| {
                let wait = |comm: Communicator| {
                    scope.spawn(move || match (comm.rank() + round) % 2 {
                        0 => comm.recv::<Vec<u8>>(5, 0).map(drop).unwrap_err(),
                        _ => comm.recv::<Vec<u8>>(5, 1).map(drop).unwrap_err(),
                    })
                };
                let threads: Vec<_> = world.into_iter().map(wait).collect();
                drop(gone);
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        }
    });
}
