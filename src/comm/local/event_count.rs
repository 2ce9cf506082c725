//! An eventcount: threads wait for a condition, first spinning and then asleep, until another thread notifies them.
//!
//! # Protocol
//!
//! A waiter checks a condition that others make true with atomic stores, and others notify after each such store. The
//! danger is the lost wake-up: the waiter finds the condition false, the other side makes it true and sees no sleeper,
//! the waiter falls asleep. It is excluded as in Dekker's algorithm, by a sequentially consistent fence on either side:
//!
//! - the waiter counts itself among the sleepers, *fence*, checks the condition;
//! - the notifier makes the condition true, *fence*, checks the number of sleepers.
//!
//! At least one of the two sees the other. If it is the notifier, it takes the lock before it notifies; the waiter
//! holds the lock from before its check until the condition variable has put it to sleep, so the notification cannot
//! fall between. A notification with no sleeper is a fence and a load; where the condition was made true by an atomic
//! read-modify-write, as in a barrier, the fence comes with it on x86.

use std::time::Duration;

use super::backoff::{Backoff, Pause};
use super::sync::{AtomicUsize, Condvar, Mutex, Ordering, fence, fence_after_rmw, spin_loop, yield_now};

#[derive(Debug)]
pub(super) struct EventCount {
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

impl EventCount {
    pub fn new() -> Self {
        Self { sleepers: AtomicUsize::new(0), lock: Mutex::new(()), wake: Condvar::new() }
    }

    /// Wakes every sleeper, to check its condition again.
    pub fn notify(&self) {
        fence(Ordering::SeqCst);
        self.wake_sleepers();
    }

    /// [`notify`](Self::notify) right after an atomic read-modify-write that made the condition true.
    pub fn notify_after_rmw(&self) {
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
        backoff: Backoff,
        mut ready: impl FnMut() -> bool,
        mut remaining: impl FnMut() -> Option<Duration>,
    ) -> bool {
        for polls in 0.. {
            match backoff.pause(polls) {
                Pause::Sleep => break,
                _ if ready() => return true,
                Pause::Spin => spin_loop(),
                Pause::Yield => yield_now(),
            }
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
