//! Failures while operations are under way in the background.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use burn_parallel::comm::{Communicator, ReduceOp};
use burn_parallel::{Error, launch};

use super::harness::{LIMIT, LONG, PURPOSE, SHORT, SIZES, failure, says, tells_the_log, within};

#[test]
fn a_failure_while_operations_are_in_flight() {
    for size in SIZES {
        let culprit = size - 1;
        let error = failure(size, LONG, Some(culprit), move |rank| {
            let part = rank.split(0, 0)?;
            let start = |comm: &Communicator| comm.start(|comm| comm.all_reduce(vec![1.0f32; 9], ReduceOp::Sum));
            if rank.rank() == culprit {
                let _taken_along = start(&part);
                panic!("{PURPOSE}");
            }
            let pending: Vec<_> = [&part, rank.world(), &part, rank.world()].into_iter().map(start).collect();
            let mut results: Vec<_> = pending.into_iter().map(|pending| pending.wait()).collect();
            // The first on `part` may have succeeded: the culprit started it too.
            let _ = results.remove(0);
            let error = results[0].clone().unwrap_err();
            assert!(results.iter().all(|result| result.as_ref() == Err(&error)));
            Err(error)
        });
        assert!(matches!(&error, Error::RankPanicked { rank, .. } if *rank == culprit), "{error:?}");
        tells_the_log(&error, size);
    }
}

#[test]
fn a_panic_in_the_background() {
    for size in SIZES {
        let error = failure(size, LONG, None, |rank| {
            // World rank 1 is rank 0 of its part.
            let part = rank.split(u64::from(rank.rank() > 0), 0)?;
            let pending = (rank.rank() == 1).then(|| part.start::<()>(|_| panic!("{PURPOSE}")));
            // Nobody has waited for it, and everybody hears of it.
            rank.recv::<Vec<f32>>((rank.rank() + 1) % rank.size(), 0).map(drop).inspect_err(|error| {
                if let Some(pending) = pending {
                    assert_eq!(pending.wait(), Err(error.clone()));
                }
            })
        });
        assert!(matches!(&error, Error::RankPanicked { rank: 1, .. }), "{error:?}");
        says(&error, &["rank 1 panicked", PURPOSE]);
    }
}

#[test]
fn an_operation_may_start_another() {
    within(LIMIT, || {
        let got = launch::threads(2).timeout(LONG).run(|rank| {
            rank.start(|comm| {
                let first = comm.start(|comm| comm.all_reduce(vec![1i32], ReduceOp::Sum));
                let second = comm.all_reduce(vec![2i32], ReduceOp::Sum)?;
                Ok((first.wait()?, second))
            })
            .wait()
        });
        assert_eq!(got, Ok(vec![(vec![2], vec![4]); 2]));
    });
}

/// What was started and not waited for is finished before its rank leaves, in every group.
#[test]
fn a_rank_that_returns_with_operations_under_way() {
    let sums = within(LIMIT, || {
        launch::threads(3).timeout(LONG).run(|rank| {
            let group = rank.split_named("late", 0, rank.rank() as i64)?;
            let slow = Duration::from_millis(100 * rank.rank() as u64);
            let pending = group.start(move |comm| {
                thread::sleep(slow);
                comm.all_reduce(vec![1.0f32], ReduceOp::Sum)
            });
            if rank.rank() == 2 {
                drop(pending);
                return Ok(vec![]);
            }
            pending.wait()
        })
    });
    assert_eq!(sums.unwrap(), [vec![3.0], vec![3.0], vec![]]);
}

/// Two background threads of one rank that wait for each other are found out.
#[test]
fn operations_that_wait_for_each_other() {
    let error = failure(2, SHORT, Some(0), |rank| {
        let groups = [rank.split_named("left", 0, 0)?, rank.split_named("right", 0, 0)?];
        if rank.rank() == 1 {
            return rank.barrier();
        }
        let [left, right] = groups;
        let (gives, takes) = mpsc::channel();
        let first = left.start(move |_| takes.recv().map_err(Error::user));
        let second = right.start(move |_| first.wait());
        let outcome = second.wait();
        drop(gives);
        outcome
    });
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}
