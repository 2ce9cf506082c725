//! The barrier that the ranks of one group pass in each collective, and the descriptors that they publish in it.
//!
//! # Protocol
//!
//! Every rank owns a *descriptor*, in which it publishes its call and the addresses of its buffers. A collective has
//! three phases.
//!
//! 1. **Arrive.** A rank writes its descriptor and adds 1 to `arrivals`, a counter that only grows. The arrival that
//!    makes it `size * (sequence + 1)` *commits* the collective. Until then no rank reads another's descriptor or
//!    buffer, so a rank whose time has run out can still leave.
//! 2. **Work.** Once committed, every rank reads all descriptors and does its share, in its own buffer and in those of
//!    others.
//! 3. **Depart.** Each adds 1 to `departures` and waits for all. Only then may it touch its descriptor or its buffer
//!    again. This wait has no time-out and needs none: every rank that it waits for has arrived, sees the commit for
//!    itself, and has nothing left to do but loops over memory.
//!
//! **Who decides between commit and interruption?** Both are changes of the same atomic word. `arrivals` carries two
//! flags above the count, `ABORTED` and `LEFT`. An arrival is a compare-and-swap that fails once a flag is set, and
//! setting a flag is a compare-and-swap or an or on the same word: in the single order of changes of that word, the
//! last arrival comes either before the flag (then the collective is committed for all) or never. So either every rank
//! does its share of a collective, or none does and no buffer is touched after its owner has left.
//!
//! **Memory order.** A descriptor is written before the arrival (release) and read after the commit was seen (acquire):
//! the arrivals form one release sequence. Work on foreign buffers happens before the worker's departure (release),
//! which the owner sees (acquire) before it continues. Sleeping and waking is up to the [`EventCount`].

use std::time::Duration;

use crossbeam_utils::CachePadded;

use super::backoff::Backoff;
use super::event_count::EventCount;
use super::sync::{AtomicU64, Ordering, UnsafeCell};

const ABORTED: u64 = 1 << 63;
const LEFT: u64 = 1 << 62;
const COUNT: u64 = LEFT - 1;

/// Why a collective was not committed.
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
pub(super) struct Barrier<T> {
    size: usize,
    arrivals: CachePadded<AtomicU64>,
    departures: CachePadded<AtomicU64>,
    descriptors: Box<[CachePadded<UnsafeCell<Option<T>>>]>,
    pub(super) event_count: EventCount,
}

// SAFETY: descriptors are written by their owner alone and read only between a commit and the reader's departure, as
// the protocol above describes; `T` itself crosses threads by copy.
unsafe impl<T: Send + Copy> Sync for Barrier<T> {}
unsafe impl<T: Send + Copy> Send for Barrier<T> {}

impl<T: Copy> Barrier<T> {
    pub fn new(size: usize) -> Self {
        Self {
            size,
            arrivals: CachePadded::new(AtomicU64::new(0)),
            departures: CachePadded::new(AtomicU64::new(0)),
            descriptors: (0..size).map(|_| CachePadded::new(UnsafeCell::new(None))).collect(),
            event_count: EventCount::new(),
        }
    }

    /// Enters the `sequence`-th collective and runs `work` on the descriptors of all, in rank order, once all have
    /// arrived.
    ///
    /// # Safety
    ///
    /// Each rank calls this from one thread at a time, with `sequence` counting its own calls from 0.
    pub unsafe fn enter<R>(
        &self,
        rank: usize,
        sequence: u64,
        descriptor: T,
        backoff: Backoff,
        remaining: impl FnMut() -> Option<Duration>,
        work: impl FnOnce(&Descriptors<'_, T>) -> R,
    ) -> Result<R, Interrupted> {
        let target = (sequence + 1) * self.size as u64;
        // SAFETY: all have departed from the previous collective, and this one is not committed without us.
        self.descriptors[rank].with_mut(|place| unsafe { *place = Some(descriptor) });
        self.arrive(target)?;
        let came = || {
            let arrivals = self.arrivals.load(Ordering::Acquire);
            arrivals & COUNT >= target || arrivals & (ABORTED | LEFT) != 0
        };
        let expired = !self.event_count.wait(backoff, came, remaining);
        if expired && self.interrupt(target) {
            return Err(Interrupted::Expired);
        }
        let arrivals = self.arrivals.load(Ordering::Acquire);
        if arrivals & COUNT < target {
            return Err(Self::flag(arrivals).unwrap_or(Interrupted::Aborted));
        }
        // Departs when it is dropped, so also if the work panics: the others wait for it, and our buffer must not be
        // freed while they use it.
        let _departure = Departure { barrier: self, target, backoff };
        Ok(work(&Descriptors { descriptors: &self.descriptors }))
    }

    /// Forbids every later commit and wakes all.
    pub fn abort(&self) {
        self.raise(ABORTED);
    }

    /// Says that one of the ranks will not arrive again.
    pub fn leave(&self) {
        self.raise(LEFT);
    }

    /// Whether no further collective will be committed, and why.
    pub fn interruption(&self) -> Option<Interrupted> {
        Self::flag(self.arrivals.load(Ordering::Acquire))
    }

    fn raise(&self, flag: u64) {
        self.arrivals.fetch_or(flag, Ordering::AcqRel);
        self.event_count.notify();
    }

    fn arrive(&self, target: u64) -> Result<(), Interrupted> {
        // Guesses that this rank is the first: a load before would fetch the cache line twice, for reading and for
        // writing. Where the guess is right, no flag is set.
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
            self.event_count.notify_after_rmw();
        }
        Ok(())
    }

    /// Aborts, unless the collective is committed. Returns whether it did.
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
        self.event_count.notify();
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

/// A rank in a committed collective. Dropping it departs, and waits for all to have departed.
struct Departure<'a, T: Copy> {
    barrier: &'a Barrier<T>,
    target: u64,
    backoff: Backoff,
}

impl<T: Copy> Drop for Departure<'_, T> {
    fn drop(&mut self) {
        let Barrier { departures, event_count, .. } = self.barrier;
        if departures.fetch_add(1, Ordering::AcqRel) + 1 == self.target {
            event_count.notify_after_rmw();
        }
        let all_left = || departures.load(Ordering::Acquire) >= self.target;
        while !event_count.wait(self.backoff, all_left, || Some(Duration::from_secs(3600))) {}
    }
}

/// The descriptors of a committed collective.
pub(super) struct Descriptors<'a, T> {
    descriptors: &'a [CachePadded<UnsafeCell<Option<T>>>],
}

impl<T: Copy> Descriptors<'_, T> {
    pub fn get(&self, rank: usize) -> T {
        // SAFETY: the collective is committed, so the descriptor was written before and is not written until all have
        // departed.
        self.descriptors[rank].with(|place| unsafe { *place }).expect("a rank writes its descriptor before it arrives")
    }

    pub fn len(&self) -> usize {
        self.descriptors.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = T> {
        (0..self.descriptors.len()).map(|rank| self.get(rank))
    }
}
