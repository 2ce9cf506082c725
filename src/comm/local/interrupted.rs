//! Turns an interrupted wait into the error of the world.

use std::time::{Duration, Instant};

use super::barrier::Interrupted;
use super::transport::LocalTransport;
use crate::Error;
use crate::comm::backoff::Backoff;
use crate::comm::call_log::describe_missing;
use crate::comm::departed::{GRACE, rank_lost};
use crate::comm::wait_graph::{WaitGraph, waits_for};
use crate::comm::{Call, Operation};
use crate::lock::lock;

/// How long a rank that finds the group aborted waits for the error. The rank whose time runs out aborts first and
/// writes the error then, so this takes microseconds; the limit is there because every wait has one.
const ERROR_WRITE_LIMIT: Duration = Duration::from_secs(10);

impl LocalTransport {
    /// Turns an interrupted wait into the error of the world.
    pub(super) fn interrupted(
        &self,
        why: Interrupted,
        call: &Call,
        waited: Duration,
        missing: impl FnOnce() -> String,
    ) -> Error {
        let group = &*self.group;
        let waited_for = |rank: usize| match call.operation {
            Operation::Receive { from, .. } => rank == from,
            _ => true,
        };
        let lost = |(rank, panicked): (usize, bool)| {
            let ranks = (rank, group.members[rank]);
            rank_lost(&group.name, ranks, panicked, call.to_string(), group.log())
        };
        match why {
            Interrupted::Aborted => {
                self.wait_for_failure(ERROR_WRITE_LIMIT);
            }
            Interrupted::Expired => {
                let dropped = group.world_failure.dropped_by(group);
                let dropped = dropped.into_iter().find(|(rank, _)| waited_for(*rank));
                group.world_failure.fail(dropped.map(lost).unwrap_or_else(|| Error::Timeout {
                    group: group.name.clone(),
                    rank: self.rank,
                    operation: call.to_string(),
                    waited,
                    missing: missing(),
                    log: group.log(),
                }));
            }
            Interrupted::Left => {
                let gone = lock(&group.left).iter().copied().find(|(rank, _)| waited_for(*rank));
                // The list is unlocked here: failing notifies the eventcount, under whose lock receivers read the list.
                if !self.wait_for_failure(GRACE)
                    && let Some(gone) = gone
                {
                    group.world_failure.fail(lost(gone));
                }
            }
        }
        self.failure_or_abort()
    }

    /// Waits for the error of the world, up to `limit`. Returns whether it is there.
    fn wait_for_failure(&self, limit: Duration) -> bool {
        let group = &*self.group;
        let since = Instant::now();
        let remaining = || limit.checked_sub(since.elapsed()).filter(|left| !left.is_zero());
        let failed = || group.world_failure.error().is_some();
        group.barrier.event_count.wait(Backoff::SLEEP, failed, remaining)
    }

    pub(super) fn fail(&self, error: Error) -> Error {
        self.group.world_failure.fail(error);
        self.failure_or_abort()
    }

    /// The world's error. One is always set before a group is interrupted; should it not be, this says so.
    pub(super) fn failure_or_abort(&self) -> Error {
        self.group.world_failure.error().cloned().unwrap_or_else(|| Error::Aborted {
            group: self.group.name.clone(),
            rank: self.rank,
            reason: "the group was interrupted without a reason".into(),
            log: self.group.log(),
        })
    }

    /// The ranks that have not entered `call`, in words, and first the ranks for which these wait.
    pub(super) fn missing_ranks(&self, call: &Call) -> String {
        let (history, members) = (&self.group.history, &self.group.members);
        let late: Vec<usize> = (0..self.group.size()).filter(|rank| !history.is_in(*rank, call)).collect();
        let groups = self.group.world_failure.groups();
        let ranks = groups.iter().flat_map(|group| group.members.iter()).max().map_or(0, |last| last + 1);
        let (mut waits, finished) = (vec![Some(Vec::new()); ranks], vec![false; ranks]);
        for group in &groups {
            for (rank, member) in group.members.iter().enumerate() {
                waits[*member].get_or_insert_default().extend(waits_for(&group.history, &group.members, rank));
            }
        }
        let whole = members.len() == ranks;
        let graph = WaitGraph { members, whole, waits_for: &waits, finished: &finished };
        graph.describe(Some(&late), describe_missing(late.iter().copied()))
    }
}
