//! What the groups of a world share in one process: its fate, and the warden that hears of it.

mod failure;
#[cfg(fuzzing)]
pub(super) mod fuzzing;
mod warden;
mod words;

use std::any::Any;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use self::failure::Inquiry;
pub(super) use self::failure::Proposal;
use self::words::Word;
use super::group::{Group, Kind, Left, lock};
use super::wire::{Ticket, Wire};
use crate::Error;

/// The least time for a part of a failure: machines are busy.
const SHORTEST: Duration = Duration::from_millis(400);
/// Groups remembered after they were left.
const PAST: usize = 32;

/// A group that this rank has left: name, members and what it called last.
type Past = (Arc<str>, Vec<usize>, String);

/// Bytes on their way to another rank, or from one, kept until they are there.
struct Parcel {
    tickets: Vec<Ticket>,
    contents: Option<Box<dyn Any + Send>>,
}

impl Drop for Parcel {
    fn drop(&mut self) {
        if !self.tickets.is_empty() {
            // The wire may still read or write there.
            std::mem::forget(self.contents.take());
        }
    }
}

pub(in crate::comm) struct World {
    pub wire: Box<dyn Wire>,
    pub timeout: Duration,
    pub name: Arc<str>,
    fate: OnceLock<Error>,
    groups: Mutex<Vec<Weak<Group>>>,
    /// Groups that this rank has left, for the day their members fail.
    past: Mutex<VecDeque<Past>>,
    /// News of groups that this rank is still to make.
    early: Mutex<Vec<(u64, Left)>>,
    next_group: AtomicU64,
    outgoing: Mutex<Vec<Parcel>>,
    /// What this rank tells itself.
    own: Mutex<VecDeque<Vec<u8>>>,
    attending: Mutex<()>,
    inquiry: Mutex<Option<Inquiry>>,
    /// The judge that asked last what this rank knows, and when.
    asked: Mutex<Option<(usize, Instant)>>,
    /// The error that this rank has proposed, and when.
    proposed: Mutex<Option<(Proposal, Instant)>>,
    /// Ranks that hold nothing of this world any more.
    ended: Mutex<Vec<bool>>,
    /// Ranks that can't be talked to any more: they went without a word, or have ended.
    lost: Vec<AtomicBool>,
    /// Ranks that should have judged a failure, and did not say a word.
    silent: Vec<AtomicBool>,
    /// The group of the last call.
    pub last_group: AtomicU64,
    said_farewell: AtomicBool,
    /// Whether the machine has fewer cores than ranks.
    pub crowded: bool,
    /// Threads that wait for the wire, and so attend to the world.
    pub waiting: AtomicUsize,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("rank", &self.wire.rank())
            .field("size", &self.wire.size())
            .finish_non_exhaustive()
    }
}

/// A rank's being in a world: it ends when nobody holds it any more.
#[derive(Debug)]
pub(super) struct Presence(pub Arc<World>);

impl Drop for Presence {
    fn drop(&mut self) {
        self.0.farewell();
    }
}

impl World {
    pub fn new(wire: Box<dyn Wire>, timeout: Duration, name: Arc<str>, crowded: bool) -> Arc<Self> {
        let ended = Mutex::new(vec![false; wire.size()]);
        let none = || (0..wire.size()).map(|_| AtomicBool::new(false)).collect();
        let (lost, silent) = (none(), none());
        Arc::new(Self {
            wire,
            timeout,
            name,
            crowded,
            fate: OnceLock::new(),
            groups: Mutex::default(),
            past: Mutex::default(),
            early: Mutex::default(),
            next_group: AtomicU64::new(1),
            outgoing: Mutex::default(),
            own: Mutex::default(),
            attending: Mutex::default(),
            inquiry: Mutex::default(),
            asked: Mutex::default(),
            proposed: Mutex::default(),
            ended,
            lost,
            silent,
            last_group: AtomicU64::new(0),
            said_farewell: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        })
    }

    /// The time since then, by the clock of the wire.
    pub fn elapsed(&self, since: Instant) -> Duration {
        self.wire.now().saturating_duration_since(since)
    }

    pub fn fate(&self) -> Option<&Error> {
        self.fate.get()
    }

    /// The time for a part of a failure: all parts together are to be over within half the time-out.
    pub fn within(&self, most: Duration) -> Duration {
        most.min((self.timeout / 10).max(SHORTEST))
    }

    /// Whether a rank can't be talked to any more.
    pub fn is_lost(&self, rank: usize) -> bool {
        self.lost[rank].load(Ordering::Acquire)
    }

    /// The rank that takes proposals: the first that is there and answers, as far as this rank has found out.
    fn judge(&self) -> usize {
        let answers = |rank: &usize| !self.is_lost(*rank) && !self.silent[*rank].load(Ordering::Acquire);
        (0..self.lost.len()).find(answers).unwrap_or(self.wire.rank())
    }

    /// A number for a new group: no other group of a rank that is in it has the same.
    pub fn new_group_id(&self) -> Result<u64, Error> {
        let id = self.next_group.fetch_add(1, Ordering::Relaxed) * self.wire.size() as u64 + self.wire.rank() as u64;
        match id < Group::most(self.wire.tags()) {
            true => Ok(id),
            false => {
                let problem = format!("{id} groups are more than there are tags for; split less often");
                Err(Error::Engine { engine: self.wire.engine(), problem })
            }
        }
    }

    pub(in crate::comm::wired) fn add(&self, group: &Arc<Group>) {
        let mut groups = lock(&self.groups);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(Arc::downgrade(group));
        lock(&self.early).retain(|(id, left)| {
            let known = *id == group.id;
            if known {
                lock(&group.left).push(*left);
            }
            !known
        });
    }

    pub(in crate::comm::wired) fn groups(&self) -> Vec<Arc<Group>> {
        lock(&self.groups).iter().filter_map(Weak::upgrade).collect()
    }

    /// Keeps `contents` until the tickets are done.
    pub(in crate::comm::wired) fn keep(&self, tickets: Vec<Ticket>, contents: impl Any + Send) {
        if !tickets.is_empty() {
            lock(&self.outgoing).push(Parcel { tickets, contents: Some(Box::new(contents)) });
        }
    }

    /// Takes back receives that were begun into `contents`, which are kept for as long as the wire may still write there.
    pub fn give_up(&self, mut tickets: Vec<Ticket>, contents: impl Any + Send) {
        self.wire.cancel(&mut tickets);
        self.keep(tickets, contents);
    }

    /// Tells one rank's warden.
    fn tell(&self, to: usize, word: &Word) {
        let bytes = word.write();
        if to == self.wire.rank() {
            return lock(&self.own).push_back(bytes);
        }
        let mut tickets = Vec::new();
        // SAFETY: the bytes are on the heap, and kept until they are sent.
        let sent =
            unsafe { self.wire.tell(to, Group::tag_of(0, Kind::Control), bytes.as_ptr(), bytes.len(), &mut tickets) };
        if let Err(problem) = sent {
            log::error!("rank {} cannot tell rank {to} how things are: {problem}", self.wire.rank());
        }
        self.keep(tickets, bytes);
    }

    fn tell_all(&self, word: &Word) {
        (0..self.wire.size()).for_each(|to| self.tell(to, word));
    }

    /// Tells the others of a group that this rank will not come again.
    pub(in crate::comm::wired) fn leave(&self, group: &Group, panicked: bool) {
        if group.leaves() {
            return;
        }
        {
            let mut past = lock(&self.past);
            past.truncate(PAST - 1);
            past.push_front((group.name.clone(), group.members.clone(), group.watch.line(group.rank)));
        }
        let sent = lock(&group.sent).clone();
        for (other, to) in group.members.iter().enumerate().filter(|(other, _)| *other != group.rank) {
            let left = Left {
                rank: group.rank,
                collectives: group.done.load(Ordering::Acquire),
                messages: sent[other],
                panicked,
            };
            self.tell(*to, &Word::Left { group: group.id, left });
        }
    }

    /// Has memory back that was lent to the wire. If the wire cannot give it back, all that is left is to end all processes.
    pub(in crate::comm::wired) fn take_back(&self, tickets: &mut Vec<Ticket>, why: impl FnOnce() -> Error) {
        if tickets.is_empty() {
            return;
        }
        if !self.wire.gives_back() {
            eprintln!("{}", why());
            self.wire.abort();
        }
        self.wire.withdraw(tickets);
    }
}
