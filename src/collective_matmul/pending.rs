//! The result of a product whose collective may still be running.

use std::fmt;

use crate::Error;

/// A product reduced over the ranks: ready, or still running in the background.
pub(crate) enum PendingProduct<T> {
    Ready(T),
    /// Waits for the collective and gives the result.
    Running(Box<dyn FnOnce() -> Result<T, Error> + Send>),
}

impl<T: 'static> PendingProduct<T> {
    /// # Errors
    /// Those of the collectives.
    pub fn wait(self) -> Result<T, Error> {
        match self {
            Self::Ready(sum) => Ok(sum),
            Self::Running(arrive) => arrive(),
        }
    }

    pub fn map<U>(self, view: impl FnOnce(T) -> U + Send + 'static) -> PendingProduct<U> {
        match self {
            Self::Ready(sum) => PendingProduct::Ready(view(sum)),
            Self::Running(arrive) => PendingProduct::Running(Box::new(move || arrive().map(view))),
        }
    }
}

impl<T> fmt::Debug for PendingProduct<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready(_) => "Ready",
            Self::Running(_) => "Running",
        })
    }
}
