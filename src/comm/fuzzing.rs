//! Entry points of the fuzzers (see `fuzz/`): each takes any bytes, and panics if an invariant breaks.

pub use super::message_passing::fuzzing::codec;
pub use super::tcp::fuzzing::{frames, handshake};
