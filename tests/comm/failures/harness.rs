//! Worlds that fail, and what all of their ranks must then say.

use std::sync::{Mutex, Once, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use burn_parallel::comm::WorldConfig;
use burn_parallel::comm::{Communicator, ReduceOp, local};
use burn_parallel::launch::Rank;
use burn_parallel::{Error, launch};

/// A time-out that no test waits for.
pub const LONG: Duration = Duration::from_secs(60);
/// A time-out that some tests wait for.
pub const SHORT: Duration = Duration::from_millis(400);
/// How long after the failure, or after the time-out, the last rank may return.
pub const LIMIT: Duration = Duration::from_secs(4);

pub const SIZES: [usize; 3] = [2, 3, 4];
pub const PURPOSE: &str = "panics on purpose";

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

/// Keeps the panics that the tests make from cluttering the output.
pub fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let said = info.payload().downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| info.payload().downcast_ref::<&str>().copied());
            if !said.is_some_and(|text| text.contains(PURPOSE)) {
                usual(info);
            }
        }));
    });
}

/// Two collectives that succeed, for the log to tell of.
pub fn prelude(comm: &Communicator) -> Result<(), Error> {
    comm.barrier()?;
    let size = comm.size() as f32;
    assert_eq!(comm.all_reduce(vec![1.0f32; 3], ReduceOp::Sum)?, [size; 3]);
    Ok(())
}

/// Everything fails at once with `error` on a communicator of a failed world.
pub fn stays_failed(comm: &Communicator, error: &Error) {
    let began = Instant::now();
    let other = (comm.rank() + 1) % comm.size();
    assert_eq!(comm.failure().as_ref(), Some(error));
    assert_eq!(comm.barrier().as_ref(), Err(error));
    assert_eq!(comm.all_reduce(vec![0i64], ReduceOp::Max).as_ref(), Err(error));
    assert_eq!(comm.all_gather(Vec::<u8>::new()).as_ref(), Err(error));
    assert_eq!(comm.send(vec![1.0f64], other, 0).as_ref(), Err(error));
    assert_eq!(comm.recv::<Vec<f64>>(other, 0).as_ref(), Err(error));
    assert_eq!(comm.start_recv::<Vec<f64>>(other, 0).wait().as_ref(), Err(error));
    assert_eq!(comm.start(|comm| comm.barrier()).wait().as_ref(), Err(error));
    assert_eq!(comm.split(0, 0).err().as_ref(), Some(error));
    comm.abort("too late to matter");
    assert_eq!(comm.failure().as_ref(), Some(error));
    assert!(began.elapsed() < Duration::from_secs(2), "a failed world must not make anybody wait");
}

/// Runs `f` on `size` ranks after the prelude and returns the error of the world, which every rank but the `culprit`
/// must return from `f`. The culprit may return what it likes, or panic.
pub fn failure(
    size: usize,
    timeout: Duration,
    culprit: Option<usize>,
    f: impl Fn(&Rank) -> Result<(), Error> + Send + Sync + 'static,
) -> Error {
    quiet();
    let limit = LIMIT + if timeout == LONG { Duration::ZERO } else { timeout };
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
    quiet();
    let limit = LIMIT + if timeout == LONG { Duration::ZERO } else { timeout };
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

/// The message holds all these words.
pub fn says(error: &Error, words: &[&str]) {
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
}

/// The message ends with the last collectives of every rank.
pub fn tells_the_log(error: &Error, size: usize) {
    let message = error.to_string();
    for rank in 0..size {
        let line = message.lines().find(|line| line.starts_with(&format!("  rank {rank}: ")));
        let line = line.unwrap_or_else(|| panic!("no line of rank {rank} in: {message}"));
        assert!(line.contains("#1 all_reduce(Sum) of F32 [3]") && line.contains("#0 barrier"), "{line}");
    }
}
