//! Encodes calls and errors as bytes, and decodes what peers send.
//!
//! All ranks of a world return the same error, so an error is sent as the variant that it is. An error of the user's
//! code is sent as [`Error::User`] with its text.

mod bytes;
mod call;
mod error;
#[cfg(test)]
mod tests;

pub(super) use self::bytes::{Reader, Writer};
pub(super) use self::error::with_log;
