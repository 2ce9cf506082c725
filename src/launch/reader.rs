//! Threads that read what other processes say.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often a thread is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// Whether a thread that reads from a pipe has ended by then. It ends when the last process has that holds the pipe:
/// that may be one that nobody knows of, which a process has left behind.
pub(crate) fn ended_by<T>(reader: &JoinHandle<T>, until: Instant) -> bool {
    while !reader.is_finished() {
        if Instant::now() >= until {
            return false;
        }
        thread::sleep(LOOK);
    }
    true
}
