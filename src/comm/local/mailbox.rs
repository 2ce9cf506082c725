//! Messages between the threads of a group: the receiver gets the sent tensor itself, without a copy.
//!
//! There is one queue for each pair of ranks, under its own lock; a receiver sleeps on the eventcount of its group,
//! which the sender notifies after it has put the message in (see [`EventCount`](super::event_count::EventCount) for
//! why no wake-up is lost). Messages with one tag arrive in the order in which they were sent; tags are independent of
//! each other.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::comm::Arrival;
use crate::lock::lock;

#[derive(Debug, Default)]
struct Queue {
    /// Length of `messages`, readable without the lock by a receiver that spins.
    len: AtomicUsize,
    messages: Mutex<VecDeque<(u64, Arrival)>>,
}

#[derive(Debug)]
pub(super) struct Mailboxes {
    size: usize,
    queues: Box<[Queue]>,
}

impl Mailboxes {
    pub fn new(size: usize) -> Self {
        Self { size, queues: (0..size * size).map(|_| Queue::default()).collect() }
    }

    pub fn put(&self, from: usize, to: usize, tag: u64, message: Arrival) {
        let queue = self.queue(from, to);
        let mut messages = lock(&queue.messages);
        messages.push_back((tag, message));
        queue.len.store(messages.len(), Ordering::Release);
    }

    /// Takes the oldest message of `from` to `to` with this `tag`.
    pub fn take(&self, from: usize, to: usize, tag: u64) -> Option<Arrival> {
        let queue = self.queue(from, to);
        if queue.len.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut messages = lock(&queue.messages);
        let place = messages.iter().position(|(theirs, _)| *theirs == tag)?;
        let (_, message) = messages.remove(place)?;
        queue.len.store(messages.len(), Ordering::Release);
        Some(message)
    }

    /// The tags of the messages that have not been received.
    pub fn tags(&self, from: usize, to: usize) -> Vec<u64> {
        let messages = lock(&self.queue(from, to).messages);
        messages.iter().map(|(tag, _)| *tag).collect()
    }

    fn queue(&self, from: usize, to: usize) -> &Queue {
        &self.queues[from * self.size + to]
    }
}
