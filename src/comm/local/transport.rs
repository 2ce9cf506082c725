//! A rank's place in a group of threads.

#[cfg(feature = "cubecl")]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use super::bell::Patience;
use super::clock::Clock;
use super::group::{Group, Half, Post, lock};
use super::rendezvous::Interrupted;
use super::work;
use crate::Error;
use crate::comm::{Arrival, Call, CallLog, Extent, Message, Operation, Transfer, Transport};

/// A rank's place in a group of threads.
#[derive(Debug)]
pub(super) struct LocalTransport {
    pub(super) group: Arc<Group>,
    pub(super) rank: usize,
    /// Number of the next meeting. Held during a collective: a rank does one at a time. Transports of several ranks are made
    /// one after the other and lie side by side, so this has its cache lines to itself.
    meeting: CachePadded<Mutex<u64>>,
    panicked: AtomicBool,
    /// Number of the next exchange of device data.
    #[cfg(feature = "cubecl")]
    exchange: AtomicU64,
}

impl LocalTransport {
    pub fn new(group: Arc<Group>, rank: usize) -> Arc<Self> {
        Arc::new(Self {
            group,
            rank,
            meeting: CachePadded::new(Mutex::new(0)),
            panicked: AtomicBool::new(false),
            #[cfg(feature = "cubecl")]
            exchange: AtomicU64::new(0),
        })
    }

    #[cfg(feature = "cubecl")]
    pub(super) fn board(&self) -> &super::device::Board {
        &self.group.board
    }

    /// A rank does one collective at a time, so all count alike.
    #[cfg(feature = "cubecl")]
    pub(super) fn next_exchange(&self) -> u64 {
        self.exchange.fetch_add(1, Ordering::Relaxed)
    }

    /// Meets the others, checks that all call the same, and runs `work`, which returns the bytes it moved.
    fn meet<R>(&self, post: Post, work: impl FnOnce(&work::Posts<'_>) -> R) -> Result<(u64, R), Error> {
        self.meet_counted(post, |_, posts| work(posts))
    }

    /// [`meet`](Self::meet) for work that is told the number of the meeting.
    fn meet_counted<R>(&self, post: Post, work: impl FnOnce(u64, &work::Posts<'_>) -> R) -> Result<(u64, R), Error> {
        let group = &*self.group;
        let mut turn = lock(&self.meeting);
        if let Some(error) = group.fate.error() {
            return Err(error.clone());
        }
        let call = post.call();
        let mut clock = Clock::new(group, self.rank, call);
        // Counted before: should the work panic, the meeting has taken place all the same.
        let meeting = *turn;
        *turn += 1;
        let work = |posts: &work::Posts<'_>| match agree(&post, posts) {
            true => Ok(work(meeting, posts)),
            false => Err(posts.iter().map(|other| *other.call()).collect::<Vec<_>>()),
        };
        // SAFETY: the turn is held, and counts this rank's meetings.
        let met =
            unsafe { group.rendezvous.meet(self.rank, meeting, post, patience(group), || clock.remaining(), work) };
        match met {
            Ok(Ok(result)) => {
                clock.finish();
                Ok((meeting, result))
            }
            Ok(Err(calls)) => {
                let (name, log) = (group.name.clone(), group.log());
                Err(self.fail(Error::Mismatch { group: name, sequence: meeting, calls, log }))
            }
            Err(why) => Err(self.interrupted(why, call, clock.elapsed(), || self.absent(call))),
        }
    }

    /// Puts a message into the queue of its receiver.
    pub(super) fn hand_over(&self, to: usize, tag: u64, message: Arrival) -> Result<(), Error> {
        self.check_rank(to, "send")?;
        let group = &*self.group;
        if let Some(error) = group.fate.error() {
            return Err(error.clone());
        }
        group.mail.put(self.rank, to, tag, message);
        group.rendezvous.bell.ring();
        Ok(())
    }

    /// Waits for the oldest message of `from` that bears `tag`.
    pub(super) fn take(&self, from: usize, tag: u64) -> Result<Arrival, Error> {
        self.check_rank(from, "recv")?;
        let group = &*self.group;
        if let Some(error) = group.fate.error() {
            return Err(error.clone());
        }
        let call = Call::new(Operation::Receive { from, tag }, None, Extent::flat(0));
        let mut message = group.mail.take(from, self.rank, tag);
        if message.is_none() {
            // Only a receive that has to wait is worth a line in the log. It does not hold up collectives that another
            // thread of this rank runs: the message may be sent only after them.
            let mut clock = Clock::new(group, self.rank, &call);
            let gone = || lock(&group.left).iter().any(|(rank, _)| *rank == from);
            let mut over = None;
            let ready = || {
                // Looked at before the mailbox: what the sender put in before it left is still delivered.
                over = group.rendezvous.interruption().filter(|why| *why == Interrupted::Aborted || gone());
                message = group.mail.take(from, self.rank, tag);
                message.is_some() || over.is_some()
            };
            let in_time = group.rendezvous.bell.wait(patience(group), ready, || clock.remaining());
            if message.is_some() {
                clock.finish();
            } else {
                let why = over.filter(|_| in_time).unwrap_or(Interrupted::Expired);
                return Err(self.interrupted(why, &call, clock.elapsed(), || {
                    format!(
                        "rank {from}; tags that it has sent and nobody has read: {:?}",
                        group.mail.tags(from, self.rank)
                    )
                }));
            }
        }
        message.ok_or_else(|| self.failure_or_abort())
    }

    fn check_rank(&self, rank: usize, operation: &'static str) -> Result<(), Error> {
        match rank < self.size() {
            true => Ok(()),
            false => Err(Error::NoSuchRank { group: self.group.name.clone(), rank, size: self.size(), operation }),
        }
    }
}

/// Whether the calls of all ranks belong together; the same answer on every rank. A call without a dtype agrees with any,
/// so whoever brings none looks at what the others make of each other.
fn agree(own: &Post, posts: &work::Posts<'_>) -> bool {
    let one_dtype = || {
        let mut dtypes = posts.iter().filter_map(|post| post.call().dtype);
        let first = dtypes.next();
        dtypes.all(|dtype| Some(dtype) == first)
    };
    posts.iter().all(|post| post.equals(own))
        || posts.iter().all(|post| post.call().agrees(own.call()) && work::same_cut(own, &post))
            && (own.call().dtype.is_some() || one_dtype())
}

/// A background thread does not spin: the thread that computes needs its core.
fn patience(group: &Group) -> Patience {
    match crate::comm::pending::in_background() {
        true => Patience { spins: 0, yields: 0 },
        false => group.patience,
    }
}

impl Transport for LocalTransport {
    fn engine(&self) -> &'static str {
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

    fn collective(&self, call: &Call, transfer: Transfer<'_, '_>) -> Result<u64, Error> {
        match transfer {
            Transfer::Nothing => self.meet(Post::nothing(call), |_| 0).map(|(_, moved)| moved),
            Transfer::InPlace(buffers) => {
                let post = Post::in_place(call, buffers);
                self.meet(post, |posts| work::in_place(&call.operation, self.rank, posts)).map(|(_, moved)| moved)
            }
            Transfer::Through { input, output } => {
                let (group, rank) = (&*self.group, self.rank);
                let (meeting, moved) = self.meet_counted(Post::input(call, input.as_ptr()), |meeting, posts| {
                    let moved = work::through(&call.operation, rank, posts, output);
                    if let Err(error @ Error::OutOfMemory { .. }) = &moved {
                        group.shortage.say(meeting, rank, error);
                    }
                    moved
                })?;
                group.shortage.hear(meeting).map_or(moved, Err)
            }
        }
    }

    fn send(&self, to: usize, tag: u64, message: Message) -> Result<(), Error> {
        self.hand_over(to, tag, message.into())
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Message, Error> {
        self.take(from, tag)?.into_host()
    }

    fn try_receive(&self, from: usize, tag: u64) -> Result<Option<Message>, Error> {
        self.check_rank(from, "recv")?;
        match self.group.fate.error() {
            Some(error) => Err(error.clone()),
            None => self.group.mail.take(from, self.rank, tag).map(Arrival::into_host).transpose(),
        }
    }

    fn timeout(&self) -> Duration {
        self.group.timeout
    }

    fn split(&self, name: &str, color: u64, key: i64) -> Result<Arc<dyn Transport>, Error> {
        let call = Call::split(name);
        let mine = (color, key);
        let post = Post::input(&call, std::ptr::from_ref(&mine).cast());
        let (meeting, mut members) = self.meet(post, |posts| {
            // SAFETY: every rank of a split posts its color and key, and waits.
            let brought = |post: Post| unsafe { *post.input.cast::<(u64, i64)>() };
            let all = posts.iter().map(brought).enumerate();
            all.filter(|(_, (other, _))| *other == color).map(|(rank, (_, key))| (key, rank)).collect::<Vec<_>>()
        })?;
        members.sort_unstable();
        let ranks: Vec<usize> = members.into_iter().map(|(_, rank)| rank).collect();
        let parent = &*self.group;
        // Whoever comes first makes the group; whoever fetches it last clears it away.
        let mut halves = lock(&parent.halves);
        let half = halves.entry((meeting, color)).or_insert_with(|| {
            let name = format!("{}/{name}{color}", parent.name).into();
            let world_ranks = ranks.iter().map(|rank| parent.members[*rank]).collect();
            let group = Group::new(name, world_ranks, parent.fate.clone(), parent.timeout, parent.patience);
            Half { group, fetched: 0 }
        });
        half.fetched += 1;
        let group = half.group.clone();
        if half.fetched == ranks.len() {
            halves.remove(&(meeting, color));
        }
        let rank = ranks.iter().position(|rank| *rank == self.rank).expect("a rank is of its own color");
        Ok(LocalTransport::new(group, rank))
    }

    fn abort(&self, error: Error) {
        self.group.fate.fail(error);
    }

    fn leave(&self) {
        self.group.fate.leave(self.group.members[self.rank]);
    }

    fn panicking(&self) {
        self.panicked.store(true, Ordering::Relaxed);
    }

    fn failure(&self) -> Option<Error> {
        self.group.fate.error().cloned()
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
        self.group.leave(self.rank, self.panicked.load(Ordering::Relaxed));
    }
}
