//! Waiting: a little spinning, then sleep until somebody rings.
//!
//! # Protocol
//!
//! A waiter looks at a condition that others make true with atomic stores, and others ring after each such store. The
//! danger is the lost wake-up: the waiter finds the condition false, the other side makes it true and sees nobody asleep,
//! the waiter falls asleep. It is excluded as in Dekker's algorithm, by a sequentially consistent fence on either side:
//!
//! - the waiter counts itself among the sleepers, *fence*, looks at the condition;
//! - the ringer makes the condition true, *fence*, looks at the number of sleepers.
//!
//! At least one of the two sees the other. If it is the ringer, it takes the lock before it notifies; the waiter holds the
//! lock from before its look until the condition variable has put it to sleep, so the notification cannot fall between.
//! A ring with nobody asleep is a fence and a load; where the condition was made true by an atomic read-modify-write, as in a
//! meeting, the fence comes with it on x86.

use std::time::Duration;

use super::sync::{AtomicUsize, Condvar, Mutex, Ordering, fence, fence_after_rmw, spin_loop, yield_now};

/// How long a waiter tries before it sleeps. Spinning wins microseconds when every rank has a core of its own, and steals
/// the core of the very rank waited for when it has not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    pub spins: u32,
    pub yields: u32,
}

#[derive(Debug)]
pub(super) struct Bell {
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Bell {
    pub fn new() -> Self {
        Self { sleepers: AtomicUsize::new(0), lock: Mutex::new(()), wake: Condvar::new() }
    }

    /// Wakes every sleeper, to look again at its condition.
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        self.wake_sleepers();
    }

    /// [`ring`](Self::ring), by whoever has just made the condition true by an atomic read-modify-write.
    pub fn ring_after_rmw(&self) {
        fence_after_rmw();
        self.wake_sleepers();
    }

    fn wake_sleepers(&self) {
        if self.sleepers.load(Ordering::Relaxed) > 0 {
            drop(self.lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
            self.wake.notify_all();
        }
    }

    /// Waits until `ready`, or until `remaining` says that no time is left. Returns whether it became ready.
    pub fn wait(
        &self,
        patience: Patience,
        mut ready: impl FnMut() -> bool,
        mut remaining: impl FnMut() -> Option<Duration>,
    ) -> bool {
        for _ in 0..patience.spins {
            if ready() {
                return true;
            }
            spin_loop();
        }
        for _ in 0..patience.yields {
            if ready() {
                return true;
            }
            yield_now();
        }
        let mut guard = self.lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let became_ready = loop {
            if ready() {
                break true;
            }
            let Some(time) = remaining() else {
                break false;
            };
            guard = match self.wake.wait_timeout(guard, time) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        };
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
        became_ready
    }
}
