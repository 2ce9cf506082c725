//! Fails a world: a rank proposes an error, the coordinator queries all ranks, and broadcasts the error with their
//! calls.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::World;
use super::control_message::{ControlMessage, Proposal, RankReport};
use crate::Error;
use crate::comm::CallLog;
use crate::comm::call_log::describe_missing;
use crate::comm::message_passing::codec::with_log;
use crate::comm::message_passing::group::Group;
use crate::comm::wait_graph::{WaitGraph, waits_for};
use crate::lock::lock;

/// How long a coordinator waits for the reports of the others.
const INQUIRY_LIMIT: Duration = Duration::from_millis(500);
/// What waits for a lost rank, if this rank does not.
const NOBODY: &str = "nobody";
/// How the words begin by which a rank names itself.
const ITSELF: &str = "itself: the process of rank ";
/// How long a rank that has proposed an error waits for the coordinator's query before it turns to the next rank.
const COORDINATOR_SILENCE: Duration = Duration::from_secs(3);

/// An inquiry of the coordinator: it queries all ranks before it broadcasts the error.
#[derive(Debug)]
pub(super) struct Inquiry {
    pub proposal: Proposal,
    pub reports: Vec<Option<RankReport>>,
    pub since: Instant,
}

impl World {
    /// Fails the world. The coordinator takes the first proposal, whoever makes it.
    pub(in crate::comm::message_passing) fn propose(&self, mut proposal: Proposal) {
        self.blame_itself(&mut proposal);
        {
            let mut proposed = lock(&self.proposed);
            if self.failure.get().is_some() || proposed.is_some() {
                return;
            }
            *proposed = Some((proposal.clone(), self.endpoint.now()));
        }
        self.submit(&proposal);
        self.poll_control();
    }

    /// Where this process did not run for so long that the others gave it up, they are not to blame for having gone.
    /// What they said of it may not have come through.
    fn blame_itself(&self, proposal: &mut Proposal) {
        let Some(waited) = self.given_up() else { return };
        let (group, operation, log) = match &mut proposal.error {
            Error::Timeout { group, operation, log, .. } | Error::RankLost { group, operation, log, .. } => {
                (group.clone(), std::mem::take(operation), std::mem::take(log))
            }
            _ => return,
        };
        let world_rank = self.endpoint.rank();
        let rank = proposal.members.iter().position(|member| *member == world_rank).unwrap_or_default();
        let operation = if operation == NOBODY { "no call".into() } else { operation };
        let missing =
            format!("{ITSELF}{world_rank} of the world did not run for that long, so the others have given it up");
        proposal.error = Error::Timeout { group, rank, operation, waited, missing, log };
        proposal.call = None;
    }

    fn submit(&self, proposal: &Proposal) {
        self.send_control(self.coordinator(), &ControlMessage::Propose(proposal.clone()));
    }

    /// Turns to the next rank if the coordinator has not queried anybody: its process is stopped, or has ended.
    pub(super) fn repropose(&self) {
        if self.failure.get().is_some() {
            return;
        }
        let proposal = {
            let mut proposed = lock(&self.proposed);
            let Some((proposal, since)) = proposed.as_mut() else { return };
            let silence = self.phase_limit(COORDINATOR_SILENCE);
            let queried = lock(&self.last_query).is_some_and(|(_, when)| self.elapsed(when) <= silence);
            if queried || self.elapsed(*since) <= silence {
                return;
            }
            let coordinator = self.coordinator();
            if coordinator != self.endpoint.rank() {
                log::warn!(
                    "rank {} has no answer from rank {coordinator} on how the world fails",
                    self.endpoint.rank()
                );
                self.unresponsive[coordinator].store(true, Ordering::Release);
            }
            *since = self.endpoint.now();
            proposal.clone()
        };
        self.submit(&proposal);
    }

    /// A rank proposes an error: to that rank at least, this one is the coordinator.
    pub(super) fn start_inquiry(&self, by: usize, proposal: Proposal) {
        if let Some(error) = self.failure.get() {
            // It has missed the failure.
            return self.send_control(by, &ControlMessage::Failed(error.clone()));
        }
        // Another coordinator is at work. Should it fall silent, the proposal comes again.
        let queried = lock(&self.last_query).is_some_and(|(by, when)| {
            by != self.endpoint.rank()
                && !self.is_lost(by)
                && self.elapsed(when) <= self.phase_limit(COORDINATOR_SILENCE)
        });
        let mut inquiry = lock(&self.inquiry);
        if inquiry.is_some() || queried {
            return;
        }
        let reports = vec![None; self.endpoint.size()];
        *inquiry = Some(Inquiry { proposal: proposal.clone(), reports, since: self.endpoint.now() });
        drop(inquiry);
        self.broadcast_control(&ControlMessage::Query(proposal));
    }

    /// A coordinator queries this rank. Of two coordinators the lower one goes on, so that all get one error.
    pub(super) fn answer_query(&self, by: usize, proposal: &Proposal) {
        *lock(&self.last_query) = Some((by, self.endpoint.now()));
        if by < self.endpoint.rank() {
            lock(&self.inquiry).take();
        }
        if let Some(error) = self.failure.get() {
            self.send_control(by, &ControlMessage::Failed(error.clone()));
        }
        self.send_control(by, &ControlMessage::Report(self.report(proposal)));
    }

    /// Records the ranks that the endpoint has lost, each with the reason, and proposes the loss of those that are gone
    /// without a message. The coordinator may be among them. Returns whether any was not known.
    pub(super) fn record_lost_ranks(&self, lost: Vec<(usize, String)>) -> bool {
        let mut news = false;
        for (rank, problem) in lost {
            if self.is_lost(rank) {
                continue;
            }
            news = true;
            if lock(&self.finished)[rank] {
                // It has announced its end: nobody misses it, but it cannot be queried or told anything any more.
                let was_coordinator = self.coordinator() == rank;
                self.lost[rank].store(true, Ordering::Release);
                if let Some((proposal, _)) =
                    lock(&self.proposed).clone().filter(|_| was_coordinator && self.failure.get().is_none())
                {
                    self.submit(&proposal);
                }
                continue;
            }
            log::warn!("rank {} has lost rank {rank}: {problem}", self.endpoint.rank());
            let was_coordinator = self.coordinator() == rank;
            self.lost[rank].store(true, Ordering::Release);
            let pending = lock(&self.proposed).clone();
            match pending {
                Some((proposal, _)) if was_coordinator && self.failure.get().is_none() => self.submit(&proposal),
                Some(_) => {}
                None => {
                    let waits = |group: &Arc<Group>| {
                        let call =
                            group.members.contains(&rank).then(|| group.history.current(group.rank)).flatten()?;
                        Some(if group.name == self.name {
                            call.to_string()
                        } else {
                            format!("{call} of `{}`", group.name)
                        })
                    };
                    let operation = self.groups().iter().find_map(waits).unwrap_or_else(|| NOBODY.into());
                    let (group, log) = (self.name.clone(), CallLog::default());
                    let members = (0..self.endpoint.size()).collect();
                    let error = Error::RankLost { group: group.clone(), rank, operation, log };
                    let mut proposal = Proposal { error, group, members, call: None };
                    self.blame_itself(&mut proposal);
                    let mut proposed = lock(&self.proposed);
                    if proposed.is_none() && self.failure.get().is_none() {
                        *proposed = Some((proposal.clone(), self.endpoint.now()));
                        drop(proposed);
                        self.submit(&proposal);
                    }
                }
            }
        }
        news
    }

    /// Fails the world, and waits until the error is known.
    pub(in crate::comm::message_passing) fn fail(&self, proposal: Proposal) -> Error {
        let own = proposal.error.clone();
        self.propose(proposal);
        let since = self.endpoint.now();
        // Three coordinators may be silent, one after the other.
        let most = 4 * self.phase_limit(COORDINATOR_SILENCE) + 2 * self.phase_limit(INQUIRY_LIMIT);
        while self.failure.get().is_none() && self.elapsed(since) < most {
            self.poll_control();
            self.endpoint.clock().sleep(Duration::from_micros(100));
        }
        self.set_failure(own.clone());
        self.failure.get().cloned().unwrap_or(own)
    }

    /// This rank's report on a failure.
    pub(super) fn report(&self, proposal: &Proposal) -> RankReport {
        let mut report = RankReport::default();
        let left_groups = lock(&self.left_groups);
        report.line = left_groups
            .iter()
            .find(|(name, members, _)| *name == proposal.group && *members == proposal.members)
            .map(|(_, _, line)| line.clone());
        drop(left_groups);
        let last = self.last_group.load(Ordering::Relaxed);
        for group in self.groups() {
            report.waits_for.extend(waits_for(&group.history, &group.members, group.rank));
            if group.name == proposal.group && group.members == proposal.members {
                report.line = Some(group.history.line(group.rank));
                report.waits = proposal.call.and_then(|(sequence, call)| {
                    // In the next call, or still in the one before, it is not in this one.
                    let in_this_one = group.done.load(Ordering::Acquire) == sequence;
                    group.history.time_in(group.rank, &call, self.endpoint.now()).filter(|_| in_this_one)
                });
            } else if last == group.id && matches!(proposal.error, Error::RankLost { .. }) {
                // Its last group, although it waits nowhere.
                report.elsewhere.push(format!("in `{}` {}", group.name, group.history.line(group.rank)));
            } else {
                report.elsewhere.extend(group.history.waiting().map(|line| format!("in `{}` {line}", group.name)));
            }
        }
        report
    }

    /// Broadcasts the error when all have reported, or have had the time to.
    pub(super) fn conclude_inquiry(&self, answered: bool) {
        let inquiry = lock(&self.inquiry);
        let Some(Inquiry { proposal, reports, since }) = inquiry.as_ref() else { return };
        let complete =
            answered && reports.iter().enumerate().all(|(rank, report)| report.is_some() || self.is_lost(rank));
        if self.failure.get().is_some() || !(complete || self.elapsed(*since) > self.phase_limit(INQUIRY_LIMIT)) {
            return;
        }
        let finished = lock(&self.finished).clone();
        let lines = proposal.members.iter().enumerate().map(|(rank, member)| match &reports[*member] {
            None if !finished[*member] => format!("rank {rank}: no answer"),
            Some(RankReport { line: Some(line), .. }) => line.clone(),
            _ => format!("rank {rank}: has left"),
        });
        let elsewhere = reports.iter().flatten().flat_map(|report| report.elsewhere.iter().cloned());
        let others = (0..reports.len()).filter(|rank| reports[*rank].is_none() && !finished[*rank]);
        let others = others.filter(|rank| !proposal.members.contains(rank));
        let others = others.map(|rank| format!("in `{}` rank {rank}: no answer", self.name));
        let mut error = with_log(proposal.error.clone(), CallLog::new(lines.chain(elsewhere).chain(others)));
        if let Error::Timeout { missing, .. } = &mut error
            && !missing.starts_with(ITSELF)
        {
            let waits = |rank: &usize| reports[proposal.members[*rank]].as_ref().and_then(|report| report.waits);
            let ranks = 0..proposal.members.len();
            let late: Vec<usize> = ranks.clone().filter(|rank| waits(rank).is_none()).collect();
            let said = match ranks.clone().filter_map(|rank| waits(&rank)).min() {
                // The last one has waited for long, too.
                Some(shortest) if shortest > self.timeout / 2 && ranks.clone().all(|rank| waits(&rank).is_some()) => {
                    format!(
                        "each other: all ranks have been in it for at least {shortest:.1?}, so the transport has lost something"
                    )
                }
                _ if missing.is_empty() => describe_missing(late.iter().copied()),
                _ => std::mem::take(missing),
            };
            let waits_for: Vec<Option<Vec<usize>>> =
                reports.iter().map(|report| report.as_ref().map(|report| report.waits_for.clone())).collect();
            let (members, whole) = (proposal.members.as_slice(), proposal.group == self.name);
            let graph = WaitGraph { members, whole, waits_for: &waits_for, finished: &finished };
            *missing = graph.describe(proposal.call.map(|_| late.as_slice()), said);
        }
        drop(inquiry);
        self.broadcast_control(&ControlMessage::Failed(error));
    }

    /// The world has failed: closes the groups whose root this rank is.
    pub(super) fn set_failure(&self, error: Error) {
        if self.failure.set(error).is_err() {
            return;
        }
        for group in self.groups().iter().filter(|group| group.rank == 0) {
            let committed = {
                let mut state = lock(&group.commit_state);
                state.closed = true;
                state.committed
            };
            let closed = ControlMessage::Closed { group: group.id, committed };
            group.members[1..].iter().for_each(|member| self.send_control(*member, &closed));
        }
    }
}
