//! The counters of a mailbox in shared memory: messages from one rank to another.
//!
//! # Protocol
//!
//! From each rank to each other there is a mailbox of a few entries, used in turn, and two counters that only grow: of
//! messages *posted*, which the sender alone writes, and of messages *taken*, which the receiver alone writes. Message
//! `n` is in entry `n % ENTRIES`. The sender writes it when message `n - ENTRIES` has been taken, and then counts it as
//! posted; the receiver reads it when it has been posted, and then counts it as taken. A sender that finds no free
//! entry does not wait: its message goes through the endpoint.
//!
//! **Memory order.** A message is written before it is posted (release) and read after that was seen (acquire); it is
//! read before it is taken (release), and the entry is written again after that was seen (acquire).
//!
//! On either side one thread at a time does this: the group's locks ensure it.

use super::rounds::Counter;
use super::sync::Ordering;

/// Messages from one rank to another that may wait to be taken.
pub(super) const ENTRIES: u64 = 2;

/// The counters of the mailbox from one rank to another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mailbox<'a> {
    pub posted: &'a Counter,
    pub taken: &'a Counter,
}

impl Mailbox<'_> {
    /// The entry for the sender's next message, if it is free.
    pub fn free(self) -> Option<u64> {
        let next = self.posted.load(Ordering::Relaxed);
        let waiting = next.wrapping_sub(self.taken.load(Ordering::Acquire));
        (waiting < ENTRIES).then_some(next % ENTRIES)
    }

    /// Counts the message that the sender has written as posted.
    pub fn post(self) {
        self.posted.store(self.posted.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }

    /// The entry of the message that the receiver is to read next, if it has been posted.
    pub fn next(self) -> Option<u64> {
        let next = self.taken.load(Ordering::Relaxed);
        (next != self.posted.load(Ordering::Acquire)).then_some(next % ENTRIES)
    }

    /// Counts the message that the receiver has read as taken.
    pub fn take(self) {
        self.taken.store(self.taken.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }
}
