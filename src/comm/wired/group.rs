//! One group, as its member in this process knows it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::board::Board;
use super::mail::Incoming;
use crate::comm::watch::Watch;

/// What a message of a group is for: each kind has a tag of its own.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// A member's call, to the decider.
    Call,
    /// The decider's word.
    Verdict,
    /// Contributions.
    Parts,
    /// Results.
    Results,
    /// What a message between two ranks is.
    Header,
    /// Its bytes.
    Payload,
    /// What the worlds' wardens tell each other; of the first group only.
    Control,
}

/// Tags of a group.
const KINDS: u64 = 8;

/// A member that will not come again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Left {
    pub rank: usize,
    /// Collectives that it has taken part in.
    pub collectives: u64,
    /// Messages that it has sent to this rank.
    pub messages: u64,
    pub panicked: bool,
}

/// The word of the decider, see the [module](super).
#[derive(Debug, Default)]
pub(super) struct Decider {
    /// Collectives that all ranks have come to.
    pub committed: u64,
    /// No further one will be.
    pub closed: bool,
}

#[derive(Debug)]
pub(super) struct Group {
    /// The same on all members, and of no other group that one of them is in.
    pub id: u64,
    pub name: Arc<str>,
    /// World ranks of the members.
    pub members: Vec<usize>,
    pub rank: usize,
    pub watch: Watch,
    /// Of use on rank 0 alone.
    pub decider: Mutex<Decider>,
    /// On the other ranks, the number of collectives that were committed before rank 0 closed the group.
    pub closed: OnceLock<u64>,
    /// Collectives that this rank has been through.
    pub done: AtomicU64,
    pub left: Mutex<Vec<Left>>,
    /// Whether this rank has said that it leaves.
    pub gone: AtomicBool,
    /// Messages sent to each member.
    pub sent: Mutex<Vec<u64>>,
    pub inboxes: Vec<Mutex<Inbox>>,
    /// Once all members have reached it.
    pub board: OnceLock<Board>,
}

/// What one member has sent.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    pub waiting: VecDeque<Incoming>,
    /// Messages that have come so far.
    pub came: u64,
    /// A message over the wire that comes after letters which are still to be found on the board.
    pub ahead: Option<Vec<u8>>,
}

impl Group {
    pub fn new(id: u64, name: Arc<str>, members: Vec<usize>, rank: usize) -> Arc<Self> {
        let size = members.len();
        Arc::new(Self {
            id,
            name,
            members,
            rank,
            watch: Watch::new(size),
            decider: Mutex::default(),
            closed: OnceLock::new(),
            done: AtomicU64::new(0),
            left: Mutex::default(),
            gone: AtomicBool::new(false),
            sent: Mutex::new(vec![0; size]),
            inboxes: (0..size).map(|_| Mutex::default()).collect(),
            board: OnceLock::new(),
        })
    }

    pub fn size(&self) -> usize {
        self.members.len()
    }

    pub fn tag(&self, kind: Kind) -> u64 {
        Self::tag_of(self.id, kind)
    }

    pub fn tag_of(id: u64, kind: Kind) -> u64 {
        id * KINDS + kind as u64
    }

    /// Groups that so many tags are enough for.
    pub fn most(tags: u64) -> u64 {
        tags / KINDS
    }

    /// Whether this rank has left already; it has from now on.
    pub fn leaves(&self) -> bool {
        self.gone.swap(true, Ordering::AcqRel)
    }
}

pub(in crate::comm) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
