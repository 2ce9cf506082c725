//! An endpoint in memory, which can be told to fail, and to keep the buffers it was given.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::Error;
use crate::comm::message_passing::message_store::{Borrowed, Envelope, MessageStore};
use crate::comm::message_passing::{Endpoint, EndpointInfo, RecvBytes, Request, SendBytes, Thresholds};
use crate::lock::lock;

/// What the endpoints of a world share.
#[derive(Debug, Default)]
pub(super) struct MemoryNetwork {
    store: Mutex<MessageStore>,
    lost: AtomicBool,
    /// Whether buffers cannot be reclaimed, as over MPI.
    never_returns: bool,
    /// Sends and receives with this kind of tag are refused from this number on.
    refuses: Option<(u64, usize)>,
    /// Those so far.
    refusable: Mutex<usize>,
    /// Sends with this kind of tag are begun and not done.
    holds: Option<u64>,
}

impl MemoryNetwork {
    /// One whose endpoints give no buffers back, refuse sends and receives of one kind from this number on, and never
    /// complete sends of another.
    pub fn never_returning(refuses: Option<(u64, usize)>, holds: Option<u64>) -> Self {
        Self { never_returns: true, refuses, holds, ..Self::default() }
    }

    /// Inserts a message as if its sender had sent it.
    pub fn inject(&self, envelope: Envelope, message: Vec<u8>) {
        lock(&self.store).inject(envelope, message);
    }

    /// All ranks are gone.
    pub fn lose_all(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Sends that were begun and are not done.
    pub fn under_way(&self) -> Vec<Borrowed> {
        lock(&self.store).pending_sends()
    }

    /// Receives that were begun and are not done.
    pub fn awaited(&self) -> Vec<Borrowed> {
        lock(&self.store).pending_receives()
    }

    /// Whether to refuse one more of this tag.
    fn refuse(&self, tag: u64) -> Result<(), Error> {
        let Some((_, first)) = self.refuses.filter(|(kind, _)| tag % 8 == *kind) else { return Ok(()) };
        let mut so_far = lock(&self.refusable);
        *so_far += 1;
        match *so_far > first {
            true => Err(Error::Transport { transport: "memory", problem: "refused on purpose".into() }),
            false => Ok(()),
        }
    }
}

#[derive(Debug)]
pub(super) struct MemoryEndpoint {
    info: EndpointInfo,
    network: Arc<MemoryNetwork>,
}

impl MemoryEndpoint {
    pub fn new(rank: usize, size: usize, network: &Arc<MemoryNetwork>) -> Self {
        let info = EndpointInfo {
            name: "memory",
            rank,
            size,
            tags: 1 << 20,
            can_reclaim: !network.never_returns,
            wakes_on_arrival: true,
            shares_memory: false,
            thresholds: Thresholds::STANDARD,
        };
        Self { info, network: network.clone() }
    }
}

impl Endpoint for MemoryEndpoint {
    fn info(&self) -> &EndpointInfo {
        &self.info
    }

    unsafe fn start_send(
        &self,
        to: usize,
        tag: u64,
        bytes: SendBytes,
        _control: bool,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        self.network.refuse(tag)?;
        let held = self.network.holds == Some(tag % 8);
        let arrives = if held { u64::MAX } else { 0 };
        lock(&self.network.store).send((self.info.rank, to, tag), bytes, arrives, !held, requests);
        Ok(())
    }

    unsafe fn start_receive(
        &self,
        from: usize,
        tag: u64,
        buffer: RecvBytes,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        self.network.refuse(tag)?;
        lock(&self.network.store).receive((from, self.info.rank, tag), buffer, requests);
        Ok(())
    }

    fn test(&self, requests: &mut Vec<Request>) -> Result<bool, Error> {
        lock(&self.network.store).test(&self.info, 0, requests)
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        Ok(lock(&self.network.store).take(&self.info, from, tag, 0))
    }

    fn cancel(&self, requests: &mut Vec<Request>) {
        if self.info.can_reclaim {
            self.reclaim(requests);
        }
    }

    fn reclaim(&self, requests: &mut Vec<Request>) {
        lock(&self.network.store).reclaim(requests);
    }

    fn park(&self, longest: Duration) {
        std::thread::sleep(longest.min(Duration::from_micros(200)));
    }

    fn lost_ranks(&self) -> Vec<(usize, String)> {
        let all = 0..if self.network.lost.load(Ordering::Acquire) { self.info.size } else { 0 };
        all.filter(|rank| *rank != self.info.rank).map(|rank| (rank, "the test is over".into())).collect()
    }
}
