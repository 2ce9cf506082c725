//! The primitives under the rounds. `tests/loom/board.rs` compiles `rounds.rs` against a module of this name made of loom's,
//! so that file names nothing else of the crate or of `std::sync`.

pub(super) use std::sync::atomic::{AtomicU64, Ordering};
