//! Worlds that fail, and what all of their ranks must then say.

use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

use burn_parallel::comm::WorldConfig;
use burn_parallel::comm::{Communicator, ReduceOp, local};
use burn_parallel::launch::Rank;
use burn_parallel::{Error, launch};

pub use crate::common::failing::{
    LONG, PURPOSE, SHORT, hide_panics_on_purpose, is_mismatch, prelude, says, stays_failed, until_it_fails, wait_of,
};

/// How long after the failure, or after the time-out, the last rank may return: long before [`LONG`] is over.
pub const LIMIT: Duration = Duration::from_secs(20);

pub const SIZES: [usize; 3] = [2, 3, 4];

/// Runs `f` on a thread and fails the test if it does not return in time.
pub fn within<R: Send + 'static>(limit: Duration, f: impl FnOnce() -> R + Send + 'static) -> R {
    let (done, result) = mpsc::channel();
    let body = thread::spawn(move || done.send(f()));
    match result.recv_timeout(limit) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("the ranks were not back after {limit:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => std::panic::resume_unwind(body.join().unwrap_err()),
    }
}

/// Runs `f` on `size` ranks after the prelude and returns the error of the world, which every rank but the `culprit`
/// must return from `f`. The culprit may return what it likes, or panic.
pub fn failure(
    size: usize,
    timeout: Duration,
    culprit: Option<usize>,
    f: impl Fn(&Rank) -> Result<(), Error> + Send + Sync + 'static,
) -> Error {
    hide_panics_on_purpose();
    let limit = LIMIT + wait_of(timeout);
    let error = within(limit, move || {
        let said: Vec<Mutex<Option<Result<(), Error>>>> = (0..size).map(|_| Mutex::new(None)).collect();
        let run = launch::threads(size).threads_per_rank(1).timeout(timeout).run(|rank| {
            prelude(&rank)?;
            let result = f(&rank);
            *said[rank.rank()].lock().unwrap() = Some(result.clone());
            if let (true, Err(error)) = (culprit != Some(rank.rank()), &result) {
                stays_failed(&rank, error);
            }
            result
        });
        let error = run.expect_err("the world must fail");
        for (rank, said) in said.iter().enumerate().filter(|(rank, _)| culprit != Some(*rank)) {
            assert_eq!(said.lock().unwrap().as_ref(), Some(&Err(error.clone())), "what rank {rank} returned");
        }
        error
    });
    a_fresh_world_works(size);
    error
}

/// As [`failure`], on bare threads: `f` owns its communicator.
pub fn failure_of_threads(
    size: usize,
    timeout: Duration,
    culprit: usize,
    f: impl Fn(Communicator) -> Result<(), Error> + Send + Sync + 'static,
) -> Error {
    hide_panics_on_purpose();
    let limit = LIMIT + wait_of(timeout);
    let error = within(limit, move || {
        let world = local::world(size, WorldConfig::from_env().unwrap().with_timeout(timeout)).unwrap();
        let results: Vec<_> = thread::scope(|scope| {
            let start = |comm: Communicator| {
                scope.spawn(|| {
                    prelude(&comm)?;
                    f(comm)
                })
            };
            let threads: Vec<_> = world.into_iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        let others = results.into_iter().enumerate().filter(|(rank, _)| *rank != culprit);
        let mut errors = others.map(|(_, result)| result.unwrap().expect_err("every other rank must fail"));
        let first = errors.next().unwrap();
        errors.for_each(|error| assert_eq!(error, first));
        first
    });
    a_fresh_world_works(size);
    error
}

/// Nothing of a failed world is left behind.
pub fn a_fresh_world_works(size: usize) {
    let sums =
        launch::threads(size).threads_per_rank(1).run(|rank| rank.all_reduce(vec![1i32], ReduceOp::Sum)).unwrap();
    assert_eq!(sums, vec![vec![size as i32]; size]);
}

/// The message ends with the last collectives of every rank.
#[track_caller]
pub fn tells_the_log(error: &Error, size: usize) {
    crate::common::failing::tells_the_log(error, size, 0);
}
