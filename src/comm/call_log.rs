//! The last calls of every rank of a group, which errors print.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;

use super::Call;
use crate::lock::lock;

/// Calls remembered per rank.
const REMEMBERED: usize = 8;

/// The last collectives of every rank of a group, as printed under an [`Error`](crate::Error).
#[derive(Clone, PartialEq, Eq, Default)]
pub struct CallLog(Arc<[String]>);

impl CallLog {
    /// A log of these lines.
    pub fn new(lines: impl Iterator<Item = String>) -> Self {
        Self(lines.collect())
    }

    /// One line per rank, in rank order, and one for each rank that waits in another group of the world.
    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for CallLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

impl fmt::Debug for CallLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Debug, Clone, Copy)]
struct LoggedCall {
    number: u64,
    call: Call,
    /// Since when the rank has been waiting in it, if it has.
    waiting_since: Option<Instant>,
    done: bool,
}

/// The last calls of a rank: call `n` is entry `n % REMEMBERED`.
#[derive(Debug, Default)]
struct RankHistory {
    entries: [Option<LoggedCall>; REMEMBERED],
    issued: u64,
}

impl RankHistory {
    fn find(&mut self, number: u64) -> Option<&mut LoggedCall> {
        self.entries[(number % REMEMBERED as u64) as usize].as_mut().filter(|entry| entry.number == number)
    }

    /// The calls remembered, last first.
    fn latest(&self) -> impl Iterator<Item = &LoggedCall> {
        let numbers = (self.issued.saturating_sub(REMEMBERED as u64)..self.issued).rev();
        numbers.filter_map(|number| self.entries[(number % REMEMBERED as u64) as usize].as_ref())
    }
}

/// The last calls of the ranks of one group, from which a transport makes the [`CallLog`] of its errors. Each rank
/// records its own, under a lock that is contended only when another rank writes a report.
///
/// # Panics
/// The methods panic for a rank that is not below the `size` of the group.
#[derive(Debug)]
pub struct CallHistory {
    ranks: Box<[CachePadded<Mutex<RankHistory>>]>,
}

impl CallHistory {
    /// No calls of `size` ranks.
    pub fn new(size: usize) -> Self {
        Self { ranks: (0..size).map(|_| CachePadded::default()).collect() }
    }

    /// Records that `rank` enters `call`. Returns the number of the call for the methods below.
    #[inline]
    pub fn begin(&self, rank: usize, call: &Call) -> u64 {
        let mut history = self.lock(rank);
        let number = history.issued;
        history.issued += 1;
        history.entries[(number % REMEMBERED as u64) as usize] =
            Some(LoggedCall { number, call: *call, waiting_since: None, done: false });
        number
    }

    /// Records that `rank` begins to wait in its call of this number.
    pub fn mark_waiting(&self, rank: usize, number: u64, now: Instant) {
        if let Some(entry) = self.lock(rank).find(number) {
            entry.waiting_since = Some(now);
        }
    }

    /// Records that `rank` is done with its call of this number. A receive may be pending on one thread of the rank
    /// while another runs collectives.
    #[inline]
    pub fn finish(&self, rank: usize, number: u64) {
        if let Some(entry) = self.lock(rank).find(number) {
            entry.done = true;
        }
    }

    /// The call that `rank` is in, if it is in one.
    pub(crate) fn current(&self, rank: usize) -> Option<Call> {
        self.lock(rank).latest().find(|entry| !entry.done).map(|entry| entry.call)
    }

    /// Whether `rank` is in a call that agrees with this one.
    pub fn is_in(&self, rank: usize, call: &Call) -> bool {
        self.lock(rank).latest().any(|entry| !entry.done && entry.call.agrees(call))
    }

    /// How long `rank` has been waiting in a call that agrees with this one, if it is in one.
    pub(crate) fn time_in(&self, rank: usize, call: &Call, now: Instant) -> Option<Duration> {
        let history = self.lock(rank);
        let entry = history.latest().find(|entry| !entry.done && entry.call.agrees(call))?;
        Some(entry.waiting_since.map_or(Duration::ZERO, |then| now.saturating_duration_since(then)))
    }

    /// One line per rank.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        (0..self.ranks.len()).map(|rank| self.line(rank))
    }

    /// The lines of the ranks that are in a call.
    pub fn waiting(&self) -> impl Iterator<Item = String> {
        let waits = |rank: &usize| self.lock(*rank).latest().any(|entry| !entry.done);
        (0..self.ranks.len()).filter(waits).map(|rank| self.line(rank))
    }

    /// What one rank called last.
    pub fn line(&self, rank: usize) -> String {
        let history = self.lock(rank);
        if history.issued == 0 {
            return format!("rank {rank}: nothing yet");
        }
        let calls: Vec<String> = history
            .latest()
            .map(|entry| match (entry.done, entry.waiting_since) {
                (true, _) => format!("#{} {}", entry.number, entry.call),
                (false, None) => format!("#{} {} (just begun)", entry.number, entry.call),
                (false, Some(then)) => format!("#{} {} (waiting for {:.1?})", entry.number, entry.call, then.elapsed()),
            })
            .collect();
        format!("rank {rank}: {}", calls.join(" < "))
    }

    #[inline]
    fn lock(&self, rank: usize) -> MutexGuard<'_, RankHistory> {
        lock(&self.ranks[rank])
    }
}

/// Names the ranks that have not entered a call.
pub(crate) fn describe_missing(ranks: impl Iterator<Item = usize>) -> String {
    let ranks: Vec<String> = ranks.map(|rank| rank.to_string()).collect();
    match &ranks[..] {
        [] => "nobody any more: the last one came as time ran out".into(),
        [one] => format!("rank {one}"),
        _ => format!("ranks {}", ranks.join(", ")),
    }
}
