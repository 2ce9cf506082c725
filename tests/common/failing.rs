//! What every rank of a failing world must say, whatever the transport.
#![allow(dead_code, reason = "each test binary uses the part that it needs")]

use std::sync::Once;
use std::thread;
use std::time::{Duration, Instant};

use burn_parallel::Error;
use burn_parallel::comm::{Communicator, ReduceOp};

/// A time-out that no test waits for.
pub const LONG: Duration = Duration::from_secs(60);
/// A time-out that some tests wait for, and that ranks beside much else do not need.
pub const SHORT: Duration = Duration::from_millis(1500);
/// What the panics say that tests make.
pub const PURPOSE: &str = "panics on purpose";

/// Panics that tests make say nothing.
pub fn hide_panics_on_purpose() {
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

/// How much longer than its limit a world with this time-out may take to fail: the tests that need one wait for it.
pub fn wait_of(timeout: Duration) -> Duration {
    if timeout == LONG { Duration::ZERO } else { timeout }
}

/// Waits as a rank does that comes too late, however long the others take to find out.
pub fn until_it_fails(comm: &Communicator) {
    let began = Instant::now();
    while comm.failure().is_none() {
        assert!(began.elapsed() < LONG, "nobody misses rank {} of {}", comm.rank(), comm.size());
        thread::sleep(Duration::from_millis(5));
    }
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
    // A machine with much else to do may be that slow, but not always.
    let at_once = |_| all_fails(comm, error) < Duration::from_secs(2);
    assert!((0..3).any(at_once), "a failed world must not make anybody wait");
}

/// How long it takes until everything has failed with `error`.
fn all_fails(comm: &Communicator, error: &Error) -> Duration {
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
    began.elapsed()
}

/// The message holds all these words.
#[track_caller]
pub fn says(error: &Error, words: &[&str]) {
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
}

/// [`says`] of what must have failed.
#[track_caller]
pub fn fails<T>(result: &Result<T, Error>, words: &[&str]) {
    says(result.as_ref().err().expect("it must fail"), words);
}

/// The message ends with the last collectives of every rank, of which the [`prelude`]'s first had this number.
#[track_caller]
pub fn tells_the_log(error: &Error, size: usize, first: u64) {
    let message = error.to_string();
    let calls = [format!("#{first} barrier"), format!("#{} all_reduce(Sum) of F32 [3]", first + 1)];
    for rank in 0..size {
        let line = message.lines().find(|line| line.starts_with(&format!("  rank {rank}: ")));
        let line = line.unwrap_or_else(|| panic!("no line of rank {rank} in: {message}"));
        assert!(calls.iter().all(|call| line.contains(call)), "{line}");
    }
}

/// The error of a world whose `culprit` called something else than the others in the collective of this number. It
/// shows both calls, and holds these words.
#[track_caller]
pub fn is_mismatch(error: &Error, size: usize, culprit: usize, number: u64, words: &[&str]) {
    let Error::Mismatch { sequence, calls, .. } = error else { panic!("{error:?}") };
    assert_eq!((*sequence, calls.len()), (number, size));
    let other = (culprit + 1) % size;
    assert_ne!(calls[culprit].to_string(), calls[other].to_string(), "the message shows the difference");
    says(error, &["`world`", &format!("#{sequence}"), &format!("rank {culprit} called {}", calls[culprit])]);
    says(error, &[&format!("rank {other} called {}", calls[other])]);
    says(error, words);
}
