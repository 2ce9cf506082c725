//! A wire in memory, which can be told to fail, and to keep what it was lent.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::Error;
use crate::comm::wired::group::lock;
use crate::comm::wired::{Ticket, Wire};

/// From, to and tag.
pub(super) type Way = (usize, usize, u64);

/// Memory that was lent for a message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lent {
    pub way: Way,
    pub data: *mut u8,
    pub len: usize,
}

/// What the wires of a world have in common.
#[derive(Debug, Default)]
pub(super) struct Lines {
    state: Mutex<State>,
    lost: AtomicBool,
    /// Whether nothing that was lent can be had back, as over MPI.
    keeps: bool,
    /// Sends and receives with this kind of tag are refused from this number on.
    refuses: Option<(u64, usize)>,
    /// Sends with this kind of tag are begun and not done.
    holds: Option<u64>,
}

#[derive(Debug, Default)]
struct State {
    sent: BTreeMap<Way, VecDeque<Vec<u8>>>,
    receives: BTreeMap<u64, Lent>,
    sends: BTreeMap<u64, Lent>,
    tickets: u64,
    refused: usize,
}

// SAFETY: the places are used under the lock.
unsafe impl Send for State {}

impl Lines {
    /// That give nothing back, refuse sends and receives of one kind from this number on, and are never done with sends of
    /// another.
    pub fn keeping(refuses: Option<(u64, usize)>, holds: Option<u64>) -> Self {
        Self { keeps: true, refuses, holds, ..Self::default() }
    }

    /// Puts in a message as if its sender had sent it.
    pub fn forge(&self, way: Way, message: Vec<u8>) {
        lock(&self.state).sent.entry(way).or_default().push_back(message);
    }

    /// All ranks are gone.
    pub fn lose_all(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Sends that were begun and are not done.
    pub fn under_way(&self) -> Vec<Lent> {
        lock(&self.state).sends.values().copied().collect()
    }

    /// Receives that were begun and are not done.
    pub fn awaited(&self) -> Vec<Lent> {
        lock(&self.state).receives.values().copied().collect()
    }

    /// Whether to refuse one more of this tag.
    fn refuse(&self, state: &mut State, tag: u64) -> Result<(), Error> {
        match self.refuses {
            Some((kind, first)) if tag % 8 == kind => {
                state.refused += 1;
                match state.refused > first {
                    true => Err(Error::Engine { engine: "line", problem: "refused on purpose".into() }),
                    false => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug)]
pub(super) struct Line {
    rank: usize,
    size: usize,
    lines: Arc<Lines>,
}

impl Line {
    pub fn new(rank: usize, size: usize, lines: &Arc<Lines>) -> Self {
        Self { rank, size, lines: lines.clone() }
    }
}

impl Wire for Line {
    fn engine(&self) -> &'static str {
        "line"
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
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error> {
        let (way, mut state) = ((self.rank, to, tag), lock(&self.lines.state));
        self.lines.refuse(&mut state, tag)?;
        if self.lines.holds == Some(tag % 8) {
            state.tickets += 1;
            let ticket = state.tickets;
            state.sends.insert(ticket, Lent { way, data: data.cast_mut(), len });
            tickets.push(Ticket(ticket));
        } else if len > 0 {
            // SAFETY: passed on.
            let bytes = unsafe { std::slice::from_raw_parts(data, len) }.to_vec();
            state.sent.entry(way).or_default().push_back(bytes);
        }
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
        let mut state = lock(&self.lines.state);
        self.lines.refuse(&mut state, tag)?;
        if len > 0 {
            state.tickets += 1;
            let ticket = state.tickets;
            state.receives.insert(ticket, Lent { way: (from, self.rank, tag), data, len });
            tickets.push(Ticket(ticket));
        }
        Ok(())
    }

    fn progress(&self, tickets: &mut Vec<Ticket>) -> Result<bool, Error> {
        let State { sent, receives, sends, .. } = &mut *lock(&self.lines.state);
        // In the order in which they were begun.
        tickets.sort_unstable_by_key(|ticket| ticket.0);
        let mut outcome = Ok(());
        tickets.retain(|Ticket(ticket)| {
            let Some(Lent { way, data, len }) = receives.get(ticket).copied() else {
                return sends.contains_key(ticket);
            };
            let Some(message) = sent.get_mut(&way).and_then(VecDeque::pop_front) else { return true };
            receives.remove(ticket);
            match message.len() == len {
                // SAFETY: lent for this, and as long as that.
                true => unsafe { message.as_ptr().copy_to_nonoverlapping(data, len) },
                false => outcome = Err(Error::Engine { engine: "line", problem: "of another length".into() }),
            }
            false
        });
        outcome.map(|()| tickets.is_empty())
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        let mut state = lock(&self.lines.state);
        let ranks = from.map_or(0..self.size, |from| from..from + 1);
        let mut take = |from| Some((from, state.sent.get_mut(&(from, self.rank, tag))?.pop_front()?));
        Ok(ranks.into_iter().find_map(&mut take))
    }

    fn cancel(&self, tickets: &mut Vec<Ticket>) {
        if !self.lines.keeps {
            self.withdraw(tickets);
        }
    }

    fn gives_back(&self) -> bool {
        !self.lines.keeps
    }

    fn withdraw(&self, tickets: &mut Vec<Ticket>) {
        let mut state = lock(&self.lines.state);
        for Ticket(ticket) in tickets.drain(..) {
            state.receives.remove(&ticket);
            state.sends.remove(&ticket);
        }
    }

    fn rest(&self, longest: Duration) {
        std::thread::sleep(longest.min(Duration::from_micros(200)));
    }

    fn wakes(&self) -> bool {
        true
    }

    fn shares_memory(&self) -> bool {
        false
    }

    fn lost(&self) -> Vec<(usize, String)> {
        let all = 0..if self.lines.lost.load(Ordering::Acquire) { self.size } else { 0 };
        all.filter(|rank| *rank != self.rank).map(|rank| (rank, "the test is over".into())).collect()
    }

    fn close(&self, _: Duration) {}
}
