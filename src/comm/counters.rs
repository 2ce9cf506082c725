//! Counts the calls, bytes and time of a communicator, by operation.

use std::collections::BTreeMap;
use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::ticks::Ticks;
use super::{Call, Operation};

/// Calls, bytes and time of one kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Calls that succeeded.
    pub calls: u64,
    /// Bytes that this rank moved: read from peers plus written to peers. For an all-reduce of `S` bytes over `n` ranks
    /// that is `2 (n - 1) / n * S`, the lower bound, when `n` divides the elements.
    pub bytes: u64,
    /// Of these bytes, those that went from device to device without passing through the host; 0 for tensors in host
    /// memory.
    pub on_device: u64,
    /// Time from the call to its end, waiting for peers included.
    pub time: Duration,
}

/// A snapshot of what a communicator has done since it was made, by operation.
///
/// Subtract an earlier snapshot to get what a step did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters(BTreeMap<&'static str, Tally>);

impl Counters {
    /// The tally of one operation, named as the method of [`Communicator`](super::Communicator): `"all_reduce"`.
    pub fn of(&self, operation: &str) -> Tally {
        self.0.get(operation).copied().unwrap_or_default()
    }

    /// All operations that were called.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Tally)> {
        self.0.iter().map(|(name, tally)| (*name, *tally))
    }

    /// Over all operations.
    pub fn total(&self) -> Tally {
        self.0.values().fold(Tally::default(), |sum, tally| Tally {
            calls: sum.calls + tally.calls,
            bytes: sum.bytes + tally.bytes,
            on_device: sum.on_device + tally.on_device,
            time: sum.time + tally.time,
        })
    }
}

impl Add for Counters {
    type Output = Counters;

    /// What two communicators have done together.
    fn add(mut self, other: Counters) -> Counters {
        for (name, more) in other.0 {
            let tally = self.0.entry(name).or_default();
            tally.calls += more.calls;
            tally.bytes += more.bytes;
            tally.on_device += more.on_device;
            tally.time += more.time;
        }
        self
    }
}

impl Sub for Counters {
    type Output = Counters;

    fn sub(self, earlier: Counters) -> Counters {
        let since = |name: &'static str, now: Tally| {
            let then = earlier.of(name);
            let tally = Tally {
                calls: now.calls.saturating_sub(then.calls),
                bytes: now.bytes.saturating_sub(then.bytes),
                on_device: now.on_device.saturating_sub(then.on_device),
                time: now.time.saturating_sub(then.time),
            };
            (name, tally)
        };
        Counters(self.0.iter().map(|(name, tally)| since(name, *tally)).filter(|(_, t)| t.calls > 0).collect())
    }
}

/// The running totals behind [`Counters`]: one entry for each operation, updated without a lock.
#[derive(Debug)]
pub(crate) struct RunningCounters {
    clock: Ticks,
    tallies: [RunningTally; Operation::NAMES.len()],
}

#[derive(Debug, Default)]
struct RunningTally {
    calls: AtomicU64,
    bytes: AtomicU64,
    on_device: AtomicU64,
    ticks: AtomicU64,
}

impl RunningCounters {
    pub fn new() -> Self {
        Self { clock: Ticks::new(), tallies: Default::default() }
    }

    /// The time, as [`add`](Self::add) wants to have it.
    #[inline]
    pub fn now(&self) -> u64 {
        self.clock.now()
    }

    /// Counts a call that began at `began` and ends now.
    #[inline]
    pub fn add(&self, call: &Call, bytes: u64, began: u64) {
        let tally = &self.tallies[call.operation.index()];
        if call.is_on_device() {
            tally.on_device.fetch_add(bytes, Relaxed);
        }
        tally.calls.fetch_add(1, Relaxed);
        tally.bytes.fetch_add(bytes, Relaxed);
        tally.ticks.fetch_add(self.now().saturating_sub(began).max(1), Relaxed);
    }

    pub fn snapshot(&self) -> Counters {
        let read = |tally: &RunningTally| Tally {
            calls: tally.calls.load(Relaxed),
            bytes: tally.bytes.load(Relaxed),
            on_device: tally.on_device.load(Relaxed),
            time: self.clock.duration(tally.ticks.load(Relaxed)),
        };
        let tallies = self.tallies.iter().map(read);
        Counters(Operation::NAMES.into_iter().zip(tallies).filter(|(_, tally)| tally.calls > 0).collect())
    }
}
