//! The error of a schedule that is wrong, or does not fit the pipeline.

use crate::Error;

pub(crate) fn schedule_error(problem: impl Into<String>) -> Error {
    Error::Schedule { problem: problem.into() }
}
