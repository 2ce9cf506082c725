//! What is wrong with a save.

use crate::Error;
use crate::comm::Communicator;
use crate::params;

pub(super) fn wrong(problem: String) -> Error {
    Error::invalid("hf::save", problem)
}

/// What a rank does by itself: that it panics is an error like others.
pub(super) fn attempt<T>(run: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    params::attempt(run, wrong)
}

/// What this rank has, if none of the group failed; else the error of the first that did, with its number.
///
/// # Errors
/// That one, on all ranks alike; those of the group.
pub(super) fn together<T>(outcome: Result<T, Error>, group: &Communicator) -> Result<T, Error> {
    params::together(outcome, group, |error| error.to_string(), wrong)
}
