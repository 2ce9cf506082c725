//! What is wrong with a save.

use crate::Error;

pub(super) fn wrong(problem: String) -> Error {
    Error::invalid("hf::save", problem)
}
