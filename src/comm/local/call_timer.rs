//! Times one call of a rank and records it in the call history.

use std::time::{Duration, Instant};

use super::group::Group;
use crate::comm::Call;

/// One call of a rank, recorded from its beginning, and timed from when it first sleeps: most calls never do, and
/// reading the clock costs as much as a small collective.
pub(super) struct CallTimer<'a> {
    group: &'a Group,
    rank: usize,
    number: u64,
    asleep_since: Option<Instant>,
}

impl<'a> CallTimer<'a> {
    pub fn new(group: &'a Group, rank: usize, call: &Call) -> Self {
        Self { group, rank, number: group.history.begin(rank, call), asleep_since: None }
    }

    /// What is left of the time-out; called before the rank sleeps.
    pub fn remaining(&mut self) -> Option<Duration> {
        let since = *self.asleep_since.get_or_insert_with(|| {
            let now = Instant::now();
            self.group.history.mark_waiting(self.rank, self.number, now);
            now
        });
        self.group.timeout.checked_sub(since.elapsed()).filter(|left| !left.is_zero())
    }

    pub fn elapsed(&self) -> Duration {
        self.asleep_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub fn finish(&self) {
        self.group.history.finish(self.rank, self.number);
    }
}
