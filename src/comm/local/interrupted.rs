//! What becomes of a wait that ends before what it waits for.

use std::time::{Duration, Instant};

use super::bell::Patience;
use super::group::lock;
use super::rendezvous::Interrupted;
use super::transport::LocalTransport;
use crate::Error;
use crate::comm::blame::{Waits, waits_for};
use crate::comm::watch::missed;
use crate::comm::{Call, Operation};

/// How long a rank that finds a peer gone waits for the reason, which may be on its way: a rank drops its communicators
/// while it unwinds, before whoever started it can tell why.
const GRACE: Duration = Duration::from_millis(100);

/// How long a rank that finds the group aborted waits for the error. Whoever runs out of time aborts first and writes the
/// error then, so this is a matter of microseconds; the limit is there because every wait has one.
const WRITING: Duration = Duration::from_secs(10);

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
        match why {
            Interrupted::Aborted => {
                self.told(WRITING);
            }
            Interrupted::Expired => group.fate.fail(Error::Timeout {
                group: group.name.clone(),
                rank: self.rank,
                operation: call.to_string(),
                waited,
                missing: missing(),
                log: group.log(),
            }),
            Interrupted::Left => {
                let waited_for = |rank: usize| match call.operation {
                    Operation::Receive { from, .. } => rank == from,
                    _ => true,
                };
                let gone = lock(&group.left).iter().copied().find(|(rank, _)| waited_for(*rank));
                // The list is not locked any more: failing rings the bell, under whose lock receivers look at the list.
                if !self.told(GRACE)
                    && let Some((rank, panicked)) = gone
                {
                    let (name, operation, log) = (group.name.clone(), call.to_string(), group.log());
                    group.fate.fail(match panicked {
                        true => {
                            let message = "see its own message".into();
                            Error::RankPanicked { rank: group.members[rank], message, log }
                        }
                        false => Error::RankLost { group: name, rank, operation, log },
                    });
                }
            }
        }
        self.failure_or_abort()
    }

    /// Waits for the error of the world, and no longer than `limit`. Returns whether it is there.
    fn told(&self, limit: Duration) -> bool {
        let group = &*self.group;
        let since = Instant::now();
        let remaining = || limit.checked_sub(since.elapsed()).filter(|left| !left.is_zero());
        let told = || group.fate.error().is_some();
        group.rendezvous.bell.wait(Patience { spins: 0, yields: 0 }, told, remaining)
    }

    pub(super) fn fail(&self, error: Error) -> Error {
        self.group.fate.fail(error);
        self.failure_or_abort()
    }

    /// The world's error. One is always set before a group is interrupted; should it not be, this says so.
    pub(super) fn failure_or_abort(&self) -> Error {
        self.group.fate.error().cloned().unwrap_or_else(|| Error::Aborted {
            group: self.group.name.clone(),
            rank: self.rank,
            reason: "the group was interrupted without a reason".into(),
            log: self.group.log(),
        })
    }

    /// Who has not come to `call`, in words.
    pub(super) fn absent(&self, call: &Call) -> String {
        let (watch, members) = (&self.group.watch, &self.group.members);
        let late: Vec<usize> = (0..self.group.size()).filter(|rank| !watch.is_in(*rank, call)).collect();
        let said = missed(late.iter().copied());
        let groups = self.group.fate.groups();
        let ranks = groups.iter().flat_map(|group| group.members.iter()).max().map_or(0, |last| last + 1);
        let (mut waits, ended) = (vec![Some(Vec::new()); ranks], vec![false; ranks]);
        for group in &groups {
            for (rank, member) in group.members.iter().enumerate() {
                waits[*member].get_or_insert_default().extend(waits_for(&group.watch, &group.members, rank));
            }
        }
        let whole = members.len() == ranks;
        Waits { members, whole, waits_for: &waits, ended: &ended }.blame(Some(&late), said)
    }
}
