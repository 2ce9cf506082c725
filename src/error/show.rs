//! How an [`Error`] is made of words, and shown.

use std::fmt;

use super::Error;

/// The message, as by `Display`: this is what `main` prints of an error that it returns.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// Wraps an error of the user's own code, so that a rank can return it.
    pub fn user(error: impl std::fmt::Display) -> Self {
        Self::User(error.to_string())
    }

    pub(crate) fn invalid(operation: &'static str, problem: impl Into<String>) -> Self {
        Self::InvalidArgument { operation, problem: problem.into() }
    }
}

#[cfg(test)]
mod tests {
    use crate::Error;
    use crate::launch;

    /// As `fn main() -> Result<(), Error>` prints it.
    #[test]
    fn what_main_prints_is_the_message() {
        let error = launch::threads(2).run(|rank| match rank.rank() {
            0 => rank.barrier(),
            _ => Err(Error::user("the disk is full")),
        });
        let error = error.unwrap_err();
        let said = format!("{error:?}");
        assert_eq!(said, error.to_string());
        assert!(said.starts_with("rank 1 failed: the disk is full"), "{said}");
        assert_eq!(format!("{:?}", Err::<(), _>(error)), format!("Err({said})"));
    }
}
