//! A wire that keeps the contract of [`Wire`] and does no more, as MPI does: it overtakes across tags, it may hold on to what it
//! was given until the other side receives, it does not wake anybody.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::network::State;
use super::schedule::{Pause, pause};
use crate::Error;
use crate::comm::wired::{Sizes, Ticket, Wire, lock};

/// From, to, tag.
type Line = (usize, usize, u64);

/// A message on its way.
#[derive(Debug)]
struct Letter {
    /// When it can be received.
    at: u64,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    /// Copied when it was sent.
    Own(Vec<u8>),
    /// Still the sender's, whose ticket this is.
    Lent(*const u8, usize, u64),
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            // SAFETY: lent until the ticket is done.
            Self::Lent(data, len, _) => unsafe { std::slice::from_raw_parts(*data, *len) },
        }
    }
}

/// A receive that waits.
#[derive(Debug)]
struct Place {
    data: *mut u8,
    len: usize,
    ticket: u64,
}

/// The messages of all ranks.
#[derive(Debug, Default)]
pub(super) struct Mail {
    letters: HashMap<Line, VecDeque<Letter>>,
    places: HashMap<Line, VecDeque<Place>>,
    /// Tickets that are not done.
    open: std::collections::HashSet<u64>,
    next: u64,
}

// SAFETY: a simulation stays on one thread.
unsafe impl Send for Mail {}

impl Mail {
    fn ticket(&mut self) -> u64 {
        self.next += 1;
        self.open.insert(self.next);
        self.next
    }

    /// Brings together what has come to a rank and what it receives.
    fn pair(&mut self, rank: usize, now: u64) {
        let Self { letters, places, open, .. } = self;
        for (line, places) in places.iter_mut().filter(|((_, to, _), _)| *to == rank) {
            let Some(letters) = letters.get_mut(line) else { continue };
            while !places.is_empty() {
                let Some(letter) = letters.pop_front_if(|letter| letter.at <= now) else { break };
                let Some(place) = places.pop_front() else { break };
                let bytes = letter.bytes.get();
                assert_eq!(bytes.len(), place.len, "a message of another length on {line:?}");
                // SAFETY: as long as that, and lent until the ticket is done.
                unsafe { bytes.as_ptr().copy_to_nonoverlapping(place.data, place.len) };
                open.remove(&place.ticket);
                if let Bytes::Lent(_, _, ticket) = letter.bytes {
                    open.remove(&ticket);
                }
            }
        }
    }
}

/// The wire of one rank.
#[derive(Debug)]
pub(super) struct MessageWire {
    pub state: Arc<Mutex<State>>,
    pub mail: Arc<Mutex<Mail>>,
    pub began: Instant,
    pub rank: usize,
}

impl Wire for MessageWire {
    fn engine(&self) -> &'static str {
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
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error> {
        if len == 0 {
            return Ok(());
        }
        let (mut state, mut mail) = (lock(&self.state), lock(&self.mail));
        let late = if state.random.one_in(4) { 3_000_000 } else { 30_000 };
        let delay = state.random.below(late) as u64;
        let eager = len <= state.plan.limits.whole;
        let ticket = mail.ticket();
        let bytes = Bytes::Lent(data, len, ticket);
        let bytes = if eager { Bytes::Own(bytes.get().to_vec()) } else { bytes };
        if eager {
            mail.open.remove(&ticket);
        }
        tickets.push(Ticket(ticket));
        let line = mail.letters.entry((self.rank, to, tag)).or_default();
        let at = line.back().map_or(0, |last| last.at).max(state.now + delay);
        line.push_back(Letter { at, bytes });
        Ok(())
    }

    unsafe fn receive(
        &self,
        from: usize,
        tag: u64,
        data: *mut u8,
        len: usize,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error> {
        if len > 0 {
            let mut mail = lock(&self.mail);
            let ticket = mail.ticket();
            tickets.push(Ticket(ticket));
            mail.places.entry((from, self.rank, tag)).or_default().push_back(Place { data, len, ticket });
        }
        Ok(())
    }

    fn progress(&self, tickets: &mut Vec<Ticket>) -> Result<bool, Error> {
        let now = lock(&self.state).now;
        let mut mail = lock(&self.mail);
        mail.pair(self.rank, now);
        tickets.retain(|ticket| mail.open.contains(&ticket.0));
        Ok(tickets.is_empty())
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        let size = self.size();
        let now = lock(&self.state).now;
        let mut mail = lock(&self.mail);
        for from in from.map_or(0..size, |from| from..from + 1) {
            let line = mail.letters.get_mut(&(from, self.rank, tag));
            if let Some(letter) = line.and_then(|line| line.pop_front_if(|letter| letter.at <= now)) {
                if let Bytes::Lent(_, _, ticket) = letter.bytes {
                    let bytes = letter.bytes.get().to_vec();
                    mail.open.remove(&ticket);
                    return Ok(Some((from, bytes)));
                }
                return Ok(Some((from, letter.bytes.get().to_vec())));
            }
        }
        Ok(None)
    }

    fn cancel(&self, tickets: &mut Vec<Ticket>) {
        let mut mail = lock(&self.mail);
        for ticket in tickets.drain(..) {
            mail.places.values_mut().for_each(|places| places.retain(|place| place.ticket != ticket.0));
            mail.open.remove(&ticket.0);
        }
    }

    fn gives_back(&self) -> bool {
        false
    }

    fn withdraw(&self, _: &mut Vec<Ticket>) {
        unreachable!("it does not give back");
    }

    fn rest(&self, longest: Duration) {
        self.sleep(longest);
    }

    fn wakes(&self) -> bool {
        // Polls cost as much as over TCP, in the simulation.
        true
    }

    fn shares_memory(&self) -> bool {
        false
    }

    fn lost(&self) -> Vec<(usize, String)> {
        Vec::new()
    }

    fn close(&self, _: Duration) {}

    fn sizes(&self) -> Sizes {
        lock(&self.state).plan.sizes
    }

    fn now(&self) -> Instant {
        self.began + Duration::from_nanos(lock(&self.state).now)
    }

    fn give_way(&self) {
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
