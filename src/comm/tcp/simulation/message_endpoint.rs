//! An endpoint that keeps the contract of [`Endpoint`] and does no more, as MPI does: messages overtake across tags, a
//! send may not complete until the other side receives, and an arrival wakes nobody.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::network::State;
use super::schedule::{Pause, pause};
use crate::Error;
use crate::comm::lock::lock;
use crate::comm::message_passing::{Endpoint, Request, Thresholds};

/// From, to, tag.
type Route = (usize, usize, u64);

/// A message in flight.
#[derive(Debug)]
struct InFlight {
    /// When it can be received.
    at: u64,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    /// Copied when it was sent.
    Own(Vec<u8>),
    /// Still the sender's, whose request this is.
    Borrowed(*const u8, usize, u64),
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            // SAFETY: borrowed until the request is done.
            Self::Borrowed(data, len, _) => unsafe { std::slice::from_raw_parts(*data, *len) },
        }
    }
}

/// A posted receive.
#[derive(Debug)]
struct RecvBuffer {
    data: *mut u8,
    len: usize,
    request: u64,
}

/// The messages of all ranks.
#[derive(Debug, Default)]
pub(super) struct MessageStore {
    in_flight: HashMap<Route, VecDeque<InFlight>>,
    receives: HashMap<Route, VecDeque<RecvBuffer>>,
    /// Requests that are not done.
    open: std::collections::HashSet<u64>,
    next: u64,
}

// SAFETY: a simulation stays on one thread.
unsafe impl Send for MessageStore {}

impl MessageStore {
    fn request(&mut self) -> u64 {
        self.next += 1;
        self.open.insert(self.next);
        self.next
    }

    /// Matches what has arrived at a rank with its receives.
    fn pair(&mut self, rank: usize, now: u64) {
        let Self { in_flight, receives, open, .. } = self;
        for (route, receives) in receives.iter_mut().filter(|((_, to, _), _)| *to == rank) {
            let Some(in_flight) = in_flight.get_mut(route) else { continue };
            while !receives.is_empty() {
                let Some(message) = in_flight.pop_front_if(|message| message.at <= now) else { break };
                let Some(receive) = receives.pop_front() else { break };
                let bytes = message.bytes.get();
                assert_eq!(bytes.len(), receive.len, "a message of another length on {route:?}");
                // SAFETY: as long as that, and borrowed until the request is done.
                unsafe { bytes.as_ptr().copy_to_nonoverlapping(receive.data, receive.len) };
                open.remove(&receive.request);
                if let Bytes::Borrowed(_, _, request) = message.bytes {
                    open.remove(&request);
                }
            }
        }
    }
}

/// The endpoint of one rank.
#[derive(Debug)]
pub(super) struct MessageEndpoint {
    pub state: Arc<Mutex<State>>,
    pub store: Arc<Mutex<MessageStore>>,
    pub began: Instant,
    pub rank: usize,
}

impl Endpoint for MessageEndpoint {
    fn name(&self) -> &'static str {
        "simulated"
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        lock(&self.state).size
    }

    fn tags(&self) -> u64 {
        32767
    }

    unsafe fn send(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        let (mut state, mut store) = (lock(&self.state), lock(&self.store));
        let late = if state.random.one_in(4) { 3_000_000 } else { 30_000 };
        let delay = state.random.below(late) as u64;
        let eager = len <= state.plan.limits.eager;
        let request = store.request();
        let bytes = Bytes::Borrowed(data, len, request);
        let bytes = if eager { Bytes::Own(bytes.get().to_vec()) } else { bytes };
        if eager {
            store.open.remove(&request);
        }
        requests.push(Request(request));
        let route = store.in_flight.entry((self.rank, to, tag)).or_default();
        let at = route.back().map_or(0, |last| last.at).max(state.now + delay);
        route.push_back(InFlight { at, bytes });
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
        if len > 0 {
            let mut store = lock(&self.store);
            let request = store.request();
            requests.push(Request(request));
            store.receives.entry((from, self.rank, tag)).or_default().push_back(RecvBuffer { data, len, request });
        }
        Ok(())
    }

    fn progress(&self, requests: &mut Vec<Request>) -> Result<bool, Error> {
        let now = lock(&self.state).now;
        let mut store = lock(&self.store);
        store.pair(self.rank, now);
        requests.retain(|request| store.open.contains(&request.0));
        Ok(requests.is_empty())
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        let size = self.size();
        let now = lock(&self.state).now;
        let mut store = lock(&self.store);
        for from in from.map_or(0..size, |from| from..from + 1) {
            let route = store.in_flight.get_mut(&(from, self.rank, tag));
            if let Some(message) = route.and_then(|route| route.pop_front_if(|message| message.at <= now)) {
                if let Bytes::Borrowed(_, _, request) = message.bytes {
                    let bytes = message.bytes.get().to_vec();
                    store.open.remove(&request);
                    return Ok(Some((from, bytes)));
                }
                return Ok(Some((from, message.bytes.get().to_vec())));
            }
        }
        Ok(None)
    }

    fn cancel(&self, requests: &mut Vec<Request>) {
        let mut store = lock(&self.store);
        for request in requests.drain(..) {
            store.receives.values_mut().for_each(|receives| receives.retain(|receive| receive.request != request.0));
            store.open.remove(&request.0);
        }
    }

    fn can_reclaim(&self) -> bool {
        false
    }

    fn reclaim(&self, _: &mut Vec<Request>) {
        unreachable!("it does not give back");
    }

    fn park(&self, longest: Duration) {
        self.sleep(longest);
    }

    fn wakes_on_arrival(&self) -> bool {
        // Polls cost as much as over TCP, in the simulation.
        true
    }

    fn shares_memory(&self) -> bool {
        false
    }

    fn lost_ranks(&self) -> Vec<(usize, String)> {
        Vec::new()
    }

    fn close(&self, _: Duration) {}

    fn thresholds(&self) -> Thresholds {
        lock(&self.state).plan.thresholds
    }

    fn now(&self) -> Instant {
        self.began + Duration::from_nanos(lock(&self.state).now)
    }

    fn yield_now(&self) {
        self.sleep(Duration::ZERO);
    }

    fn sleep(&self, duration: Duration) {
        let now = lock(&self.state).now;
        pause(Pause::Sleep(now + duration.as_nanos() as u64));
    }

    fn abort(&self) -> ! {
        panic!("rank {} gives up", self.rank)
    }
}
