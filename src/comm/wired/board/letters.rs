//! The counters of messages from one rank to another over a board.
//!
//! # Protocol
//!
//! From each rank to each other there are a few places for letters, used in turn, and two counters that only grow: of letters
//! *posted*, which the sender alone writes, and of letters *taken*, which the receiver alone does. Letter `n` lies in place
//! `n % PLACES`. The sender writes it when letter `n - PLACES` has been taken, and then counts it as posted; the receiver
//! reads it when it has been posted, and then counts it as taken. A sender that finds no free place does not wait: its message
//! goes over the wire.
//!
//! **Memory order.** A letter is written before it is posted (release) and read after that was seen (acquire); it is read
//! before it is taken (release), and the place written again after that was seen (acquire).
//!
//! On either side one thread at a time is at this: the group's locks see to it.

use super::rounds::Line;
use super::sync::Ordering;

/// Letters between two ranks that may lie about untaken.
pub(super) const PLACES: u64 = 2;

/// The counters from one rank to another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Letters<'a> {
    pub posted: &'a Line,
    pub taken: &'a Line,
}

impl Letters<'_> {
    /// The place for the sender's next letter, if it is free.
    pub fn free(self) -> Option<u64> {
        let next = self.posted.load(Ordering::Relaxed);
        let waiting = next.wrapping_sub(self.taken.load(Ordering::Acquire));
        (waiting < PLACES).then_some(next % PLACES)
    }

    /// What the sender has written there is a letter.
    pub fn post(self) {
        self.posted.store(self.posted.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }

    /// The place of the letter that the receiver is to read next, if it has come.
    pub fn next(self) -> Option<u64> {
        let next = self.taken.load(Ordering::Relaxed);
        (next != self.posted.load(Ordering::Acquire)).then_some(next % PLACES)
    }

    /// The receiver has read it.
    pub fn take(self) {
        self.taken.store(self.taken.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }
}
