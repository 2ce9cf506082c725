//! The state that the ranks of a group share.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use super::barrier::Barrier;
use super::mailbox::Mailboxes;
use crate::Error;
use crate::comm::backoff::Backoff;
use crate::comm::call_log::CallHistory;
use crate::comm::transport::BufferMut;
use crate::comm::{Call, CallLog};
use crate::lock::lock;

/// What a rank publishes for the others in a collective: its call and its buffers.
///
/// All of it is on one cache line, and a peer of the most frequent calls, those with one buffer in place, needs nothing
/// else: following a pointer here would wait for another core's cache once more.
#[derive(Clone, Copy)]
pub(super) struct CallDescriptor {
    call: NonNull<Call>,
    /// [`Call::digest`] of a call with one buffer in place, else 0.
    digest: u64,
    /// The one buffer in place and its length.
    data: *mut u8,
    elements: usize,
    /// The in-place buffers, `call.buffers` of them, or null.
    buffers: *const BufferMut<'static>,
    /// The input of a collective that is not in place, or null.
    pub input: *const u8,
}

impl CallDescriptor {
    /// Without a buffer.
    pub fn nothing(call: &Call) -> Self {
        let (data, buffers, input) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
        Self { call: call.into(), digest: 0, data, elements: 0, buffers, input }
    }

    /// With an input that is only read.
    pub fn input(call: &Call, input: *const u8) -> Self {
        Self { input, ..Self::nothing(call) }
    }

    /// With buffers to work on in place.
    pub fn in_place(call: &Call, buffers: &mut [BufferMut<'_>]) -> Self {
        let mut descriptor = Self { buffers: buffers.as_ptr().cast(), ..Self::nothing(call) };
        if let [buffer] = buffers {
            descriptor.digest = call.digest();
            (descriptor.data, descriptor.elements) = (buffer.data, buffer.elements);
        }
        descriptor
    }

    /// The call, for no longer than the barrier lasts.
    pub fn call<'barrier>(&self) -> &'barrier Call {
        // SAFETY: the call outlives the barrier that it is published for, and descriptors are read only there.
        unsafe { self.call.as_ref() }
    }

    /// Whether both have one buffer in place of equal dtype and length, and equal calls. If not, they may still match.
    pub fn equals(&self, other: &Self) -> bool {
        self.digest != 0 && self.digest == other.digest && self.elements == other.elements
    }

    /// The address of an in-place buffer; `buffers` is how many the ranks have agreed on.
    pub fn place(&self, buffer: usize, buffers: usize) -> *mut u8 {
        match buffers {
            1 => self.data,
            _ => self.buffers()[buffer].data,
        }
    }

    /// The in-place buffers, for no longer than the barrier lasts; none where the data is on a device.
    pub fn buffers<'barrier>(&self) -> &'barrier [BufferMut<'static>] {
        if self.buffers.is_null() {
            return &[];
        }
        // SAFETY: the descriptor of an in-place collective points to as many buffers as its call says, and its
        // owner waits.
        unsafe { std::slice::from_raw_parts(self.buffers, self.call().buffers) }
    }
}

// SAFETY: the pointers are followed only inside a barrier, while their owner waits for all to depart.
unsafe impl Send for CallDescriptor {}

/// The failure of a world: the first error, and all groups that it ends.
#[derive(Debug)]
pub(super) struct WorldFailure {
    error: OnceLock<Error>,
    groups: Mutex<Vec<Weak<Group>>>,
    /// What each rank of the world holds.
    holders: Box<[Holder]>,
}

/// What a rank holds of its world. Peers do not hear at once of a group that it has dropped: it may be on its way out
/// with an error, and drops what it holds before its launcher can say why. They hear of it when the rank goes on, or
/// holds nothing more.
#[derive(Debug, Default)]
struct Holder {
    /// Whether peers are to hear of any group.
    dropped: CachePadded<AtomicBool>,
    held: Mutex<HeldTransports>,
}

#[derive(Debug, Default)]
struct HeldTransports {
    transports: usize,
    /// Groups that peers are to hear of: the rank there, and whether it was in a panic.
    dropped: Vec<(Weak<Group>, usize, bool)>,
}

impl WorldFailure {
    pub fn new(size: usize) -> Self {
        let holders = (0..size).map(|_| Holder::default()).collect();
        Self { error: OnceLock::new(), groups: Mutex::default(), holders }
    }

    /// A rank of the world holds one more transport.
    pub fn holds(&self, world_rank: usize) {
        lock(&self.holders[world_rank].held).transports += 1;
    }

    /// A rank of the world has dropped its transport of a group.
    pub fn drops(&self, world_rank: usize, group: &Arc<Group>, rank: usize, panicked: bool) {
        let holder = &self.holders[world_rank];
        let last = {
            let mut held = lock(&holder.held);
            held.transports -= 1;
            held.dropped.push((Arc::downgrade(group), rank, panicked));
            held.transports == 0
        };
        holder.dropped.store(true, Ordering::Release);
        if last {
            self.goes_on(world_rank);
        }
    }

    /// A rank of the world calls something, or has ended: what it has dropped before it does without.
    pub fn goes_on(&self, world_rank: usize) {
        let holder = &self.holders[world_rank];
        if holder.dropped.load(Ordering::Acquire) {
            let dropped = {
                let mut held = lock(&holder.held);
                holder.dropped.store(false, Ordering::Release);
                std::mem::take(&mut held.dropped)
            };
            for (group, rank, panicked) in dropped {
                group.upgrade().into_iter().for_each(|group| group.leave(rank, panicked));
            }
        }
    }

    pub fn error(&self) -> Option<&Error> {
        self.error.get()
    }

    /// Fails all groups of the world. The first error stays.
    pub fn fail(&self, error: Error) {
        // Set under the lock, so that a group that is being added sees either the error or this loop.
        let groups = lock(&self.groups);
        let _ = self.error.set(error);
        for group in groups.iter().filter_map(Weak::upgrade) {
            group.barrier.abort();
        }
    }

    /// The groups of the world that somebody holds.
    pub fn groups(&self) -> Vec<Arc<Group>> {
        lock(&self.groups).iter().filter_map(Weak::upgrade).collect()
    }

    /// The members of a group that have dropped it, and gone on without a call since, with whether they were in a
    /// panic.
    pub fn dropped_by(&self, group: &Group) -> Vec<(usize, bool)> {
        let of = |member: &usize| {
            let held = lock(&self.holders[*member].held);
            let mut found = held.dropped.iter().filter(|(dropped, ..)| std::ptr::eq(dropped.as_ptr(), group));
            found.next().map(|(_, rank, panicked)| (*rank, *panicked))
        };
        group.members.iter().filter_map(of).collect()
    }

    /// Takes a rank of the world out of all groups.
    pub fn leave(&self, world_rank: usize) {
        self.goes_on(world_rank);
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
            group.barrier.abort();
        }
    }
}

/// A group that some ranks of a [`Group`] are being split into; kept until the last of them has fetched it.
pub(super) struct SplitGroup {
    pub group: Arc<Group>,
    pub fetched: usize,
}

pub(super) struct Group {
    pub name: Arc<str>,
    /// World ranks of the members.
    pub members: Vec<usize>,
    pub barrier: Barrier<CallDescriptor>,
    pub mailboxes: Mailboxes,
    pub history: CallHistory,
    pub world_failure: Arc<WorldFailure>,
    pub timeout: Duration,
    pub backoff: Backoff,
    /// Ranks that left, and whether they did so in a panic.
    pub left: Mutex<Vec<(usize, bool)>>,
    #[cfg(feature = "cubecl")]
    pub device_exchange: super::device::DeviceExchange,
    /// Splits that have not been fetched by all, by collective and color.
    pub splits: Mutex<HashMap<(u64, u64), SplitGroup>>,
    pub out_of_memory: OutOfMemoryReport,
}

/// Reports of ranks without memory for the result of a collective. A rank reports before it departs from the barrier,
/// and reads the report once all have: so all ranks see the same.
#[derive(Debug, Default)]
pub(super) struct OutOfMemoryReport {
    /// The last collective with a report, counted from 1.
    sequence: AtomicU64,
    /// The rank that has reported, and its error.
    said: Mutex<Option<(usize, Error)>>,
}

impl OutOfMemoryReport {
    pub fn report(&self, sequence: u64, rank: usize, error: &Error) {
        let mut said = lock(&self.said);
        let first = self.sequence.swap(sequence + 1, Ordering::Relaxed) != sequence + 1;
        // The lowest rank, whoever reports first.
        if first || said.as_ref().is_none_or(|(other, _)| rank < *other) {
            *said = Some((rank, error.clone()));
        }
    }

    /// To be called after a collective, and before the next.
    pub fn reported(&self, sequence: u64) -> Option<Error> {
        (self.sequence.load(Ordering::Relaxed) == sequence + 1)
            .then(|| lock(&self.said).clone())?
            .map(|(_, error)| error)
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
        world_failure: Arc<WorldFailure>,
        timeout: Duration,
        backoff: Backoff,
    ) -> Arc<Self> {
        let size = members.len();
        let group = Arc::new(Self {
            name,
            members,
            barrier: Barrier::new(size),
            mailboxes: Mailboxes::new(size),
            history: CallHistory::new(size),
            world_failure,
            timeout,
            backoff,
            left: Mutex::default(),
            #[cfg(feature = "cubecl")]
            device_exchange: super::device::DeviceExchange::default(),
            splits: Mutex::default(),
            out_of_memory: OutOfMemoryReport::default(),
        });
        group.world_failure.add(&group);
        group
    }

    /// Records that a rank will take part in nothing more.
    pub fn leave(&self, rank: usize, panicked: bool) {
        lock(&self.left).push((rank, panicked));
        self.barrier.leave();
    }

    /// The last collectives of every rank of the group, and of the ranks that wait in other groups of the world: a
    /// failure is theirs as well.
    pub fn log(&self) -> CallLog {
        let others = self.world_failure.groups();
        let others = others.iter().filter(|other| !std::ptr::eq(&***other, self));
        let elsewhere =
            others.flat_map(|other| other.history.waiting().map(|line| format!("in `{}` {line}", other.name)));
        CallLog::new(self.history.lines().chain(elsewhere))
    }

    pub fn size(&self) -> usize {
        self.members.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::barrier::Interrupted;
    use super::*;

    /// A split may have been committed when the world fails: nobody waits in the new group.
    #[test]
    fn a_group_that_is_made_after_the_end_has_ended() {
        let world_failure = Arc::new(WorldFailure::new(2));
        let new =
            || Group::new("part".into(), vec![0, 1], world_failure.clone(), Duration::from_secs(1), Backoff::SLEEP);
        let before = new();
        assert_eq!(before.barrier.interruption(), None);
        world_failure.fail(Error::user("the disk is full"));
        assert_eq!(before.barrier.interruption(), Some(Interrupted::Aborted));
        assert_eq!(new().barrier.interruption(), Some(Interrupted::Aborted));
    }
}
