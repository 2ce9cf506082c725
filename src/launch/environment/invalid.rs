//! The error of variables that do not say which rank this is.

use crate::Error;

pub(super) fn invalid<T>(problem: impl Into<String>) -> Result<T, Error> {
    Err(Error::invalid("launch::from_env", problem))
}
