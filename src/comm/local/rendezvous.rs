//! The meeting of the ranks of one group, once per collective.
//!
//! # Protocol
//!
//! Every rank owns a *post*, where it lays what the others need to know of it: its call and the places of its buffers.
//! A meeting has three parts.
//!
//! 1. **Arrive.** A rank writes its post and adds 1 to `arrivals`, a counter that only grows. The arrival that makes it
//!    `size * (meeting + 1)` *commits* the meeting. Until then nobody looks at another's post or buffer, so a rank whose
//!    time has run out can still go away.
//! 2. **Work.** Once committed, every rank reads all posts and does its share, in its own buffer and in those of others.
//! 3. **Depart.** Each adds 1 to `departures` and waits for all. Only then may it touch its post or its buffer again.
//!    This wait has no time-out and needs none: every rank that it waits for has been seen to arrive, sees the commit for
//!    itself, and has nothing left to do but loops over memory.
//!
//! **Who decides between commit and interruption?** Both are changes of the same atomic word. `arrivals` carries two
//! flags above the count, `ABORTED` and `LEFT`. An arrival is a compare-and-swap that fails once a flag is up, and raising
//! a flag is a compare-and-swap or an or on the same word: in the single order of changes of that word, the last arrival
//! comes either before the flag (then the meeting is committed for all) or never. So either every rank of a meeting does
//! its share, or none does and no buffer is touched after its owner has gone.
//!
//! **Memory order.** A post is written before the arrival (release) and read after the commit was seen (acquire): the
//! arrivals form one release sequence. Work on foreign buffers happens before the worker's departure (release), which the
//! owner sees (acquire) before it goes on. Sleeping and waking is the [`Bell`]'s affair.

use std::time::Duration;

use crossbeam_utils::CachePadded;

use super::bell::{Bell, Patience};
use super::sync::{AtomicU64, Ordering, UnsafeCell};

const ABORTED: u64 = 1 << 63;
const LEFT: u64 = 1 << 62;
const COUNT: u64 = LEFT - 1;

/// Why a meeting did not take place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interrupted {
    /// The group has been aborted.
    Aborted,
    /// A rank has left the group for good.
    Left,
    /// Time ran out; this rank has aborted the group.
    Expired,
}

#[derive(Debug)]
pub(super) struct Rendezvous<T> {
    size: usize,
    arrivals: CachePadded<AtomicU64>,
    departures: CachePadded<AtomicU64>,
    posts: Box<[CachePadded<UnsafeCell<Option<T>>>]>,
    pub(super) bell: Bell,
}

// SAFETY: posts are written by their owner alone and read only between a commit and the reader's departure, as the
// protocol above describes; `T` itself crosses threads by copy.
unsafe impl<T: Send + Copy> Sync for Rendezvous<T> {}
unsafe impl<T: Send + Copy> Send for Rendezvous<T> {}

impl<T: Copy> Rendezvous<T> {
    pub fn new(size: usize) -> Self {
        Self {
            size,
            arrivals: CachePadded::new(AtomicU64::new(0)),
            departures: CachePadded::new(AtomicU64::new(0)),
            posts: (0..size).map(|_| CachePadded::new(UnsafeCell::new(None))).collect(),
            bell: Bell::new(),
        }
    }

    /// Meets the others for the `meeting`-th time and runs `work` on the posts of all, in rank order, once all are there.
    ///
    /// # Safety
    ///
    /// Each rank calls this from one thread at a time, with `meeting` counting its own calls from 0.
    pub unsafe fn meet<R>(
        &self,
        rank: usize,
        meeting: u64,
        post: T,
        patience: Patience,
        remaining: impl FnMut() -> Option<Duration>,
        work: impl FnOnce(&Posts<'_, T>) -> R,
    ) -> Result<R, Interrupted> {
        let target = (meeting + 1) * self.size as u64;
        // SAFETY: all have departed from the previous meeting, and this one is not committed without us.
        self.posts[rank].with_mut(|place| unsafe { *place = Some(post) });
        self.arrive(target)?;
        let came = || {
            let arrivals = self.arrivals.load(Ordering::Acquire);
            arrivals & COUNT >= target || arrivals & (ABORTED | LEFT) != 0
        };
        let expired = !self.bell.wait(patience, came, remaining);
        if expired && self.interrupt(target) {
            return Err(Interrupted::Expired);
        }
        let arrivals = self.arrivals.load(Ordering::Acquire);
        if arrivals & COUNT < target {
            return Err(Self::flag(arrivals).unwrap_or(Interrupted::Aborted));
        }
        // Departs when it is dropped, so also if the work panics: the others count on it, and our buffer must not be freed
        // under their hands.
        let _departure = Departure { meeting: self, target, patience };
        Ok(work(&Posts { posts: &self.posts }))
    }

    /// Forbids every later commit and wakes all.
    pub fn abort(&self) {
        self.raise(ABORTED);
    }

    /// Tells the others that one of them will not come again.
    pub fn leave(&self) {
        self.raise(LEFT);
    }

    /// Whether meetings are over, and why.
    pub fn interruption(&self) -> Option<Interrupted> {
        Self::flag(self.arrivals.load(Ordering::Acquire))
    }

    fn raise(&self, flag: u64) {
        self.arrivals.fetch_or(flag, Ordering::AcqRel);
        self.bell.ring();
    }

    fn arrive(&self, target: u64) -> Result<(), Interrupted> {
        // A guess, that this rank is the first: to look before is to fetch the cache line twice, for reading and for
        // writing. Nobody has raised a flag where it is right.
        let mut seen = target - self.size as u64;
        loop {
            if let Some(flag) = Self::flag(seen) {
                return Err(flag);
            }
            match self.arrivals.compare_exchange_weak(seen, seen + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        if seen + 1 == target {
            self.bell.ring_after_rmw();
        }
        Ok(())
    }

    /// Aborts, unless the meeting is committed. Returns whether it did.
    fn interrupt(&self, target: u64) -> bool {
        let mut seen = self.arrivals.load(Ordering::Acquire);
        loop {
            if seen & COUNT >= target || Self::flag(seen).is_some() {
                return false;
            }
            match self.arrivals.compare_exchange_weak(seen, seen | ABORTED, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        self.bell.ring();
        true
    }

    fn flag(arrivals: u64) -> Option<Interrupted> {
        if arrivals & ABORTED != 0 {
            Some(Interrupted::Aborted)
        } else if arrivals & LEFT != 0 {
            Some(Interrupted::Left)
        } else {
            None
        }
    }
}

/// A rank that is in a committed meeting. Dropping it departs, and waits for all to have departed.
struct Departure<'a, T: Copy> {
    meeting: &'a Rendezvous<T>,
    target: u64,
    patience: Patience,
}

impl<T: Copy> Drop for Departure<'_, T> {
    fn drop(&mut self) {
        let Rendezvous { departures, bell, .. } = self.meeting;
        if departures.fetch_add(1, Ordering::AcqRel) + 1 == self.target {
            bell.ring_after_rmw();
        }
        let all_left = || departures.load(Ordering::Acquire) >= self.target;
        while !bell.wait(self.patience, all_left, || Some(Duration::from_secs(3600))) {}
    }
}

/// The posts of a committed meeting.
pub(super) struct Posts<'a, T> {
    posts: &'a [CachePadded<UnsafeCell<Option<T>>>],
}

impl<T: Copy> Posts<'_, T> {
    pub fn get(&self, rank: usize) -> T {
        // SAFETY: the meeting is committed, so the post was written before and is not written until all have departed.
        self.posts[rank].with(|place| unsafe { *place }).expect("a rank writes its post before it arrives")
    }

    pub fn len(&self) -> usize {
        self.posts.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = T> {
        (0..self.posts.len()).map(|rank| self.get(rank))
    }
}
