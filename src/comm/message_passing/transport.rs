//! The `Transport` over an endpoint.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::agreement::Agreement;
use super::call_descriptor::CallDescriptor;
use super::collectives::{self, CollectiveRun};
use super::control_path::ControlPath;
use super::group::Group;
use super::point_to_point;
use super::shared_memory::{Rounds, SharedMemory};
use super::wait::Wait;
use super::world::{Membership, Proposal, World};
use crate::Error;
use crate::comm::departed::{GRACE, rank_lost};
use crate::comm::transport::check_rank;
use crate::comm::{Call, CallLog, CallShape, Message, Operation, Transfer, Transport};
use crate::lock::lock;

#[derive(Debug)]
pub(super) struct MessagePassingTransport {
    membership: Arc<Membership>,
    group: Arc<Group>,
    /// Locked during a collective: a rank does one at a time.
    state: Mutex<GroupState>,
    panicked: AtomicBool,
}

/// The position of this rank in the collectives of a group.
#[derive(Debug)]
struct GroupState {
    /// Number of the next agreement.
    sequence: u64,
    /// Agreements so far beyond the first of a collective.
    extra: u64,
    control_path: ControlPath,
    /// Memory that collectives work in.
    scratch: Vec<u64>,
}

/// A collective that is committed. It is over when this is dropped.
struct CommittedCollective<'a> {
    state: MutexGuard<'a, GroupState>,
    group: &'a Group,
    /// Of the call, in the call history.
    number: u64,
    /// Whether its last agreement was committed.
    complete: bool,
    descriptors: Vec<CallDescriptor>,
    /// Number of the group that a split makes.
    id: u64,
    in_shared_memory: bool,
}

impl CommittedCollective<'_> {
    /// The shared memory that they have agreed in.
    fn shared_memory(&mut self) -> Option<(&SharedMemory, &mut Rounds)> {
        self.state.control_path.shared_memory(self.group).filter(|_| self.in_shared_memory)
    }

    /// Agrees once more in the same collective. Returns the number of each rank.
    fn enter_again(&mut self, world: &World, call: &Call, value: u64) -> Result<Vec<u64>, Error> {
        self.next_round();
        let (group, state) = (self.group, &mut *self.state);
        (self.complete, self.in_shared_memory) = (false, state.control_path.shared_memory(group).is_some());
        state.extra += 1;
        let descriptor = CallDescriptor { call: *call, color: value, key: 0, attached: state.control_path.attached() };
        let (sequence, number) = (state.sequence, self.number);
        let agreement =
            Agreement { world, group, sequence, reported_sequence: sequence - state.extra, descriptor, number };
        let (descriptors, _) = agreement.run(&mut state.control_path)?;
        state.sequence += 1;
        self.complete = true;
        Ok(descriptors.iter().map(|descriptor| descriptor.color).collect())
    }

    /// An agreement is over.
    fn next_round(&mut self) {
        if let Some((_, rounds)) = self.shared_memory() {
            rounds.next_round();
        }
        if self.complete {
            self.group.done.fetch_add(1, Ordering::Release);
        }
    }
}

impl Drop for CommittedCollective<'_> {
    fn drop(&mut self) {
        self.next_round();
        self.group.history.finish(self.group.rank, self.number);
    }
}

impl MessagePassingTransport {
    pub fn new(membership: Arc<Membership>, group: Arc<Group>) -> Arc<Self> {
        membership.0.add(&group);
        let control_path = ControlPath::new(membership.0.endpoint.info().shares_memory, group.size());
        let state = Mutex::new(GroupState { sequence: 0, extra: 0, control_path, scratch: Vec::new() });
        Arc::new(Self { membership, group, state, panicked: AtomicBool::new(false) })
    }

    fn world(&self) -> &World {
        &self.membership.0
    }

    /// Before each call: the world has not failed, and the others hear of what this rank has dropped.
    fn goes_on(&self) -> Result<(), Error> {
        self.has_not_failed()?;
        self.world().goes_on();
        Ok(())
    }

    fn has_not_failed(&self) -> Result<(), Error> {
        self.world().failure().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Agrees with the others on their next collective. `prepare` is called before, if that is in shared memory.
    fn enter(
        &self,
        descriptor: CallDescriptor,
        prepare: impl FnOnce(&SharedMemory, &Rounds),
    ) -> Result<CommittedCollective<'_>, Error> {
        let (world, group) = (self.world(), &*self.group);
        let mut state = lock(&self.state);
        self.goes_on()?;
        world.last_group.store(group.id, Ordering::Relaxed);
        let number = group.history.begin(group.rank, &descriptor.call);
        let descriptor = CallDescriptor { attached: state.control_path.attached(), ..descriptor };
        let in_shared_memory = state
            .control_path
            .shared_memory(group)
            .map(|(shared_memory, rounds)| prepare(shared_memory, rounds))
            .is_some();
        let sequence = state.sequence;
        let agreement =
            Agreement { world, group, sequence, reported_sequence: sequence - state.extra, descriptor, number };
        let (descriptors, id) = agreement.run(&mut state.control_path)?;
        state.sequence += 1;
        Ok(CommittedCollective { state, group, number, complete: true, descriptors, id, in_shared_memory })
    }

    /// Waits for a message that is not there yet.
    fn wait_for(&self, from: usize, tag: u64) -> Result<Message, Error> {
        let (world, group) = (self.world(), &*self.group);
        let call = Call::new(Operation::Receive { from, tag }, None, CallShape::flat(0));
        let number = group.history.begin(group.rank, &call);
        let mut wait = Wait::new(world, false);
        let mut gone_since = None;
        loop {
            // Read before the inbox: what the sender sent before it left is still received.
            let left = lock(&group.left).iter().find(|left| left.rank == from).copied();
            let (came, tags) = {
                let mut inbox = lock(&group.inboxes[from]);
                inbox.fill(world, group, from, tag)?;
                let (message, coming) = inbox.get(world, from, tag)?;
                if let Some(message) = message {
                    group.history.finish(group.rank, number);
                    return Ok(message);
                }
                // A message that is being received is not missing.
                (if coming { 0 } else { inbox.came }, inbox.tags())
            };
            let Some(waited) = wait.pause() else { continue };
            if let Some(error) = world.failure() {
                return Err(error.clone());
            }
            group.history.mark_waiting(group.rank, number, world.endpoint.now() - waited);
            if let Some(left) = left.filter(|left| left.messages <= came) {
                if waited - *gone_since.get_or_insert(waited) > GRACE {
                    let (ranks, log) = ((from, group.members[from]), CallLog::default());
                    let error = rank_lost(&group.name, ranks, left.panicked, call.to_string(), log);
                    world.propose(Proposal::new(group, error, None));
                }
            } else if waited > world.timeout {
                let error = Error::Timeout {
                    group: group.name.clone(),
                    rank: group.rank,
                    operation: call.to_string(),
                    waited,
                    missing: format!("rank {from}; tags that it has sent and nobody has read: {tags:?}"),
                    log: CallLog::default(),
                };
                world.propose(Proposal::new(group, error, None));
            }
        }
    }
}

impl Transport for MessagePassingTransport {
    fn name(&self) -> &'static str {
        self.world().endpoint.name()
    }

    fn group(&self) -> &Arc<str> {
        &self.group.name
    }

    fn rank(&self) -> usize {
        self.group.rank
    }

    fn world_rank(&self) -> usize {
        self.world().endpoint.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn gathers_in_place(&self) -> bool {
        true
    }

    fn collective(&self, call: &Call, transfer: Transfer<'_, '_>) -> Result<u64, Error> {
        let descriptor = CallDescriptor { call: *call, color: 0, key: 0, attached: false };
        let mut committed = self.enter(descriptor, |shared_memory, rounds| {
            collectives::write_slot(shared_memory, rounds, call, &transfer)
        })?;
        let calls: Vec<Call> = committed.descriptors.iter().map(|descriptor| descriptor.call).collect();
        let scratch = RefCell::new(std::mem::take(&mut committed.state.scratch));
        let collective = CollectiveRun { world: self.world(), group: &self.group, call, calls: &calls, scratch };
        let shared_memory =
            committed.shared_memory().filter(|(shared_memory, _)| collectives::all_fit(shared_memory, &calls));
        let outcome = match (transfer, shared_memory) {
            (Transfer::Nothing, _) => Ok(0),
            (Transfer::InPlace(buffers), shared_memory) => collective.in_place(buffers, shared_memory),
            (Transfer::OutOfPlace { input, output }, Some((shared_memory, rounds))) => {
                collective.out_of_place(input, output, Some((shared_memory, &*rounds)), &mut |_| Ok(Vec::new()))
            }
            (Transfer::OutOfPlace { input, output }, None) => {
                collective
                    .out_of_place(input, output, None, &mut |number| committed.enter_again(self.world(), call, number))
            }
        };
        committed.state.scratch = collective.scratch.into_inner();
        outcome
    }

    fn send(&self, to: usize, tag: u64, message: Message) -> Result<(), Error> {
        check_rank(self, to, "send")?;
        self.goes_on()?;
        point_to_point::send(self.world(), &self.group, to, tag, message)
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Message, Error> {
        self.world().goes_on();
        let arrived = self.try_receive(from, tag)?;
        // Only a receive that has to wait is recorded in the call history.
        arrived.map_or_else(|| self.wait_for(from, tag), Ok)
    }

    fn try_receive(&self, from: usize, tag: u64) -> Result<Option<Message>, Error> {
        check_rank(self, from, "recv")?;
        self.has_not_failed()?;
        let mut inbox = lock(&self.group.inboxes[from]);
        inbox.fill(self.world(), &self.group, from, tag)?;
        Ok(inbox.get(self.world(), from, tag)?.0)
    }

    fn timeout(&self) -> Duration {
        self.world().timeout
    }

    fn split(&self, name: &str, color: u64, key: i64) -> Result<Arc<dyn Transport>, Error> {
        let call = Call::split(name);
        let committed = self.enter(CallDescriptor { call, color, key, attached: false }, |_, _| {})?;
        let mut members: Vec<(i64, usize)> = (committed.descriptors.iter().enumerate())
            .filter(|(_, other)| other.color == color)
            .map(|(rank, other)| (other.key, rank))
            .collect();
        members.sort_unstable();
        let rank = members.iter().position(|(_, rank)| *rank == self.group.rank).unwrap_or_default();
        let members = members.into_iter().map(|(_, rank)| self.group.members[rank]).collect();
        let group = Group::new(committed.id, format!("{}/{name}{color}", self.group.name).into(), members, rank);
        Ok(Self::new(self.membership.clone(), group))
    }

    fn abort(&self, error: Error) {
        if self.world().failure().is_none() {
            self.world().fail(Proposal::new(&self.group, error, None));
        }
    }

    fn leave(&self) {
        self.world().leave_world();
    }

    fn panicking(&self) {
        self.panicked.store(true, Ordering::Relaxed);
    }

    fn failure(&self) -> Option<Error> {
        self.world().poll_control();
        self.world().failure().cloned()
    }

    fn log(&self) -> CallLog {
        CallLog::new(std::iter::once(self.group.history.line(self.group.rank)))
    }
}

impl Drop for MessagePassingTransport {
    fn drop(&mut self) {
        self.world().drops(self.group.clone(), self.panicked.load(Ordering::Relaxed));
    }
}
