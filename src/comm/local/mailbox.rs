//! Messages between the threads of a group: tensors change hands, their bytes stay where they are.
//!
//! There is one queue for each pair of ranks, under its own lock; a receiver sleeps on the bell of its group, which the
//! sender rings after it has put the message in (see [`Bell`](super::bell::Bell) for why no wake-up is lost). Messages of
//! one tag arrive in the order in which they were sent; tags are independent of each other.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::comm::Arrival;

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
        let mut messages = queue.messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        messages.push_back((tag, message));
        queue.len.store(messages.len(), Ordering::Release);
    }

    /// Takes the oldest message of `from` to `to` that bears `tag`.
    pub fn take(&self, from: usize, to: usize, tag: u64) -> Option<Arrival> {
        let queue = self.queue(from, to);
        if queue.len.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut messages = queue.messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let place = messages.iter().position(|(theirs, _)| *theirs == tag)?;
        let (_, message) = messages.remove(place)?;
        queue.len.store(messages.len(), Ordering::Release);
        Some(message)
    }

    /// The tags that wait unread.
    pub fn tags(&self, from: usize, to: usize) -> Vec<u64> {
        let messages = self.queue(from, to).messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        messages.iter().map(|(tag, _)| *tag).collect()
    }

    fn queue(&self, from: usize, to: usize) -> &Queue {
        &self.queues[from * self.size + to]
    }
}
