//! Calls and errors as bytes.
//!
//! All ranks of a world return the same error, so an error crosses from process to process as the variant that it is. What
//! is not an error of a world itself, but of the code that ran in it, crosses as [`Error::User`] with its text.

mod bytes;
mod call;
mod error;
#[cfg(test)]
mod tests;

pub(super) use self::bytes::{Reader, Writer};
pub(super) use self::error::with_log;
