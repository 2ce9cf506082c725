//! Models of the barrier and its eventcount, checked by loom over every interleaving and every permitted reordering.
//!
//! The two files are compiled here against `sync`, made of loom's primitives, so what is checked is the text that runs.
//! Loom finds lost wake-ups (as deadlocks), data races on descriptors and buffers (its `UnsafeCell` knows who accessed
//! when), and the assertions below: in a collective either every rank does its share or none does, and no rank
//! continues before all are done.
//!
//! Time is a thread of its own, the *clock*: when it strikes, `remaining` is `None` from then on, and whoever sleeps
//! with a time-out wakes, as the operating system would have it. It may strike at any moment.
#![allow(dead_code, reason = "the files are used here in part")]
#![allow(clippy::duplicate_mod, reason = "once on loom's primitives, once on the usual ones")]

#[path = "../../src/comm/backoff.rs"]
mod backoff;
#[path = "../../src/comm/local/barrier.rs"]
mod barrier;
#[path = "../../src/comm/local/event_count.rs"]
mod event_count;

/// Loom's primitives under the names of `src/comm/local/sync.rs`.
mod sync {
    use std::cell::RefCell;
    use std::sync::{Arc, LockResult};
    use std::time::Duration;

    pub(super) use loom::cell::UnsafeCell;
    pub(super) use loom::hint::spin_loop;
    use loom::sync::MutexGuard;
    pub(super) use loom::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
    pub(super) use loom::thread::yield_now;

    /// The fence that it is, on every machine.
    pub(super) fn fence_after_rmw() {
        fence(Ordering::SeqCst);
    }

    type Parts = (Option<Arc<loom::sync::Mutex<()>>>, Option<Arc<loom::sync::Condvar>>);

    thread_local! {
        /// Lock and condition variable made last, for the clock to wake sleepers with.
        static LAST: RefCell<Parts> = const { RefCell::new((None, None)) };
    }

    #[derive(Debug)]
    pub(super) struct Mutex<T>(Arc<loom::sync::Mutex<T>>);

    impl Mutex<()> {
        pub(super) fn new((): ()) -> Self {
            let lock = Arc::new(loom::sync::Mutex::new(()));
            LAST.with_borrow_mut(|last| last.0 = Some(lock.clone()));
            Self(lock)
        }

        pub(super) fn lock(&self) -> LockResult<MutexGuard<'_, ()>> {
            self.0.lock()
        }
    }

    #[derive(Debug)]
    pub(super) struct Condvar(Arc<loom::sync::Condvar>);

    impl Condvar {
        pub(super) fn new() -> Self {
            let wake = Arc::new(loom::sync::Condvar::new());
            LAST.with_borrow_mut(|last| last.1 = Some(wake.clone()));
            Self(wake)
        }

        pub(super) fn notify_all(&self) {
            self.0.notify_all();
        }

        /// Sleeps until notified, be it by the [`Clock`].
        pub(super) fn wait_timeout<'a>(
            &self,
            guard: MutexGuard<'a, ()>,
            _: Duration,
        ) -> LockResult<(MutexGuard<'a, ()>, ())> {
            Ok((self.0.wait(guard).unwrap(), ()))
        }
    }

    /// The clock of the eventcount made last.
    #[derive(Clone)]
    pub(super) struct Clock {
        struck: Arc<loom::sync::atomic::AtomicBool>,
        lock: Arc<loom::sync::Mutex<()>>,
        wake: Arc<loom::sync::Condvar>,
    }

    impl Clock {
        pub(super) fn of_last_event_count() -> Self {
            let (lock, wake) = LAST.take();
            let struck = Arc::new(loom::sync::atomic::AtomicBool::new(false));
            Self { struck, lock: lock.unwrap(), wake: wake.unwrap() }
        }

        pub(super) fn strike(&self) {
            self.struck.store(true, Ordering::Relaxed);
            drop(self.lock.lock());
            self.wake.notify_all();
        }

        pub(super) fn remaining(&self) -> Option<Duration> {
            (!self.struck.load(Ordering::Relaxed)).then_some(Duration::from_secs(1))
        }
    }
}

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize as Tally, Ordering::SeqCst};
use std::time::Duration;

use loom::thread;

use backoff::Backoff;
use barrier::{Barrier, Interrupted};
use event_count::EventCount;
use sync::{AtomicUsize, Clock, Ordering, UnsafeCell};

use crate::explore::explore;

/// Sleeps at once: in a model, spinning adds executions and no behaviour that a later look would not have.
const SLEEPY: Backoff = Backoff::SLEEP;

fn unlimited() -> Option<Duration> {
    Some(Duration::from_secs(1))
}

/// A group of ranks that all-reduce: each owns one cell per rank, and in a collective each sums its share of
/// everybody's cells and writes the sum into all of them.
struct World {
    barrier: Barrier<usize>,
    cells: Vec<Vec<UnsafeCell<usize>>>,
    /// Shares done in each collective. Not modelled: it only checks.
    shares: [Tally; 2],
}

// SAFETY: loom checks every access to the cells.
unsafe impl Sync for World {}
unsafe impl Send for World {}

impl World {
    fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            barrier: Barrier::new(size),
            cells: (0..size).map(|_| (0..size).map(|_| UnsafeCell::new(0)).collect()).collect(),
            shares: Default::default(),
        })
    }

    /// The `sequence`-th all-reduce of `rank`.
    fn all_reduce(
        &self,
        rank: usize,
        sequence: usize,
        backoff: Backoff,
        remaining: impl FnMut() -> Option<Duration>,
    ) -> Result<(), Interrupted> {
        let size = self.cells.len();
        let mine = |rank: usize| 10 * sequence + rank + 1;
        for cell in &self.cells[rank] {
            cell.with_mut(|cell| unsafe { *cell = mine(rank) });
        }
        // SAFETY: each rank is one thread and counts its collectives.
        let outcome = unsafe {
            self.barrier.enter(rank, sequence as u64, mine(rank), backoff, remaining, |descriptors| {
                self.shares[sequence].fetch_add(1, SeqCst);
                assert!(
                    (0..size).all(|other| descriptors.get(other) == mine(other)),
                    "every rank sees the descriptors of all"
                );
                let sum: usize = self.cells.iter().map(|cells| cells[rank].with(|cell| *cell)).sum();
                for cells in &self.cells {
                    cells[rank].with_mut(|cell| *cell = sum);
                }
            })
        };
        // The buffers are ours again, whatever happened: loom objects if another rank may still touch them.
        let expected = if outcome.is_ok() { (0..size).map(mine).sum() } else { mine(rank) };
        for cell in &self.cells[rank] {
            assert_eq!(cell.with(|cell| unsafe { *cell }), expected);
        }
        if outcome.is_ok() {
            assert_eq!(self.shares[sequence].load(SeqCst), size, "nobody goes on before all have done their share");
        }
        outcome
    }
}

/// What all ranks but the first run as, and then the first; returns their results in rank order.
fn run<R: Send + 'static>(size: usize, rank: impl Fn(usize) -> R + Clone + Send + 'static) -> Vec<R> {
    let others: Vec<_> = (1..size)
        .map(|index| {
            let rank = rank.clone();
            thread::spawn(move || rank(index))
        })
        .collect();
    let first = rank(0);
    std::iter::once(first).chain(others.into_iter().map(|other| other.join().unwrap())).collect()
}

/// In the first collective either all ranks did their share and were told so, or none was.
fn all_or_none(world: &World, results: &[Result<(), Interrupted>]) {
    let done = results.iter().filter(|result| result.is_ok()).count();
    assert!(done == 0 || done == results.len(), "some went and some stayed: {results:?}");
    assert_eq!(world.shares[0].load(SeqCst), done, "shares done");
}

#[test]
fn a_notification_is_never_missed() {
    for backoff in [SLEEPY, Backoff { spins: 1, yields: 1 }] {
        explore("event_count, one sleeper", None, move || {
            let (event_count, ready) = (Arc::new(EventCount::new()), Arc::new(AtomicUsize::new(0)));
            let (their_event_count, theirs) = (event_count.clone(), ready.clone());
            let notifier = thread::spawn(move || {
                theirs.store(1, Ordering::Relaxed);
                their_event_count.notify();
            });
            assert!(event_count.wait(backoff, || ready.load(Ordering::Relaxed) == 1, unlimited));
            notifier.join().unwrap();
        });
    }
}

#[test]
fn a_notification_wakes_every_sleeper() {
    explore("event_count, two sleepers for two notifiers", None, || {
        let (event_count, ready) = (Arc::new(EventCount::new()), Arc::new(AtomicUsize::new(0)));
        let part = move |index: usize| {
            if index == 0 {
                ready.fetch_add(1, Ordering::Relaxed);
                event_count.notify();
            }
            assert!(event_count.wait(SLEEPY, || ready.load(Ordering::Relaxed) == 1, unlimited));
        };
        run(3, part);
    });
}

#[test]
fn a_wait_ends_when_time_is_up() {
    explore("event_count, nobody notifies", None, || {
        let event_count = Arc::new(EventCount::new());
        let clock = Clock::of_last_event_count();
        let striking = clock.clone();
        let time = thread::spawn(move || striking.strike());
        assert!(!event_count.wait(SLEEPY, || false, || clock.remaining()));
        time.join().unwrap();
    });
}

#[test]
fn two_ranks_meet_twice() {
    explore("2 ranks, 2 meetings", Some(3), || {
        let world = World::new(2);
        let results = run(2, move |rank| {
            (0..2).map(|sequence| world.all_reduce(rank, sequence, SLEEPY, unlimited)).collect::<Vec<_>>()
        });
        assert_eq!(results, vec![vec![Ok(()); 2]; 2]);
    });
}

#[test]
fn two_ranks_meet_once() {
    for backoff in [SLEEPY, Backoff { spins: 1, yields: 0 }] {
        explore("2 ranks, 1 sequence", Some(4), move || {
            let world = World::new(2);
            assert_eq!(run(2, move |rank| world.all_reduce(rank, 0, backoff, unlimited)), [Ok(()); 2]);
        });
    }
}

#[test]
fn three_ranks_enter() {
    explore("3 ranks, 1 sequence", Some(2), || {
        let world = World::new(3);
        assert_eq!(run(3, move |rank| world.all_reduce(rank, 0, SLEEPY, unlimited)), [Ok(()); 3]);
    });
    explore("3 ranks, 2 meetings", Some(1), || {
        let world = World::new(3);
        let results = run(3, move |rank| {
            (0..2).map(|sequence| world.all_reduce(rank, sequence, SLEEPY, unlimited)).collect::<Vec<_>>()
        });
        assert_eq!(results, vec![vec![Ok(()); 2]; 3]);
    });
}

#[test]
fn an_abort_at_any_moment_reaches_all() {
    for (size, preemptions) in [(2, Some(2)), (3, Some(1))] {
        explore(&format!("{size} ranks, abort"), preemptions, move || {
            let world = World::new(size);
            let aborting = world.clone();
            let other = thread::spawn(move || aborting.barrier.abort());
            let ranks = world.clone();
            let results = run(size, move |rank| ranks.all_reduce(rank, 0, SLEEPY, unlimited));
            other.join().unwrap();
            all_or_none(&world, &results);
            assert!(results.iter().all(|result| matches!(result, Ok(()) | Err(Interrupted::Aborted))));
            assert_eq!(world.barrier.interruption(), Some(Interrupted::Aborted));
        });
    }
}

#[test]
fn a_rank_that_leaves_is_not_waited_for() {
    explore("2 ranks, one leaves at once", None, || {
        let world = World::new(2);
        let ranks = world.clone();
        let results = run(2, move |rank| match rank {
            0 => ranks.all_reduce(0, 0, SLEEPY, unlimited),
            _ => {
                ranks.barrier.leave();
                Err(Interrupted::Left)
            }
        });
        assert_eq!(results, [Err(Interrupted::Left); 2]);
    });
    explore("2 ranks, one leaves after the first of 2 meetings", Some(3), || {
        let world = World::new(2);
        let ranks = world.clone();
        let results = run(2, move |rank| {
            let first = ranks.all_reduce(rank, 0, SLEEPY, unlimited);
            match rank {
                0 => (first, ranks.all_reduce(0, 1, SLEEPY, unlimited)),
                _ => {
                    ranks.barrier.leave();
                    (first, Err(Interrupted::Left))
                }
            }
        });
        assert_eq!(results, [(Ok(()), Err(Interrupted::Left)); 2]);
    });
    explore("3 ranks, one leaves at once", Some(2), || {
        let world = World::new(3);
        let ranks = world.clone();
        let results = run(3, move |rank| match rank {
            2 => {
                ranks.barrier.leave();
                Err(Interrupted::Left)
            }
            _ => ranks.all_reduce(rank, 0, SLEEPY, unlimited),
        });
        assert_eq!(results, [Err(Interrupted::Left); 3]);
    });
}

#[test]
fn time_runs_out_for_all_or_for_none() {
    // In the first model one rank looks at the clock, in the others all do.
    for (size, watchers, preemptions) in [(2, 1, Some(2)), (2, 2, Some(2)), (3, 3, Some(1))] {
        explore(&format!("{size} ranks, time runs out for {watchers}"), preemptions, move || {
            let world = World::new(size);
            let clock = Clock::of_last_event_count();
            let striking = clock.clone();
            let time = thread::spawn(move || striking.strike());
            let ranks = world.clone();
            let results = run(size, move |rank| {
                ranks.all_reduce(rank, 0, SLEEPY, || if rank < watchers { clock.remaining() } else { unlimited() })
            });
            time.join().unwrap();
            all_or_none(&world, &results);
            let expired = results.iter().filter(|result| **result == Err(Interrupted::Expired)).count();
            assert!(expired <= 1, "one rank alone makes the error: {results:?}");
            assert_eq!(expired == 0, results[0].is_ok(), "somebody makes it: {results:?}");
        });
    }
}

#[test]
fn a_rank_that_never_comes_is_given_up() {
    explore("2 of 3 ranks come, time runs out", Some(2), || {
        let world = World::new(3);
        let clock = Clock::of_last_event_count();
        let striking = clock.clone();
        let time = thread::spawn(move || striking.strike());
        let ranks = world.clone();
        let results = run(2, move |rank| ranks.all_reduce(rank, 0, SLEEPY, || clock.remaining()));
        time.join().unwrap();
        let mut results: Vec<_> = results.into_iter().map(|result| result.unwrap_err()).collect();
        results.sort_by_key(|why| *why == Interrupted::Expired);
        assert_eq!(results, [Interrupted::Aborted, Interrupted::Expired]);
        assert_eq!(world.shares[0].load(SeqCst), 0);
    });
}

/// The same files on the primitives that they run on, for what loom cannot model: unwinding.
#[path = "../../src/comm/local"]
mod plain {
    use super::backoff;

    mod barrier;
    mod event_count;
    mod sync;

    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_rank_that_panics_at_work_departs_when_all_have() {
        let (barrier, working) = (barrier::Barrier::new(3), super::Tally::new(0));
        let backoff = super::Backoff { spins: 10, yields: 10 };
        let enter = |rank: usize, sequence: u64| {
            let remaining = || Some(Duration::from_secs(1));
            let work = |_: &barrier::Descriptors<'_, ()>| match rank {
                // Without a message on the way.
                1 => resume_unwind(Box::new(())),
                _ => {
                    working.fetch_add(1, super::SeqCst);
                    thread::sleep(Duration::from_millis(20));
                    working.fetch_sub(1, super::SeqCst);
                }
            };
            // SAFETY: each rank is one thread and counts its meetings.
            unsafe { barrier.enter(rank, sequence, (), backoff, remaining, work) }
        };
        thread::scope(|scope| {
            for rank in 0..3 {
                let (enter, working) = (&enter, &working);
                scope.spawn(move || {
                    for sequence in 0..3 {
                        let outcome = catch_unwind(AssertUnwindSafe(|| enter(rank, sequence)));
                        assert_eq!(outcome.is_err(), rank == 1);
                        assert_eq!(working.load(super::SeqCst), 0, "nobody is at work on a buffer that is freed");
                    }
                });
            }
        });
    }
}
