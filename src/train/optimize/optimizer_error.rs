//! The error of an optimizer that does not suit the parameters.

use crate::Error;

pub(super) fn optimizer_error(problem: String) -> Error {
    Error::Optimizer { problem }
}
