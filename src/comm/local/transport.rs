//! The `Transport` between threads.

#[cfg(feature = "cubecl")]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use super::barrier::Interrupted;
use super::call_timer::CallTimer;
use super::collectives;
use super::group::{CallDescriptor, Group, SplitGroup};
use crate::Error;
use crate::comm::backoff::Backoff;
use crate::comm::transport::check_rank;
use crate::comm::{Arrival, Call, CallLog, CallShape, Message, Operation, Transfer, Transport};
use crate::lock::lock;

/// One rank's member of a group of threads.
#[derive(Debug)]
pub(super) struct LocalTransport {
    pub(super) group: Arc<Group>,
    pub(super) rank: usize,
    /// Number of the next collective. Locked during a collective: a rank does one at a time. Transports of several
    /// ranks are allocated side by side, so this has its cache lines to itself.
    sequence: CachePadded<Mutex<u64>>,
    panicked: AtomicBool,
    /// Number of the next exchange of device data.
    #[cfg(feature = "cubecl")]
    exchange: AtomicU64,
}

impl LocalTransport {
    pub fn new(group: Arc<Group>, rank: usize) -> Arc<Self> {
        group.world_failure.holds(group.members[rank]);
        Arc::new(Self {
            group,
            rank,
            sequence: CachePadded::new(Mutex::new(0)),
            panicked: AtomicBool::new(false),
            #[cfg(feature = "cubecl")]
            exchange: AtomicU64::new(0),
        })
    }

    #[cfg(feature = "cubecl")]
    pub(super) fn device_exchange(&self) -> &super::device::DeviceExchange {
        &self.group.device_exchange
    }

    /// A rank does one collective at a time, so all ranks count alike.
    #[cfg(feature = "cubecl")]
    pub(super) fn next_exchange(&self) -> u64 {
        self.exchange.fetch_add(1, Ordering::Relaxed)
    }

    /// Before each call: the world has not failed, and the others hear of what this rank has dropped.
    fn goes_on(&self) -> Result<(), Error> {
        self.has_not_failed()?;
        self.group.world_failure.goes_on(self.group.members[self.rank]);
        Ok(())
    }

    fn has_not_failed(&self) -> Result<(), Error> {
        self.group.world_failure.error().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Synchronizes with the others, checks that all call the same, and runs `work`, which returns the bytes it moved.
    fn synchronize<R>(
        &self,
        descriptor: CallDescriptor,
        work: impl FnOnce(&collectives::Descriptors<'_>) -> R,
    ) -> Result<(u64, R), Error> {
        self.synchronize_numbered(descriptor, |_, descriptors| work(descriptors))
    }

    /// [`synchronize`](Self::synchronize) for work that takes the number of the collective.
    fn synchronize_numbered<R>(
        &self,
        descriptor: CallDescriptor,
        work: impl FnOnce(u64, &collectives::Descriptors<'_>) -> R,
    ) -> Result<(u64, R), Error> {
        let group = &*self.group;
        let mut next = lock(&self.sequence);
        self.goes_on()?;
        let call = descriptor.call();
        let mut call_timer = CallTimer::new(group, self.rank, call);
        // Counted before: should the work panic, the collective has taken place all the same.
        let sequence = *next;
        *next += 1;
        let work = |descriptors: &collectives::Descriptors<'_>| match agree(&descriptor, descriptors) {
            true => Ok(work(sequence, descriptors)),
            false => Err(descriptors.iter().map(|other| *other.call()).collect::<Vec<_>>()),
        };
        // SAFETY: the number is locked, and counts this rank's collectives.
        let outcome = unsafe {
            group.barrier.enter(self.rank, sequence, descriptor, backoff(group), || call_timer.remaining(), work)
        };
        match outcome {
            Ok(Ok(result)) => {
                call_timer.finish();
                Ok((sequence, result))
            }
            Ok(Err(calls)) => {
                let (name, log) = (group.name.clone(), group.log());
                Err(self.fail(Error::Mismatch { group: name, sequence, calls, log }))
            }
            Err(why) => Err(self.interrupted(why, call, call_timer.elapsed(), || self.missing_ranks(call))),
        }
    }

    /// Puts a message into the queue of its receiver.
    pub(super) fn deliver(&self, to: usize, tag: u64, message: Arrival) -> Result<(), Error> {
        check_rank(self, to, "send")?;
        self.goes_on()?;
        let group = &*self.group;
        group.mailboxes.put(self.rank, to, tag, message);
        group.barrier.event_count.notify();
        Ok(())
    }

    /// Waits for the oldest message of `from` with this `tag`.
    pub(super) fn take(&self, from: usize, tag: u64) -> Result<Arrival, Error> {
        check_rank(self, from, "recv")?;
        self.goes_on()?;
        let group = &*self.group;
        let call = Call::new(Operation::Receive { from, tag }, None, CallShape::flat(0));
        let mut message = group.mailboxes.take(from, self.rank, tag);
        if message.is_none() {
            // Only a receive that has to wait is recorded in the call history. It does not hold up collectives on
            // another thread of this rank: the message may be sent only after them.
            let mut call_timer = CallTimer::new(group, self.rank, &call);
            let gone = || lock(&group.left).iter().any(|(rank, _)| *rank == from);
            let mut over = None;
            let ready = || {
                // Read before the mailbox: what the sender put in before it left is still delivered.
                over = group.barrier.interruption().filter(|why| *why == Interrupted::Aborted || gone());
                message = group.mailboxes.take(from, self.rank, tag);
                message.is_some() || over.is_some()
            };
            let in_time = group.barrier.event_count.wait(backoff(group), ready, || call_timer.remaining());
            if message.is_some() {
                call_timer.finish();
            } else {
                let why = over.filter(|_| in_time).unwrap_or(Interrupted::Expired);
                return Err(self.interrupted(why, &call, call_timer.elapsed(), || {
                    format!(
                        "rank {from}; tags that it has sent and nobody has read: {:?}",
                        group.mailboxes.tags(from, self.rank)
                    )
                }));
            }
        }
        message.ok_or_else(|| self.failure_or_abort())
    }
}

/// Whether the calls of all ranks match; the same answer on every rank. A call without a dtype matches any, so a rank
/// without one compares those of the others.
fn agree(own: &CallDescriptor, descriptors: &collectives::Descriptors<'_>) -> bool {
    let one_dtype = || {
        let mut dtypes = descriptors.iter().filter_map(|descriptor| descriptor.call().dtype);
        let first = dtypes.next();
        dtypes.all(|dtype| Some(dtype) == first)
    };
    descriptors.iter().all(|descriptor| descriptor.equals(own))
        || descriptors
            .iter()
            .all(|descriptor| descriptor.call().agrees(own.call()) && collectives::same_lengths(own, &descriptor))
            && (own.call().dtype.is_some() || one_dtype())
}

/// A background thread does not spin: the thread that computes needs its core.
fn backoff(group: &Group) -> Backoff {
    match crate::comm::pending::in_background() {
        true => Backoff::SLEEP,
        false => group.backoff,
    }
}

impl Transport for LocalTransport {
    fn name(&self) -> &'static str {
        "local"
    }

    fn group(&self) -> &Arc<str> {
        &self.group.name
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn world_rank(&self) -> usize {
        self.group.members[self.rank]
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn gathers_in_place(&self) -> bool {
        true
    }

    fn collective(&self, call: &Call, transfer: Transfer<'_, '_>) -> Result<u64, Error> {
        match transfer {
            Transfer::Nothing => self.synchronize(CallDescriptor::nothing(call), |_| 0).map(|(_, moved)| moved),
            Transfer::InPlace(buffers) => {
                let descriptor = CallDescriptor::in_place(call, buffers);
                self.synchronize(descriptor, |descriptors| {
                    collectives::in_place(&call.operation, self.rank, descriptors)
                })
                .map(|(_, moved)| moved)
            }
            Transfer::OutOfPlace { input, output } => {
                let (group, rank) = (&*self.group, self.rank);
                let (sequence, moved) =
                    self.synchronize_numbered(CallDescriptor::input(call, input.as_ptr()), |sequence, descriptors| {
                        let moved = collectives::out_of_place(&call.operation, rank, descriptors, output);
                        if let Err(error @ Error::OutOfMemory { .. }) = &moved {
                            group.out_of_memory.report(sequence, rank, error);
                        }
                        moved
                    })?;
                group.out_of_memory.reported(sequence).map_or(moved, Err)
            }
        }
    }

    fn send(&self, to: usize, tag: u64, message: Message) -> Result<(), Error> {
        self.deliver(to, tag, message.into())
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Message, Error> {
        self.take(from, tag)?.into_host()
    }

    fn try_receive(&self, from: usize, tag: u64) -> Result<Option<Message>, Error> {
        check_rank(self, from, "recv")?;
        self.has_not_failed()?;
        self.group.mailboxes.take(from, self.rank, tag).map(Arrival::into_host).transpose()
    }

    fn timeout(&self) -> Duration {
        self.group.timeout
    }

    fn split(&self, name: &str, color: u64, key: i64) -> Result<Arc<dyn Transport>, Error> {
        let call = Call::split(name);
        let mine = (color, key);
        let descriptor = CallDescriptor::input(&call, std::ptr::from_ref(&mine).cast());
        let (sequence, mut members) = self.synchronize(descriptor, |descriptors| {
            // SAFETY: every rank of a split publishes its color and key, and waits.
            let brought = |descriptor: CallDescriptor| unsafe { *descriptor.input.cast::<(u64, i64)>() };
            let all = descriptors.iter().map(brought).enumerate();
            all.filter(|(_, (other, _))| *other == color).map(|(rank, (_, key))| (key, rank)).collect::<Vec<_>>()
        })?;
        members.sort_unstable();
        let ranks: Vec<usize> = members.into_iter().map(|(_, rank)| rank).collect();
        let parent = &*self.group;
        // The first rank makes the group; the last one that fetches it removes the entry.
        let mut splits = lock(&parent.splits);
        let split_group = splits.entry((sequence, color)).or_insert_with(|| {
            let name = format!("{}/{name}{color}", parent.name).into();
            let world_ranks = ranks.iter().map(|rank| parent.members[*rank]).collect();
            let group = Group::new(name, world_ranks, parent.world_failure.clone(), parent.timeout, parent.backoff);
            SplitGroup { group, fetched: 0 }
        });
        split_group.fetched += 1;
        let group = split_group.group.clone();
        if split_group.fetched == ranks.len() {
            splits.remove(&(sequence, color));
        }
        let rank = ranks.iter().position(|rank| *rank == self.rank).expect("a rank is of its own color");
        Ok(LocalTransport::new(group, rank))
    }

    fn abort(&self, error: Error) {
        self.group.world_failure.fail(error);
    }

    fn leave(&self) {
        self.group.world_failure.leave(self.group.members[self.rank]);
    }

    fn panicking(&self) {
        self.panicked.store(true, Ordering::Relaxed);
    }

    fn failure(&self) -> Option<Error> {
        self.group.world_failure.error().cloned()
    }

    fn log(&self) -> CallLog {
        self.group.log()
    }

    fn works_on_callers(&self) -> bool {
        true
    }

    #[cfg(feature = "cubecl")]
    fn on_device(&self) -> Option<&dyn crate::comm::DeviceTransport> {
        Some(self)
    }
}

impl Drop for LocalTransport {
    fn drop(&mut self) {
        let (group, panicked) = (&self.group, self.panicked.load(Ordering::Relaxed));
        group.world_failure.drops(group.members[self.rank], group, self.rank, panicked);
    }
}
