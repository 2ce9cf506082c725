//! Errors that all ranks of a group return alike.

use crate::Error;
use crate::comm::{Communicator, ReduceOp, panic_message};
use crate::error::catch_quietly;

/// What a rank does by itself. That it panics, as burn does where a device fails, is an error like others, which
/// `wrong` makes of words: else this rank would not come to where the others wait.
pub(crate) fn attempt<T>(run: impl FnOnce() -> Result<T, Error>, wrong: fn(String) -> Error) -> Result<T, Error> {
    let panicked =
        |panic: Box<dyn std::any::Any + Send>| Err(wrong(format!("it panicked: {}", panic_message(&*panic))));
    catch_quietly(|_| true, run).unwrap_or_else(panicked)
}

/// What this rank has, if none of the group failed; else the error of the first that did, with its number, which
/// `wrong` makes of words.
///
/// # Errors
/// That one, on all ranks alike; those of the group.
pub(crate) fn together<T>(
    outcome: Result<T, Error>,
    group: &Communicator,
    words: fn(Error) -> String,
    wrong: fn(String) -> Error,
) -> Result<T, Error> {
    if group.size() == 1 {
        return outcome;
    }
    let own = if outcome.is_err() { group.rank() as u64 } else { u64::MAX };
    let first = group.all_reduce(vec![own], ReduceOp::Min)?[0];
    if first == u64::MAX {
        return outcome;
    }
    let rank = first as usize;
    let text = outcome.err().map(words).unwrap_or_default();
    let text = group.share_bytes(text.into_bytes(), rank)?;
    Err(wrong(format!("rank {rank}: {}", String::from_utf8_lossy(&text))))
}
