//! The atomics of the rounds. `tests/loom/shared_memory.rs` compiles `rounds.rs` and `mailbox.rs` against a module of
//! this name made of loom's, so those files name nothing else of the crate or of `std::sync`.

pub(super) use std::sync::atomic::{AtomicU64, Ordering};
