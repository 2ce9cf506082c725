//! Tests that take turns and share their process with no others: they count the bytes of all its threads, or seed the
//! generator that all its models draw from.

mod attention;
mod checkpoints;
mod compile;
mod directories;
mod gathered;
mod generated;
mod lazy;
mod memory;
mod recycled;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Until the guard is dropped, no other test runs.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
