//! The error of stages that do not fit each other or the batch.

use crate::Error;

pub(crate) fn stage_error(problem: impl Into<String>) -> Error {
    Error::Pipeline { problem: problem.into() }
}
