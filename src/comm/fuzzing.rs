//! What fuzzers call (see `fuzz/`): each takes any bytes, and panics if they break what is promised.

pub use super::tcp::fuzzing::{frames, handshake};
pub use super::wired::fuzzing::codec;
