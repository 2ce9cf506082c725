//! What the groups of a world share in one process: its fate, and the warden that hears of it.

mod failure;

use std::any::Any;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

pub(super) use self::failure::Proposal;
use self::failure::{ALONE, Inquiry, Known, write_proposal};
use super::codec::{Reader, Writer};
use super::group::{Group, Kind, Left, lock};
use super::wire::{Ticket, Wire};
use crate::Error;

/// How often a warden looks what has come.
const ROUND: Duration = Duration::from_millis(2);
/// How long a failed world waits for its ranks to go.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long a rank waits for what it has sent to be taken when all have ended, if it can take it back.
const LAST_BYTES: Duration = Duration::from_millis(200);

/// Groups remembered after they were left.
const PAST: usize = 32;

/// What wardens tell each other.
mod word {
    pub const PROPOSE: u8 = 0;
    pub const ASK: u8 = 1;
    pub const KNOW: u8 = 2;
    pub const FATE: u8 = 3;
    pub const CLOSED: u8 = 4;
    pub const LEFT: u8 = 5;
    pub const BYE: u8 = 6;
}

/// A group that this rank has left: name, members and what it called last.
type Past = (Arc<str>, Vec<usize>, String);

/// Bytes on their way to another rank, kept until they are there.
struct Parcel {
    tickets: Vec<Ticket>,
    _contents: Box<dyn Any + Send>,
}

pub(super) struct World {
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
    /// The error that this rank has proposed, and when.
    proposed: Mutex<Option<(Proposal, Instant)>>,
    /// Ranks that hold nothing of this world any more.
    ended: Mutex<Vec<bool>>,
    /// Ranks that went without a word.
    lost: Vec<AtomicBool>,
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
        let lost = (0..wire.size()).map(|_| AtomicBool::new(false)).collect();
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
            proposed: Mutex::default(),
            ended,
            lost,
            said_farewell: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        })
    }

    pub fn fate(&self) -> Option<&Error> {
        self.fate.get()
    }

    /// Whether a rank is gone without having said so.
    pub fn is_lost(&self, rank: usize) -> bool {
        self.lost[rank].load(Ordering::Acquire)
    }

    /// The rank that takes proposals: the first that is not lost.
    fn judge(&self) -> usize {
        (0..self.lost.len()).find(|rank| !self.is_lost(*rank)).unwrap_or_default()
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

    pub fn add(&self, group: &Arc<Group>) {
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

    pub fn groups(&self) -> Vec<Arc<Group>> {
        lock(&self.groups).iter().filter_map(Weak::upgrade).collect()
    }

    /// Keeps `contents` until the tickets are done.
    pub fn keep(&self, tickets: Vec<Ticket>, contents: impl Any + Send) {
        if !tickets.is_empty() {
            lock(&self.outgoing).push(Parcel { tickets, _contents: Box::new(contents) });
        }
    }

    /// Tells one rank's warden.
    fn tell(&self, to: usize, message: &[u8]) {
        if to == self.wire.rank() {
            return lock(&self.own).push_back(message.to_vec());
        }
        let (bytes, mut tickets) = (message.to_vec(), Vec::new());
        // SAFETY: the bytes are on the heap, and kept until they are sent.
        let sent =
            unsafe { self.wire.send(to, Group::tag_of(0, Kind::Control), bytes.as_ptr(), bytes.len(), &mut tickets) };
        if let Err(problem) = sent {
            log::error!("rank {} cannot tell rank {to} how things are: {problem}", self.wire.rank());
        }
        self.keep(tickets, bytes);
    }

    fn tell_all(&self, message: &[u8]) {
        (0..self.wire.size()).for_each(|to| self.tell(to, message));
    }

    /// Tells the others of a group that this rank will not come again.
    pub fn leave(&self, group: &Group, panicked: bool) {
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
            let mut left = Writer::default();
            left.byte(word::LEFT).number(group.id).number(group.rank as u64);
            left.number(group.done.load(Ordering::Acquire)).number(sent[other]).byte(panicked.into());
            self.tell(*to, &left.0);
        }
    }

    /// This rank is done with the world, whoever still holds a communicator.
    pub fn farewell(&self) {
        if !self.said_farewell.swap(true, Ordering::AcqRel) {
            let mut bye = Writer::default();
            bye.byte(word::BYE);
            self.tell_all(&bye.0);
        }
    }

    /// Hears what has come, and does what is to be done. Called by the warden, and by whoever waits.
    pub fn attend(&self) {
        let Ok(_one) = self.attending.try_lock() else { return };
        self.listen();
        // After all that was said has been heard: whoever has taken leave is not missed.
        self.miss();
        self.listen();
        self.conclude(false);
        let overdue = lock(&self.proposed).clone().filter(|(_, since)| since.elapsed() > ALONE);
        if let Some((proposal, _)) = overdue {
            self.accept(proposal.error);
        }
        self.clear();
    }

    fn listen(&self) {
        loop {
            let own = lock(&self.own).pop_front().map(|message| (self.wire.rank(), message));
            let message = match own {
                Some(message) => message,
                None => match self.wire.take(None, Group::tag_of(0, Kind::Control)) {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    Err(problem) => {
                        log::error!("rank {} cannot hear the others: {problem}", self.wire.rank());
                        break;
                    }
                },
            };
            if self.hear(message.0, &message.1).is_none() {
                log::error!("rank {} does not understand rank {}", self.wire.rank(), message.0);
            }
        }
    }

    /// Lets go of what has been sent: its memory is wanted for what is received next.
    pub fn clear(&self) {
        lock(&self.outgoing).retain_mut(|parcel| !self.wire.progress(&mut parcel.tickets).unwrap_or(false));
    }

    fn hear(&self, from: usize, message: &[u8]) -> Option<()> {
        let mut reader = Reader(message);
        match reader.byte()? {
            word::PROPOSE => {
                let proposal = self.read_proposal(&mut reader)?;
                let mut inquiry = lock(&self.inquiry);
                if inquiry.is_none() && self.fate.get().is_none() {
                    let mut ask = Writer::default();
                    ask.byte(word::ASK);
                    write_proposal(&mut ask, &proposal);
                    *inquiry = Some(Inquiry { proposal, known: vec![None; self.wire.size()], since: Instant::now() });
                    drop(inquiry);
                    self.tell_all(&ask.0);
                }
            }
            word::ASK => {
                let known = self.know(&self.read_proposal(&mut reader)?);
                let mut answer = Writer::default();
                answer.byte(word::KNOW).byte(known.in_call.into());
                answer.list(known.line.as_slice(), |w, line| {
                    w.text(line);
                });
                answer.list(&known.elsewhere, |w, line| {
                    w.text(line);
                });
                self.tell(from, &answer.0);
            }
            word::KNOW => {
                let in_call = reader.byte()? != 0;
                let line = reader.list(Reader::text)?.pop();
                let elsewhere = reader.list(Reader::text)?;
                if let Some(inquiry) = lock(&self.inquiry).as_mut() {
                    inquiry.known[from] = Some(Known { in_call, line, elsewhere });
                }
                self.conclude(true);
            }
            word::FATE => self.accept(reader.error()?),
            word::CLOSED => {
                let (id, committed) = (reader.number()?, reader.number()?);
                for group in self.groups().iter().filter(|group| group.id == id) {
                    let _ = group.closed.set(committed);
                }
            }
            word::LEFT => {
                let id = reader.number()?;
                let left = Left {
                    rank: reader.index()?,
                    collectives: reader.number()?,
                    messages: reader.number()?,
                    panicked: reader.byte()? != 0,
                };
                // The list is held, so that a group that is being made either is in it or finds the news.
                let groups = lock(&self.groups);
                match groups.iter().filter_map(Weak::upgrade).find(|group| group.id == id) {
                    Some(group) => lock(&group.left).push(left),
                    None => lock(&self.early).push((id, left)),
                }
            }
            word::BYE => lock(&self.ended)[from] = true,
            _ => return None,
        }
        Some(())
    }

    /// Attends to the world until all ranks have ended. Returns whether nothing of it is left.
    pub fn guard(&self) -> bool {
        let mut ended_since = None;
        let whole = loop {
            self.attend();
            let ended: Vec<bool> =
                lock(&self.ended).iter().enumerate().map(|(rank, ended)| *ended || self.is_lost(rank)).collect();
            if ended[self.wire.rank()] {
                let since: Instant = *ended_since.get_or_insert_with(Instant::now);
                let all = ended.iter().all(|ended| *ended);
                // What is still on its way then, nobody will ever receive.
                let patience = if self.wire.gives_back() { LAST_BYTES } else { FAREWELL };
                if all && (lock(&self.outgoing).is_empty() || since.elapsed() > patience) {
                    break true;
                }
                if self.fate.get().is_some() && since.elapsed() > FAREWELL {
                    // Whoever has not come by now is dead, or was sent something that it has never taken.
                    break all;
                }
            }
            let waits = || self.waiting.load(Ordering::Relaxed) > 0;
            if !waits() {
                self.wire.rest(ROUND);
            }
            // News that somebody waits for is taken by whoever waits: it would have to be woken a second time.
            if waits() {
                thread::sleep(ROUND);
            }
        };
        for mut parcel in lock(&self.outgoing).drain(..) {
            match self.wire.gives_back() {
                true => self.wire.withdraw(&mut parcel.tickets),
                false => std::mem::forget(parcel),
            }
        }
        self.wire.close(if whole { FAREWELL } else { Duration::ZERO });
        whole
    }

    /// Has memory back that was lent to the wire. If the wire cannot give it back, all that is left is to end all processes.
    pub fn take_back(&self, tickets: &mut Vec<Ticket>, why: impl FnOnce() -> Error) {
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
