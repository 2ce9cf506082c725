//! How long a call has lasted.

use std::time::{Duration, Instant};

use super::group::Group;
use crate::comm::Call;

/// One call of a rank, in the log from its beginning, and timed from when it goes to sleep: most never do, and reading
/// the time costs as much as a small collective.
pub(super) struct Clock<'a> {
    group: &'a Group,
    rank: usize,
    number: u64,
    asleep_since: Option<Instant>,
}

impl<'a> Clock<'a> {
    pub fn new(group: &'a Group, rank: usize, call: &Call) -> Self {
        Self { group, rank, number: group.watch.begin(rank, call), asleep_since: None }
    }

    /// What is left of the time-out; called by whoever is about to sleep.
    pub fn remaining(&mut self) -> Option<Duration> {
        let since = *self.asleep_since.get_or_insert_with(|| {
            let now = Instant::now();
            self.group.watch.sleeps(self.rank, self.number, now);
            now
        });
        self.group.timeout.checked_sub(since.elapsed()).filter(|left| !left.is_zero())
    }

    pub fn elapsed(&self) -> Duration {
        self.asleep_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub fn finish(&self) {
        self.group.watch.finish(self.rank, self.number);
    }
}
