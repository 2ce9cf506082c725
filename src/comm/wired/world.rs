//! What the groups of a world share in one process: its fate, and the warden that hears of it.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::codec::{Reader, Writer, with_log};
use super::group::{Group, Kind, Left, lock};
use super::wire::{Ticket, Wire};
use crate::Error;
use crate::comm::{Call, CallLog};

/// How often a warden looks what has come.
const ROUND: Duration = Duration::from_millis(2);
/// How long rank 0 waits for what the others know of a failure.
const INQUIRY: Duration = Duration::from_millis(500);
/// How long a rank waits for rank 0 before it takes its own error for the world's.
const ALONE: Duration = Duration::from_secs(3);
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

/// A failure that a rank has found.
#[derive(Debug, Clone)]
pub(super) struct Proposal {
    pub error: Error,
    pub group: Arc<str>,
    /// World ranks of that group.
    pub members: Vec<usize>,
    /// The call that ran out of time: ranks that are not in it are the ones that were missed.
    pub call: Option<Call>,
}

/// What one rank knows of a failure.
#[derive(Debug, Clone, Default)]
struct Known {
    in_call: bool,
    line: Option<String>,
    elsewhere: Vec<String>,
}

/// Rank 0 asks everybody what they know before it pronounces the error.
#[derive(Debug)]
struct Inquiry {
    proposal: Proposal,
    known: Vec<Option<Known>>,
    since: Instant,
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

    /// Has the world fail. Rank 0 takes the first proposal, whoever makes it.
    pub fn propose(&self, proposal: Proposal) {
        {
            let mut proposed = lock(&self.proposed);
            if self.fate.get().is_some() || proposed.is_some() {
                return;
            }
            *proposed = Some((proposal.clone(), Instant::now()));
        }
        self.hand_in(&proposal);
        self.attend();
    }

    fn hand_in(&self, proposal: &Proposal) {
        let mut message = Writer::default();
        message.byte(word::PROPOSE);
        write_proposal(&mut message, proposal);
        self.tell(self.judge(), &message.0);
    }

    /// Looks who is gone without a word. The judge may be among them.
    fn miss(&self) {
        for (rank, problem) in self.wire.lost() {
            if lock(&self.ended)[rank] || self.is_lost(rank) {
                continue;
            }
            log::warn!("rank {} has lost rank {rank}: {problem}", self.wire.rank());
            let judged = self.judge() == rank;
            self.lost[rank].store(true, Ordering::Release);
            let pending = lock(&self.proposed).clone();
            match pending {
                Some((proposal, _)) if judged && self.fate.get().is_none() => self.hand_in(&proposal),
                Some(_) => {}
                None => {
                    let waits = |group: &Arc<Group>| {
                        let call = if group.members.contains(&rank) { group.watch.current(group.rank) } else { None };
                        call.map(|call| call.to_string())
                    };
                    let operation = self.groups().iter().find_map(waits).unwrap_or_else(|| "nobody".into());
                    let (group, log) = (self.name.clone(), CallLog::default());
                    let members = (0..self.wire.size()).collect();
                    let error = Error::RankLost { group: group.clone(), rank, operation, log };
                    let proposal = Proposal { error, group, members, call: None };
                    let mut proposed = lock(&self.proposed);
                    if proposed.is_none() && self.fate.get().is_none() {
                        *proposed = Some((proposal.clone(), Instant::now()));
                        drop(proposed);
                        self.hand_in(&proposal);
                    }
                }
            }
        }
    }

    /// Has the world fail, and waits until it is known with which error.
    pub fn fail(&self, proposal: Proposal) -> Error {
        let own = proposal.error.clone();
        self.propose(proposal);
        let since = Instant::now();
        while self.fate.get().is_none() && since.elapsed() < 2 * ALONE {
            self.attend();
            thread::sleep(Duration::from_micros(100));
        }
        self.fate.get().cloned().unwrap_or(own)
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

    /// What this rank knows of a failure.
    fn know(&self, proposal: &Proposal) -> Known {
        let mut known = Known::default();
        let past = lock(&self.past);
        known.line = past
            .iter()
            .find(|(name, members, _)| *name == proposal.group && *members == proposal.members)
            .map(|(_, _, line)| line.clone());
        drop(past);
        for group in self.groups() {
            if group.name == proposal.group && group.members == proposal.members {
                known.line = Some(group.watch.line(group.rank));
                known.in_call = proposal.call.is_some_and(|call| group.watch.is_in(group.rank, &call));
            } else {
                known.elsewhere.extend(group.watch.waiting().map(|line| format!("in `{}` {line}", group.name)));
            }
        }
        known
    }

    /// Pronounces the error when all have said what they know, or have had the time to.
    fn conclude(&self, answered: bool) {
        let inquiry = lock(&self.inquiry);
        let Some(Inquiry { proposal, known, since }) = inquiry.as_ref() else { return };
        let complete = answered && known.iter().enumerate().all(|(rank, known)| known.is_some() || self.is_lost(rank));
        if self.fate.get().is_some() || !(complete || since.elapsed() > INQUIRY) {
            return;
        }
        let silent = |rank: usize| format!("rank {rank}: no answer");
        let lines = proposal.members.iter().enumerate().map(|(rank, member)| {
            known[*member].as_ref().map_or_else(
                || silent(rank),
                |known| known.line.clone().unwrap_or_else(|| format!("rank {rank}: has left")),
            )
        });
        let elsewhere = known.iter().flatten().flat_map(|known| known.elsewhere.iter().cloned());
        let mut error = with_log(proposal.error.clone(), CallLog::new(lines.chain(elsewhere)));
        if let (Error::Timeout { missing, .. }, Some(_)) = (&mut error, proposal.call)
            && missing.is_empty()
        {
            let absent = |member: &usize| known[*member].as_ref().is_none_or(|known| !known.in_call);
            let absent: Vec<String> = (0..proposal.members.len())
                .filter(|rank| absent(&proposal.members[*rank]))
                .map(|rank| rank.to_string())
                .collect();
            *missing = match absent.len() {
                0 => "nobody any more: the last one came as time ran out".into(),
                1 => format!("rank {}", absent[0]),
                _ => format!("ranks {}", absent.join(", ")),
            };
        }
        drop(inquiry);
        let mut fate = Writer::default();
        fate.byte(word::FATE).error(&error);
        self.tell_all(&fate.0);
    }

    /// The world has failed. The groups that this rank decides for are closed.
    fn accept(&self, error: Error) {
        if self.fate.set(error).is_err() {
            return;
        }
        for group in self.groups().iter().filter(|group| group.rank == 0) {
            let committed = {
                let mut decider = lock(&group.decider);
                decider.closed = true;
                decider.committed
            };
            let mut closed = Writer::default();
            closed.byte(word::CLOSED).number(group.id).number(committed);
            group.members[1..].iter().for_each(|member| self.tell(*member, &closed.0));
        }
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

    fn read_proposal(&self, reader: &mut Reader<'_>) -> Option<Proposal> {
        let proposal = Proposal {
            error: reader.error()?,
            group: reader.text()?.into(),
            members: reader.list(Reader::index)?,
            call: reader.list(Reader::call)?.pop(),
        };
        proposal.members.iter().all(|member| *member < self.wire.size()).then_some(proposal)
    }
}

fn write_proposal(writer: &mut Writer, proposal: &Proposal) {
    writer.error(&proposal.error).text(&proposal.group);
    writer.list(&proposal.members, |w, member| {
        w.number(*member as u64);
    });
    writer.list(proposal.call.as_slice(), |w, call| {
        w.call(call);
    });
}
