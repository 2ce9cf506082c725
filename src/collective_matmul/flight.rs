//! What was started and is to be waited for.

use std::fmt;

use crate::Error;

/// A sum over the ranks that is there, or on its way.
pub(crate) enum Flight<T> {
    There(T),
    /// Gives the sum when it has arrived.
    Flying(Box<dyn FnOnce() -> Result<T, Error> + Send>),
}

impl<T: 'static> Flight<T> {
    /// # Errors
    /// Those of the collectives.
    pub fn wait(self) -> Result<T, Error> {
        match self {
            Self::There(sum) => Ok(sum),
            Self::Flying(arrive) => arrive(),
        }
    }

    pub fn map<U>(self, view: impl FnOnce(T) -> U + Send + 'static) -> Flight<U> {
        match self {
            Self::There(sum) => Flight::There(view(sum)),
            Self::Flying(arrive) => Flight::Flying(Box::new(move || arrive().map(view))),
        }
    }
}

impl<T> fmt::Debug for Flight<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::There(_) => "There",
            Self::Flying(_) => "Flying",
        })
    }
}
