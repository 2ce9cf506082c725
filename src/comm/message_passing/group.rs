//! The state of one group in the process of one of its members.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::inbox::Inbox;
use super::shared_memory::SharedMemory;
use crate::comm::call_log::CallHistory;

/// The kind of a message of a group: each has a tag of its own.
#[derive(Debug, Clone, Copy)]
pub(super) enum MessageKind {
    /// A member's call, to the group root.
    Call,
    /// The group root's commit, with the calls of all.
    Commit,
    /// Contributions.
    Contributions,
    /// Results.
    Results,
    /// The header of a message between two ranks.
    Header,
    /// Its bytes.
    Payload,
    /// Control messages between the ranks of the world; of the first group only.
    Control,
}

/// Tags of a group.
const KIND_COUNT: u64 = 8;

/// A member that has left.
#[derive(Debug, Clone, Copy)]
pub(super) struct Left {
    pub rank: usize,
    /// Collectives that it has taken part in.
    pub collectives: u64,
    /// Messages that it has sent to this rank.
    pub messages: u64,
    pub panicked: bool,
}

/// What the group root has committed, see the [module](super).
#[derive(Debug, Default)]
pub(super) struct CommitState {
    /// Collectives that were committed.
    pub committed: u64,
    /// No further one will be committed.
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
    pub history: CallHistory,
    /// Used on rank 0 alone.
    pub commit_state: Mutex<CommitState>,
    /// On the other ranks, the number of collectives that were committed before rank 0 closed the group.
    pub closed: OnceLock<u64>,
    /// Collectives that this rank has completed.
    pub done: AtomicU64,
    pub left: Mutex<Vec<Left>>,
    /// Whether this rank has announced that it leaves.
    pub gone: AtomicBool,
    /// Messages sent to each member.
    pub sent: Mutex<Vec<u64>>,
    pub inboxes: Vec<Mutex<Inbox>>,
    /// Once all members have attached to it.
    pub shared_memory: OnceLock<SharedMemory>,
}

impl Group {
    pub fn new(id: u64, name: Arc<str>, members: Vec<usize>, rank: usize) -> Arc<Self> {
        let size = members.len();
        Arc::new(Self {
            id,
            name,
            members,
            rank,
            history: CallHistory::new(size),
            commit_state: Mutex::default(),
            closed: OnceLock::new(),
            done: AtomicU64::new(0),
            left: Mutex::default(),
            gone: AtomicBool::new(false),
            sent: Mutex::new(vec![0; size]),
            inboxes: (0..size).map(|_| Mutex::default()).collect(),
            shared_memory: OnceLock::new(),
        })
    }

    pub fn size(&self) -> usize {
        self.members.len()
    }

    pub fn tag(&self, kind: MessageKind) -> u64 {
        Self::tag_of(self.id, kind)
    }

    pub fn tag_of(id: u64, kind: MessageKind) -> u64 {
        id * KIND_COUNT + kind as u64
    }

    /// The most groups that so many tags are enough for.
    pub fn most(tags: u64) -> u64 {
        tags / KIND_COUNT
    }

    /// Whether this rank has left already; it has from now on.
    pub fn leaves(&self) -> bool {
        self.gone.swap(true, Ordering::AcqRel)
    }
}
