//! Messages that a rank has sent to another, and whose data wait until the receiver asks for them.
//!
//! The protocol of messages over NCCL (`nccl/messages.rs`), but for moving the data: numbers, the answers of the
//! receiver, and what becomes of the messages when the sender drops its communicator before they were asked for. They
//! are kept until they are, or until the receiver says that it asks for nothing more, or for as long as the time-out.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use burn::backend::flex::FlexTensor;
use burn::tensor::TensorData;

use super::pending::{OutstandingJob, OutstandingJobs};
use super::{Message, Transport};
use crate::Error;
use crate::lock::lock;

/// Tag of the answers, in the group that exists for them.
const ANSWERS: u64 = 0;
/// In place of the number of a message, in the last answer of a rank.
const NOTHING_MORE: u64 = u64::MAX;

/// The messages to one receiver.
///
/// It does not hold the group that they were sent in: peers see that this rank has left that, while the messages wait
/// on.
pub(super) struct SentMessages<M> {
    /// The group in which the receiver answers.
    answers: Arc<dyn Transport>,
    to: usize,
    state: Mutex<SentState<M>>,
    /// How many wait, readable without the lock.
    waiting: AtomicUsize,
}

struct SentState<M> {
    /// Number of the next message.
    next: u64,
    /// By number.
    waiting: BTreeMap<u64, M>,
    /// The receiver asks for nothing more.
    closed: bool,
}

impl<M> std::fmt::Debug for SentMessages<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SentMessages").field("to", &self.to).field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

impl<M> SentMessages<M> {
    pub fn new(answers: Arc<dyn Transport>, to: usize) -> Self {
        let state = SentState { next: 0, waiting: BTreeMap::new(), closed: false };
        Self { answers, to, state: Mutex::new(state), waiting: AtomicUsize::new(0) }
    }

    /// The receiving rank.
    pub fn to(&self) -> usize {
        self.to
    }

    /// Keeps a message, if there are data to be asked for, under the number that `announce` makes its header with. It
    /// is to be announced afterwards: the answer finds it here.
    ///
    /// # Errors
    /// Those of `announce`: nothing is kept then.
    pub fn put<H>(&self, message: Option<M>, announce: impl FnOnce(u64) -> Result<H, Error>) -> Result<H, Error> {
        let mut state = lock(&self.state);
        let number = state.next;
        let header = announce(number)?;
        state.next += 1;
        if let Some(message) = message.filter(|_| !state.closed) {
            state.waiting.insert(number, message);
        }
        self.waiting.store(state.waiting.len(), Ordering::Release);
        Ok(header)
    }

    /// Takes the message of this number.
    pub fn take(&self, number: u64) -> Option<M> {
        let mut state = lock(&self.state);
        let taken = state.waiting.remove(&number);
        self.waiting.store(state.waiting.len(), Ordering::Release);
        taken
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == 0
    }

    /// The waiting messages in words; `tag` tells that of one.
    pub fn describe(&self, tag: impl Fn(&M) -> u64) -> String {
        let state = lock(&self.state);
        let tags: Vec<u64> = state.waiting.values().map(tag).collect();
        format!("messages of rank {} to rank {} with tags {tags:?}", self.answers.rank(), self.to)
    }

    /// Drops what has not been asked for.
    pub fn clear(&self) {
        lock(&self.state).waiting.clear();
        self.waiting.store(0, Ordering::Release);
    }

    /// Takes the answers that have arrived, in their order, and gives `send` the messages that they ask for, with the
    /// rest of the answer. Returns whether there was an answer. Called by one thread.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an answer that makes no sense; those of `send` and of the transport.
    pub fn deliver(&self, mut send: impl FnMut(M, &[u8]) -> Result<(), Error>) -> Result<bool, Error> {
        let mut delivered = false;
        while !self.is_empty()
            && let Some(Message(answer)) = self.answers.try_receive(self.to, ANSWERS)?
        {
            let garbled = || Error::invalid("send over NCCL", format!("the answer of rank {} is garbled", self.to));
            let bytes: Vec<u8> = answer.into_data().try_into_vec().map_err(|_| garbled())?;
            let (number, rest) = bytes.split_first_chunk::<8>().ok_or_else(garbled)?;
            match u64::from_le_bytes(*number) {
                NOTHING_MORE => {
                    lock(&self.state).closed = true;
                    self.clear();
                }
                // Not under the lock: the first message waits for the receiver, and the sender of the next should not
                // wait for that.
                number => send(self.take(number).ok_or_else(garbled)?, rest)?,
            }
            delivered = true;
        }
        Ok(delivered)
    }
}

/// Asks rank `of` for the message of this number.
///
/// # Errors
/// Those of the transport.
pub(super) fn ask(answers: &dyn Transport, of: usize, number: u64, rest: &[u8]) -> Result<(), Error> {
    let bytes: Vec<u8> = number.to_le_bytes().iter().chain(rest).copied().collect();
    let len = bytes.len();
    answers.send(of, ANSWERS, Message(FlexTensor::from_data(TensorData::new(bytes, [len]))))
}

/// Tells rank `of` that nothing more is asked for.
///
/// # Errors
/// Those of the transport.
pub(super) fn ask_nothing_more(answers: &dyn Transport, of: usize) -> Result<(), Error> {
    ask(answers, of, NOTHING_MORE, &[])
}

/// Messages whose sender has dropped its communicator.
pub(super) struct OrphanedMessages<M> {
    messages: Arc<SentMessages<M>>,
    since: Instant,
    /// The rank does not leave the world before.
    _outstanding_job: OutstandingJob,
}

impl<M> OrphanedMessages<M> {
    /// `None` if there are none.
    pub fn new(messages: &Arc<SentMessages<M>>, outstanding_jobs: &Arc<OutstandingJobs>) -> Option<Self> {
        let (messages, since) = (messages.clone(), Instant::now());
        (!messages.is_empty()).then(|| Self {
            messages,
            since,
            _outstanding_job: OutstandingJob::new(outstanding_jobs),
        })
    }

    /// Whether a receiver may still ask for something. After `limit` the messages are dropped, with a warning; `tag`
    /// tells that of one.
    pub fn is_wanted(&self, limit: Duration, tag: impl Fn(&M) -> u64) -> bool {
        if self.messages.is_empty() {
            return false;
        }
        let wanted = self.since.elapsed() < limit;
        if !wanted {
            log::warn!(
                "{}, which dropped its communicator {limit:.1?} ago, are dropped: nobody has received them",
                self.messages.describe(tag)
            );
            self.messages.clear();
        }
        wanted
    }
}

#[cfg(test)]
mod tests;
