//! Makes the ranks of a group agree on their next collective; the [module](super) describes the protocol.

mod messages;
mod shared_memory;

use std::time::Duration;

use super::call_descriptor::CallDescriptor;
use super::control_path::ControlPath;
use super::group::Group;
use super::wait::Wait;
use super::world::{Proposal, World};
use crate::Error;
use crate::comm::departed::{GRACE, rank_lost};
use crate::comm::{CallLog, Operation};
use crate::lock::lock;

/// How long a rank waits for the commit once the world has failed.
const COMMIT_GRACE: Duration = Duration::from_secs(2);

/// One rank's part in the agreement on a collective.
pub(super) struct Agreement<'a> {
    pub world: &'a World,
    pub group: &'a Group,
    /// Number of this agreement.
    pub sequence: u64,
    /// Number of the collective, for errors.
    pub reported_sequence: u64,
    pub descriptor: CallDescriptor,
    /// Number of this call in the call history.
    pub number: u64,
}

impl Agreement<'_> {
    /// Agrees with the others. Returns the descriptors of all ranks, and the number of the group that the root has made
    /// for them, if this is a split.
    pub fn run(&self, control_path: &mut ControlPath) -> Result<(Vec<CallDescriptor>, u64), Error> {
        if let Some((shared_memory, rounds)) = control_path.shared_memory(self.group) {
            return self.in_shared_memory(shared_memory, rounds);
        }
        self.by_messages(control_path)
    }

    /// The group root commits the collective, unless the calls do not match or the world has failed. Returns the number
    /// of the group that a split makes.
    fn commit(&self, descriptors: &[CallDescriptor]) -> Result<u64, Error> {
        if !agree(descriptors) {
            let calls = descriptors.iter().map(|descriptor| descriptor.call).collect();
            let (group, log) = (self.group.name.clone(), CallLog::default());
            return Err(self.fail(Error::Mismatch { group, sequence: self.reported_sequence, calls, log }));
        }
        let id = match descriptors[0].call.operation {
            Operation::Split => self.world.new_group_id()?,
            _ => 0,
        };
        let mut state = lock(&self.group.commit_state);
        match (state.closed, self.world.failure()) {
            (true, Some(error)) => Err(error.clone()),
            _ => {
                state.committed += 1;
                Ok(id)
            }
        }
    }

    fn is_group(&self, id: u64) -> bool {
        id < Group::most(self.world.endpoint.info().tags)
    }

    fn garbled(&self) -> Error {
        let problem = "a call is garbled: do all ranks run this program?".into();
        self.fail(Error::Transport { transport: self.world.endpoint.name(), problem })
    }

    /// Waits until `ready`, or until the world has failed.
    fn wait(&self, mut wait: Wait<'_>, mut ready: impl FnMut() -> Result<bool, Error>) -> Result<(), Error> {
        let (mut gone_since, mut over_since) = (None, None);
        while !ready()? {
            let Some(waited) = wait.pause() else { continue };
            if let Some(error) = self.world.failure() {
                if self.is_over(waited, over_since.get_or_insert(waited)) {
                    return Err(error.clone());
                }
                continue;
            }
            self.group.history.mark_waiting(self.group.rank, self.number, self.world.endpoint.now() - waited);
            if let Some((rank, panicked)) = self.gone() {
                if waited - *gone_since.get_or_insert(waited) > GRACE {
                    let ranks = (rank, self.group.members.get(rank).copied().unwrap_or(rank));
                    let (operation, log) = (self.descriptor.call.to_string(), CallLog::default());
                    self.propose(rank_lost(&self.group.name, ranks, panicked, operation, log));
                }
            } else if waited > self.world.timeout {
                self.propose(Error::Timeout {
                    group: self.group.name.clone(),
                    rank: self.group.rank,
                    operation: self.descriptor.call.to_string(),
                    waited,
                    // The coordinator finds out.
                    missing: String::new(),
                    log: CallLog::default(),
                });
            }
        }
        Ok(())
    }

    /// Whether this collective will not be committed any more. Only the group root knows.
    fn is_over(&self, waited: Duration, since: &Duration) -> bool {
        match self.group.rank {
            0 => true,
            _ if self.world.is_lost(self.group.members[0]) => true,
            _ => match self.group.closed.get() {
                Some(committed) => *committed <= self.sequence,
                None => waited.saturating_sub(*since) > self.world.phase_limit(COMMIT_GRACE),
            },
        }
    }

    /// A member that has left before this collective.
    fn gone(&self) -> Option<(usize, bool)> {
        let left = lock(&self.group.left);
        left.iter().find(|left| left.collectives <= self.sequence).map(|left| (left.rank, left.panicked))
    }

    fn propose(&self, error: Error) {
        self.world.propose(self.proposal(error));
    }

    fn fail(&self, error: Error) -> Error {
        self.world.fail(self.proposal(error))
    }

    fn proposal(&self, error: Error) -> Proposal {
        Proposal::new(self.group, error, Some((self.sequence, self.descriptor.call)))
    }
}

/// Whether the calls of all ranks match. A call without a dtype matches any; the others agree on one.
fn agree(descriptors: &[CallDescriptor]) -> bool {
    let mut dtypes = descriptors.iter().filter_map(|descriptor| descriptor.call.dtype);
    let first = dtypes.next();
    dtypes.all(|dtype| Some(dtype) == first)
        && descriptors.iter().all(|descriptor| descriptor.call.agrees(&descriptors[0].call))
}
