//! Failures in a part of the world.

use std::thread;
use std::time::{Duration, Instant};

use burn_parallel::Error;
use burn_parallel::comm::{Communicator, ReduceOp};
use burn_parallel::launch::Rank;

use super::harness::{LONG, PURPOSE, SHORT, failure, says, tells_the_log, until_it_fails};

/// Splits the world into even and odd ranks, and lets rank 0 `fail` while all others wait: rank 2 in its own group,
/// rank 1 in the parent, rank 3 in the sibling group.
fn failure_in_a_part(size: usize, timeout: Duration, fail: fn(&Rank, &Communicator) -> Result<(), Error>) -> Error {
    failure(size, timeout, Some(0), move |rank| {
        let part = rank.split(rank.rank() as u64 % 2, 0)?;
        part.barrier()?;
        match rank.rank() {
            0 => fail(rank, &part),
            1 => rank.all_reduce(vec![1u64], ReduceOp::Sum).map(drop),
            2 => part.all_reduce(vec![1u64], ReduceOp::Sum).map(drop),
            _ => part.recv::<Vec<u64>>(0, 5).map(drop),
        }
    })
}

#[test]
fn a_failure_in_a_part_of_the_world_reaches_the_whole() {
    for size in [3, 4] {
        let error = failure_in_a_part(size, LONG, |_, _| panic!("{PURPOSE}"));
        assert!(matches!(&error, Error::RankPanicked { rank: 0, .. }), "{error:?}");
        let error = failure_in_a_part(size, LONG, |_, _| Err(Error::user("no")));
        assert!(matches!(&error, Error::RankFailed { rank: 0, .. }), "{error:?}");
        let error = failure_in_a_part(size, LONG, |_, part| part.barrier());
        assert!(matches!(&error, Error::Mismatch { sequence: 1, calls, .. } if calls.len() == 2), "{error:?}");
        says(&error, &["`world/0`", "rank 0 called barrier", "rank 1 called all_reduce(Sum) of U64 [1]"]);
        let error = failure_in_a_part(size, LONG, |_, part| {
            part.abort("enough");
            part.barrier()
        });
        says(&error, &["rank 0 of group `world/0` aborted the run: enough"]);
        let error = failure_in_a_part(size, SHORT, |rank, part| {
            until_it_fails(rank);
            part.barrier()
        });
        assert!(matches!(&error, Error::Timeout { .. }), "{error:?}");
    }
}

/// Waits until the three others of a world wait in groups of their own, as its log tells.
fn until_they_wait(rank: &Rank) {
    let (began, waiting) = (Instant::now(), || rank.log().to_string().matches("(waiting").count());
    while waiting() < 3 {
        assert!(began.elapsed() < LONG / 2, "{}", rank.log());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_log_tells_of_those_who_wait_in_other_groups() {
    let error = failure(4, LONG, Some(0), |rank| {
        let part = rank.split(rank.rank() as u64 % 2, 0)?;
        match rank.rank() {
            0 => {
                until_they_wait(rank);
                Err(Error::user("no"))
            }
            2 => part.all_reduce(vec![1u64; 77], ReduceOp::Sum).map(drop),
            _ => part.recv::<Vec<u64>>(1 - part.rank(), 99).map(drop),
        }
    });
    says(&error, &["in `world/0` rank 1: #0 all_reduce(Sum) of U64 [77] (waiting"]);
    says(
        &error,
        &["in `world/1` rank 0: #0 recv(from 1, tag 99) (waiting", "in `world/1` rank 1: #0 recv(from 0, tag"],
    );
    tells_the_log(&error, 4);
}

#[test]
fn a_rank_that_leaves_a_part_of_the_world() {
    for size in [3, 4] {
        let error = failure(size, LONG, Some(0), |rank| {
            let part = rank.split(rank.rank() as u64 % 2, 0)?;
            match rank.rank() {
                0 => {
                    drop(part);
                    rank.barrier()
                }
                2 => part.barrier(),
                _ => rank.barrier(),
            }
        });
        assert!(matches!(&error, Error::RankLost { rank: 0, .. }), "{error:?}");
        says(&error, &["rank 0 left group `world/0` while barrier"]);
    }
}

/// A rank drops what it holds before its launcher can say why it has ended.
#[test]
fn why_a_rank_leaves_a_part_is_told_however_long_it_takes() {
    for size in [3, 4] {
        let error = failure(size, LONG, Some(0), |rank| {
            let part = rank.split(rank.rank() as u64 % 2, 0)?;
            match rank.rank() {
                0 => {
                    drop(part);
                    thread::sleep(Duration::from_millis(300));
                    Err(Error::user("the disk is full"))
                }
                2 => part.barrier(),
                _ => rank.barrier(),
            }
        });
        assert!(matches!(&error, Error::RankFailed { rank: 0, .. }), "{error:?}");
        says(&error, &["rank 0 failed: the disk is full"]);
    }
}

/// One that goes on without a part of the world is missed there: with its next call, or after the time-out.
#[test]
fn a_rank_that_goes_on_without_a_part_is_missed_there() {
    type Call = fn(&Rank) -> Result<(), Error>;
    let goes_on: [Call; 4] = [
        |rank| rank.barrier(),
        |rank| rank.recv::<Vec<u8>>(1, 7).map(drop),
        |rank| {
            rank.send(vec![1u8], 1, 7)?;
            while rank.failure().is_none() {
                thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        },
        |rank| {
            while rank.failure().is_none() {
                thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        },
    ];
    for (number, goes_on) in goes_on.into_iter().enumerate() {
        let timeout = if number == 3 { SHORT } else { LONG };
        let error = failure(3, timeout, Some(0), move |rank| {
            let part = rank.split(0, 0)?;
            if rank.rank() == 0 {
                drop(part);
                return goes_on(rank);
            }
            part.barrier()
        });
        assert!(matches!(&error, Error::RankLost { rank: 0, .. }), "{number}: {error:?}");
        says(&error, &["rank 0 left group `world/0` while barrier"]);
    }
}
