//! An endpoint in memory, which can be told to fail, and to keep the buffers it was given.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::Error;
use crate::comm::lock::lock;
use crate::comm::message_passing::{Endpoint, Request};

/// From, to and tag.
pub(super) type Route = (usize, usize, u64);

/// A buffer of a pending message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Borrowed {
    pub route: Route,
    pub data: *mut u8,
    pub len: usize,
}

/// What the endpoints of a world share.
#[derive(Debug, Default)]
pub(super) struct MemoryNetwork {
    state: Mutex<State>,
    lost: AtomicBool,
    /// Whether buffers cannot be reclaimed, as over MPI.
    never_returns: bool,
    /// Sends and receives with this kind of tag are refused from this number on.
    refuses: Option<(u64, usize)>,
    /// Sends with this kind of tag are begun and not done.
    holds: Option<u64>,
}

#[derive(Debug, Default)]
struct State {
    sent: BTreeMap<Route, VecDeque<Vec<u8>>>,
    receives: BTreeMap<u64, Borrowed>,
    sends: BTreeMap<u64, Borrowed>,
    requests: u64,
    refused: usize,
}

// SAFETY: the buffers are used under the lock.
unsafe impl Send for State {}

impl MemoryNetwork {
    /// One whose endpoints give no buffers back, refuse sends and receives of one kind from this number on, and never
    /// complete sends of another.
    pub fn never_returning(refuses: Option<(u64, usize)>, holds: Option<u64>) -> Self {
        Self { never_returns: true, refuses, holds, ..Self::default() }
    }

    /// Inserts a message as if its sender had sent it.
    pub fn inject(&self, route: Route, message: Vec<u8>) {
        lock(&self.state).sent.entry(route).or_default().push_back(message);
    }

    /// All ranks are gone.
    pub fn lose_all(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Sends that were begun and are not done.
    pub fn under_way(&self) -> Vec<Borrowed> {
        lock(&self.state).sends.values().copied().collect()
    }

    /// Receives that were begun and are not done.
    pub fn awaited(&self) -> Vec<Borrowed> {
        lock(&self.state).receives.values().copied().collect()
    }

    /// Whether to refuse one more of this tag.
    fn refuse(&self, state: &mut State, tag: u64) -> Result<(), Error> {
        match self.refuses {
            Some((kind, first)) if tag % 8 == kind => {
                state.refused += 1;
                match state.refused > first {
                    true => Err(Error::Transport { transport: "memory", problem: "refused on purpose".into() }),
                    false => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug)]
pub(super) struct MemoryEndpoint {
    rank: usize,
    size: usize,
    network: Arc<MemoryNetwork>,
}

impl MemoryEndpoint {
    pub fn new(rank: usize, size: usize, network: &Arc<MemoryNetwork>) -> Self {
        Self { rank, size, network: network.clone() }
    }
}

impl Endpoint for MemoryEndpoint {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn tags(&self) -> u64 {
        1 << 20
    }

    unsafe fn send(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        let (route, mut state) = ((self.rank, to, tag), lock(&self.network.state));
        self.network.refuse(&mut state, tag)?;
        if self.network.holds == Some(tag % 8) {
            state.requests += 1;
            let request = state.requests;
            state.sends.insert(request, Borrowed { route, data: data.cast_mut(), len });
            requests.push(Request(request));
        } else if len > 0 {
            // SAFETY: passed on.
            let bytes = unsafe { std::slice::from_raw_parts(data, len) }.to_vec();
            state.sent.entry(route).or_default().push_back(bytes);
        }
        Ok(())
    }

    unsafe fn receive(
        &self,
        from: usize,
        tag: u64,
        data: *mut u8,
        len: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        let mut state = lock(&self.network.state);
        self.network.refuse(&mut state, tag)?;
        if len > 0 {
            state.requests += 1;
            let request = state.requests;
            state.receives.insert(request, Borrowed { route: (from, self.rank, tag), data, len });
            requests.push(Request(request));
        }
        Ok(())
    }

    fn progress(&self, requests: &mut Vec<Request>) -> Result<bool, Error> {
        let State { sent, receives, sends, .. } = &mut *lock(&self.network.state);
        // In the order in which they were begun.
        requests.sort_unstable_by_key(|request| request.0);
        let mut outcome = Ok(());
        requests.retain(|Request(request)| {
            let Some(Borrowed { route, data, len }) = receives.get(request).copied() else {
                return sends.contains_key(request);
            };
            let Some(message) = sent.get_mut(&route).and_then(VecDeque::pop_front) else { return true };
            receives.remove(request);
            match message.len() == len {
                // SAFETY: borrowed for this, and as long as that.
                true => unsafe { message.as_ptr().copy_to_nonoverlapping(data, len) },
                false => outcome = Err(Error::Transport { transport: "memory", problem: "of another length".into() }),
            }
            false
        });
        outcome.map(|()| requests.is_empty())
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        let mut state = lock(&self.network.state);
        let ranks = from.map_or(0..self.size, |from| from..from + 1);
        let mut take = |from| Some((from, state.sent.get_mut(&(from, self.rank, tag))?.pop_front()?));
        Ok(ranks.into_iter().find_map(&mut take))
    }

    fn cancel(&self, requests: &mut Vec<Request>) {
        if !self.network.never_returns {
            self.reclaim(requests);
        }
    }

    fn can_reclaim(&self) -> bool {
        !self.network.never_returns
    }

    fn reclaim(&self, requests: &mut Vec<Request>) {
        let mut state = lock(&self.network.state);
        for Request(request) in requests.drain(..) {
            state.receives.remove(&request);
            state.sends.remove(&request);
        }
    }

    fn park(&self, longest: Duration) {
        std::thread::sleep(longest.min(Duration::from_micros(200)));
    }

    fn wakes_on_arrival(&self) -> bool {
        true
    }

    fn shares_memory(&self) -> bool {
        false
    }

    fn lost_ranks(&self) -> Vec<(usize, String)> {
        let all = 0..if self.network.lost.load(Ordering::Acquire) { self.size } else { 0 };
        all.filter(|rank| *rank != self.rank).map(|rank| (rank, "the test is over".into())).collect()
    }

    fn close(&self, _: Duration) {}
}
