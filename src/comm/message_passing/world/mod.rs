//! The state of a world in one process: its groups, its failure, and the control messages.

mod control_message;
mod failure;
#[cfg(fuzzing)]
pub(super) mod fuzzing;
mod watchdog;

use std::any::Any;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use self::control_message::ControlMessage;
pub(super) use self::control_message::Proposal;
use self::failure::Inquiry;
use super::endpoint::{Endpoint, Request};
use super::group::{Group, Left, MessageKind};
use crate::Error;
use crate::lock::lock;

/// The least time for a phase of a failure: machines are busy.
const MIN_PHASE: Duration = Duration::from_millis(400);
/// A thread that has not run for this long was stopped.
const ABSENCE: Duration = Duration::from_secs(1);
/// Groups remembered after they were left.
const MAX_LEFT_GROUPS: usize = 32;

/// A group that this rank has left: name, members and its last calls.
type LeftGroup = (Arc<str>, Vec<usize>, String);

/// A buffer that is being sent or received, kept until that is done.
struct PendingTransfer {
    requests: Vec<Request>,
    buffer: Option<Box<dyn Any + Send>>,
}

impl Drop for PendingTransfer {
    fn drop(&mut self) {
        if !self.requests.is_empty() {
            // The endpoint may still read or write there.
            std::mem::forget(self.buffer.take());
        }
    }
}

pub(in crate::comm) struct World {
    pub endpoint: Box<dyn Endpoint>,
    pub timeout: Duration,
    pub name: Arc<str>,
    failure: OnceLock<Error>,
    groups: Mutex<Vec<Weak<Group>>>,
    /// Groups that this rank has left, for the reports on later failures.
    left_groups: Mutex<VecDeque<LeftGroup>>,
    /// Groups that this rank has dropped, and whether it was in a panic: the others hear of them when it goes on, or
    /// ends (see [`departed`](crate::comm::departed)).
    dropped: Mutex<Vec<(Arc<Group>, bool)>>,
    /// Whether there are any.
    has_dropped: AtomicBool,
    /// Members that have left groups which this rank is still to make.
    early_leaves: Mutex<Vec<(u64, Left)>>,
    next_group: AtomicU64,
    transfers: Mutex<Vec<PendingTransfer>>,
    /// Control messages of this rank to itself.
    loopback: Mutex<VecDeque<Vec<u8>>>,
    /// When control messages were last handled.
    polling: Mutex<Option<Instant>>,
    inquiry: Mutex<Option<Inquiry>>,
    /// The coordinator of the last query, and its time.
    last_query: Mutex<Option<(usize, Instant)>>,
    /// The error that this rank has proposed, and when.
    proposed: Mutex<Option<(Proposal, Instant)>>,
    /// For how long this process did not run, the longest time of late, and until when.
    absence: Mutex<Option<(Duration, Instant)>>,
    /// Ranks that hold nothing of this world any more.
    finished: Mutex<Vec<bool>>,
    /// Ranks that cannot be reached any more: they went without a message, or have ended.
    lost: Vec<AtomicBool>,
    /// Ranks that were the coordinator of a failure and did not answer.
    unresponsive: Vec<AtomicBool>,
    /// The group of the last call.
    pub last_group: AtomicU64,
    end_announced: AtomicBool,
    /// Whether the machine has fewer cores than ranks.
    pub oversubscribed: bool,
    /// Threads that wait, and so poll the control messages.
    pub waiting: AtomicUsize,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("rank", &self.endpoint.rank())
            .field("size", &self.endpoint.size())
            .finish_non_exhaustive()
    }
}

/// A rank's membership of a world: it ends when nobody holds it any more.
#[derive(Debug)]
pub(super) struct Membership(pub Arc<World>);

impl Drop for Membership {
    fn drop(&mut self) {
        self.0.announce_end();
    }
}

impl World {
    pub fn new(endpoint: Box<dyn Endpoint>, timeout: Duration, name: Arc<str>, oversubscribed: bool) -> Arc<Self> {
        let finished = Mutex::new(vec![false; endpoint.size()]);
        let none = || (0..endpoint.size()).map(|_| AtomicBool::new(false)).collect();
        let (lost, unresponsive) = (none(), none());
        Arc::new(Self {
            endpoint,
            timeout,
            name,
            oversubscribed,
            failure: OnceLock::new(),
            groups: Mutex::default(),
            left_groups: Mutex::default(),
            dropped: Mutex::default(),
            has_dropped: AtomicBool::new(false),
            early_leaves: Mutex::default(),
            next_group: AtomicU64::new(1),
            transfers: Mutex::default(),
            loopback: Mutex::default(),
            polling: Mutex::default(),
            inquiry: Mutex::default(),
            last_query: Mutex::default(),
            proposed: Mutex::default(),
            absence: Mutex::default(),
            finished,
            lost,
            unresponsive,
            last_group: AtomicU64::new(0),
            end_announced: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        })
    }

    /// The time since then, by the clock of the endpoint.
    pub fn elapsed(&self, since: Instant) -> Duration {
        self.endpoint.now().saturating_duration_since(since)
    }

    pub fn failure(&self) -> Option<&Error> {
        self.failure.get()
    }

    /// Whether a thread that polls did not run for so long that this process was stopped. Remembers it.
    pub fn was_absent(&self, absence: Duration) -> bool {
        if absence <= self.phase_limit(ABSENCE) {
            return false;
        }
        let (now, mut known) = (self.endpoint.now(), lock(&self.absence));
        if known
            .is_none_or(|(longest, until)| absence >= longest || now.saturating_duration_since(until) > self.timeout)
        {
            *known = Some((absence, now));
        }
        true
    }

    /// For how long this process did not run, if it was so long, and so lately, that those who waited for it have given
    /// it up.
    fn given_up(&self) -> Option<Duration> {
        let (absence, until) = (*lock(&self.absence))?;
        (absence > self.timeout.max(ABSENCE) && self.elapsed(until) <= self.timeout.saturating_mul(2))
            .then_some(absence)
    }

    /// The limit for a phase of a failure: all phases together are to be over within half the time-out.
    pub fn phase_limit(&self, most: Duration) -> Duration {
        most.min((self.timeout / 10).max(MIN_PHASE))
    }

    /// Whether a rank cannot be reached any more.
    pub fn is_lost(&self, rank: usize) -> bool {
        self.lost[rank].load(Ordering::Acquire)
    }

    /// The coordinator: the first rank that is reachable and answers, as far as this rank knows.
    fn coordinator(&self) -> usize {
        let answers = |rank: &usize| !self.is_lost(*rank) && !self.unresponsive[*rank].load(Ordering::Acquire);
        (0..self.lost.len()).find(answers).unwrap_or(self.endpoint.rank())
    }

    /// A number for a new group: no other group of a rank that is in it has the same.
    pub fn new_group_id(&self) -> Result<u64, Error> {
        let id =
            self.next_group.fetch_add(1, Ordering::Relaxed) * self.endpoint.size() as u64 + self.endpoint.rank() as u64;
        match id < Group::most(self.endpoint.info().tags) {
            true => Ok(id),
            false => {
                let problem = format!("{id} groups are more than there are tags for; split less often");
                Err(Error::Transport { transport: self.endpoint.name(), problem })
            }
        }
    }

    pub(in crate::comm::message_passing) fn add(&self, group: &Arc<Group>) {
        let mut groups = lock(&self.groups);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(Arc::downgrade(group));
        lock(&self.early_leaves).retain(|(id, left)| {
            let belongs = *id == group.id;
            if belongs {
                lock(&group.left).push(*left);
            }
            !belongs
        });
    }

    pub(in crate::comm::message_passing) fn groups(&self) -> Vec<Arc<Group>> {
        lock(&self.groups).iter().filter_map(Weak::upgrade).collect()
    }

    /// Keeps `buffer` until the requests are done.
    pub(in crate::comm::message_passing) fn keep(&self, requests: Vec<Request>, buffer: impl Any + Send) {
        if !requests.is_empty() {
            lock(&self.transfers).push(PendingTransfer { requests, buffer: Some(Box::new(buffer)) });
        }
    }

    /// Cancels receives into `buffer`, which is kept for as long as the endpoint may still write there.
    pub fn cancel_receives(&self, mut requests: Vec<Request>, buffer: impl Any + Send) {
        self.endpoint.cancel(&mut requests);
        self.keep(requests, buffer);
    }

    /// Sends a control message to one rank.
    fn send_control(&self, to: usize, message: &ControlMessage) {
        let bytes = message.write();
        if to == self.endpoint.rank() {
            return lock(&self.loopback).push_back(bytes);
        }
        let mut requests = Vec::new();
        // SAFETY: the bytes are on the heap, and kept until they are sent.
        let sent =
            unsafe { self.endpoint.send_control(to, Group::tag_of(0, MessageKind::Control), &bytes, &mut requests) };
        if let Err(problem) = sent {
            log::error!("rank {} cannot send a control message to rank {to}: {problem}", self.endpoint.rank());
        }
        self.keep(requests, bytes);
    }

    fn broadcast_control(&self, message: &ControlMessage) {
        (0..self.endpoint.size()).for_each(|to| self.send_control(to, message));
    }

    /// This rank has dropped a group.
    pub(in crate::comm::message_passing) fn drops(&self, group: Arc<Group>, panicked: bool) {
        lock(&self.dropped).push((group, panicked));
        self.has_dropped.store(true, Ordering::Release);
    }

    /// Before each call, and at the end: tells the others of the groups that this rank has dropped.
    pub(in crate::comm::message_passing) fn goes_on(&self) {
        if self.has_dropped.load(Ordering::Acquire) {
            let dropped = {
                let mut dropped = lock(&self.dropped);
                self.has_dropped.store(false, Ordering::Release);
                std::mem::take(&mut *dropped)
            };
            dropped.iter().for_each(|(group, panicked)| self.leave(group, *panicked));
        }
    }

    /// Tells the others of a group that this rank has left it.
    fn leave(&self, group: &Group, panicked: bool) {
        if group.leaves() {
            return;
        }
        {
            let mut left_groups = lock(&self.left_groups);
            left_groups.truncate(MAX_LEFT_GROUPS - 1);
            left_groups.push_front((group.name.clone(), group.members.clone(), group.history.line(group.rank)));
        }
        let sent = lock(&group.sent).clone();
        for (other, to) in group.members.iter().enumerate().filter(|(other, _)| *other != group.rank) {
            let left = Left {
                rank: group.rank,
                collectives: group.done.load(Ordering::Acquire),
                messages: sent[other],
                panicked,
            };
            self.send_control(*to, &ControlMessage::Left { group: group.id, left });
        }
    }

    /// Reclaims buffers from the endpoint. If the endpoint cannot give them back, all processes are killed.
    pub(in crate::comm::message_passing) fn reclaim(&self, requests: &mut Vec<Request>, why: impl FnOnce() -> Error) {
        if requests.is_empty() {
            return;
        }
        if !self.endpoint.info().can_reclaim {
            eprintln!("{}", why());
            self.endpoint.abort();
        }
        self.endpoint.reclaim(requests);
    }
}
