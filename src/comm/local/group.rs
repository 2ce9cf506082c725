//! What the ranks of a group share, and the fate that all groups of a world share.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use super::bell::Patience;
use super::mailbox::Mailboxes;
use super::rendezvous::Rendezvous;
use crate::Error;
use crate::comm::transport::BufferMut;
use crate::comm::watch::Watch;
use crate::comm::{Call, CallLog};

/// What a rank lays out for the others in a meeting.
///
/// All of it is on one cache line, and a peer of the most frequent calls, those with one buffer in place, needs nothing
/// else: to follow a pointer here is to wait once more for another core's cache.
#[derive(Clone, Copy)]
pub(super) struct Post {
    call: NonNull<Call>,
    /// [`Call::digest`] of a call with one buffer in place, else 0.
    digest: u64,
    /// The one buffer in place and its length.
    data: *mut u8,
    elements: usize,
    /// The in-place buffers, `call.pieces` of them, or null.
    buffers: *const BufferMut<'static>,
    /// The input of a collective that is not in place, or null.
    pub input: *const u8,
}

impl Post {
    /// Brings nothing.
    pub fn nothing(call: &Call) -> Self {
        let (data, buffers, input) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
        Self { call: call.into(), digest: 0, data, elements: 0, buffers, input }
    }

    /// Brings an input that is only read.
    pub fn input(call: &Call, input: *const u8) -> Self {
        Self { input, ..Self::nothing(call) }
    }

    /// Brings buffers to be worked on in place.
    pub fn in_place(call: &Call, buffers: &mut [BufferMut<'_>]) -> Self {
        let mut post = Self { buffers: buffers.as_ptr().cast(), ..Self::nothing(call) };
        if let [buffer] = buffers {
            post.digest = call.digest();
            (post.data, post.elements) = (buffer.data, buffer.elements);
        }
        post
    }

    /// The call, for no longer than the meeting lasts.
    pub fn call<'meeting>(&self) -> &'meeting Call {
        // SAFETY: the call outlives the meeting it is posted for, and posts are read only there.
        unsafe { self.call.as_ref() }
    }

    /// Whether both bring one buffer in place of equal dtype and length, to equal calls. If not, they may agree still.
    pub fn equals(&self, other: &Self) -> bool {
        self.digest != 0 && self.digest == other.digest && self.elements == other.elements
    }

    /// The place of an in-place buffer; `pieces` is how many the ranks have agreed on.
    pub fn place(&self, piece: usize, pieces: usize) -> *mut u8 {
        match pieces {
            1 => self.data,
            _ => self.buffers()[piece].data,
        }
    }

    /// The in-place buffers, for no longer than the meeting lasts; none where they stay on their device.
    pub fn buffers<'meeting>(&self) -> &'meeting [BufferMut<'static>] {
        if self.buffers.is_null() {
            return &[];
        }
        // SAFETY: a post of an in-place collective points to as many buffers as its call has pieces, and its owner waits.
        unsafe { std::slice::from_raw_parts(self.buffers, self.call().pieces) }
    }
}

// SAFETY: the places are followed only inside a meeting, while their owner waits for all to depart.
unsafe impl Send for Post {}

/// The end of a world: the first error, and all groups that must hear of it.
#[derive(Debug, Default)]
pub(super) struct Fate {
    error: OnceLock<Error>,
    groups: Mutex<Vec<Weak<Group>>>,
}

impl Fate {
    pub fn error(&self) -> Option<&Error> {
        self.error.get()
    }

    /// Fails all groups of the world. The first error stays.
    pub fn fail(&self, error: Error) {
        // Set under the lock, so that a group that is being added sees either the error or this loop.
        let groups = lock(&self.groups);
        let _ = self.error.set(error);
        for group in groups.iter().filter_map(Weak::upgrade) {
            group.rendezvous.abort();
        }
    }

    /// The groups of the world that somebody holds.
    pub fn groups(&self) -> Vec<Arc<Group>> {
        lock(&self.groups).iter().filter_map(Weak::upgrade).collect()
    }

    /// Takes a rank of the world out of all groups.
    pub fn leave(&self, world_rank: usize) {
        for group in lock(&self.groups).iter().filter_map(Weak::upgrade) {
            if let Some(rank) = group.members.iter().position(|member| *member == world_rank) {
                group.leave(rank, false);
            }
        }
    }

    pub fn add(&self, group: &Arc<Group>) {
        let mut groups = lock(&self.groups);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(Arc::downgrade(group));
        if self.error.get().is_some() {
            group.rendezvous.abort();
        }
    }
}

/// A group that some ranks of a [`Group`] are being split into; kept until the last of them has fetched it.
pub(super) struct Half {
    pub group: Arc<Group>,
    pub fetched: usize,
}

pub(super) struct Group {
    pub name: Arc<str>,
    /// World ranks of the members.
    pub members: Vec<usize>,
    pub rendezvous: Rendezvous<Post>,
    pub mail: Mailboxes,
    pub watch: Watch,
    pub fate: Arc<Fate>,
    pub timeout: Duration,
    pub patience: Patience,
    /// Ranks that left, and whether they did so in a panic.
    pub left: Mutex<Vec<(usize, bool)>>,
    #[cfg(feature = "cubecl")]
    pub board: super::device::Board,
    /// Splits in the making, by meeting and color.
    pub halves: Mutex<HashMap<(u64, u64), Half>>,
    pub shortage: Shortage,
}

/// What ranks have said in a meeting of having no memory for its results. It is said before they depart, and heard once all
/// have: so all ranks hear the same.
#[derive(Debug, Default)]
pub(super) struct Shortage {
    /// The last meeting of which something was said, counted from 1.
    meeting: AtomicU64,
    /// Who has said it, and what.
    said: Mutex<Option<(usize, Error)>>,
}

impl Shortage {
    pub fn say(&self, meeting: u64, rank: usize, error: &Error) {
        let mut said = lock(&self.said);
        let first = self.meeting.swap(meeting + 1, Ordering::Relaxed) != meeting + 1;
        // One that all can name, whoever comes first.
        if first || said.as_ref().is_none_or(|(other, _)| rank < *other) {
            *said = Some((rank, error.clone()));
        }
    }

    /// To be called after a meeting, and before the next.
    pub fn hear(&self, meeting: u64) -> Option<Error> {
        (self.meeting.load(Ordering::Relaxed) == meeting + 1).then(|| lock(&self.said).clone())?.map(|(_, error)| error)
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("name", &self.name).field("members", &self.members).finish_non_exhaustive()
    }
}

impl Group {
    pub fn new(
        name: Arc<str>,
        members: Vec<usize>,
        fate: Arc<Fate>,
        timeout: Duration,
        patience: Patience,
    ) -> Arc<Self> {
        let size = members.len();
        let group = Arc::new(Self {
            name,
            members,
            rendezvous: Rendezvous::new(size),
            mail: Mailboxes::new(size),
            watch: Watch::new(size),
            fate,
            timeout,
            patience,
            left: Mutex::default(),
            #[cfg(feature = "cubecl")]
            board: super::device::Board::default(),
            halves: Mutex::default(),
            shortage: Shortage::default(),
        });
        group.fate.add(&group);
        group
    }

    /// Takes note that a rank will not come again.
    pub fn leave(&self, rank: usize, panicked: bool) {
        lock(&self.left).push((rank, panicked));
        self.rendezvous.leave();
    }

    /// The last collectives of every rank of the group, and of the ranks that wait in other groups of the world: a failure
    /// is theirs as well.
    pub fn log(&self) -> CallLog {
        let others = self.fate.groups();
        let others = others.iter().filter(|other| !std::ptr::eq(&***other, self));
        let elsewhere =
            others.flat_map(|other| other.watch.waiting().map(|line| format!("in `{}` {line}", other.name)));
        CallLog::new(self.watch.lines().chain(elsewhere))
    }

    pub fn size(&self) -> usize {
        self.members.len()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::super::rendezvous::Interrupted;
    use super::*;

    /// A split may have been agreed on when the world fails: nobody waits in the group that comes of it.
    #[test]
    fn a_group_that_is_made_after_the_end_has_ended() {
        let fate = Arc::new(Fate::default());
        let new = || {
            let patience = Patience { spins: 0, yields: 0 };
            Group::new("part".into(), vec![0, 1], fate.clone(), Duration::from_secs(1), patience)
        };
        let before = new();
        assert_eq!(before.rendezvous.interruption(), None);
        fate.fail(Error::user("the disk is full"));
        assert_eq!(before.rendezvous.interruption(), Some(Interrupted::Aborted));
        assert_eq!(new().rendezvous.interruption(), Some(Interrupted::Aborted));
    }
}
