//! Errors out of places that can return none: a module's own forward, burn's mappers.

use std::any::Any;
use std::cell::RefCell;

use super::Error;
use crate::comm::panic_message;

thread_local! {
    /// What the last panic of [`throw`] on this thread was about.
    static THROWN: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// Panics with what the error says. Where the library runs the rank, [`caught`] makes the error of it again.
#[track_caller]
pub(crate) fn throw(error: Error) -> ! {
    let said = error.to_string();
    THROWN.set(Some(error));
    panic!("{said}")
}

/// Whether these are the words of the last panic of [`throw`] on this thread.
pub(crate) fn is_thrown(said: &str) -> bool {
    THROWN.with_borrow(|error| error.as_ref().is_some_and(|error| error.to_string() == said))
}

/// The error of a panic, if [`throw`] made it on this thread.
pub(crate) fn caught(panic: &(dyn Any + Send)) -> Option<Error> {
    THROWN.take().filter(|error| error.to_string() == panic_message(panic))
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn an_error_is_caught_once_and_by_its_own_panic() {
        let error = Error::user("there is no other way out");
        let panic = catch_unwind(|| throw(error.clone())).unwrap_err();
        assert_eq!(panic_message(&*panic), error.to_string());
        assert_eq!(caught(&*panic), Some(error.clone()));
        assert_eq!(caught(&*panic), None);
        let _ = catch_unwind(|| throw(error));
        let other = catch_unwind(|| panic!("something else")).unwrap_err();
        assert_eq!(caught(&*other), None);
    }
}
