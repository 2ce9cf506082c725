//! How a world fails: a rank proposes an error, the judge asks all what they know, and pronounces it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::World;
use super::words::Word;
use crate::Error;
use crate::comm::watch::missed;
use crate::comm::wired::codec::with_log;
use crate::comm::wired::group::{Group, lock};
use crate::comm::{Call, CallLog};

/// How long the judge waits for what the others know of a failure.
const INQUIRY: Duration = Duration::from_millis(500);
/// How long a rank waits for the judge before it takes its own error for the world's.
pub(super) const ALONE: Duration = Duration::from_secs(3);

/// A failure that a rank has found.
#[derive(Debug, Clone)]
pub(in crate::comm::wired) struct Proposal {
    pub error: Error,
    pub group: Arc<str>,
    /// World ranks of that group.
    pub members: Vec<usize>,
    /// The call that ran out of time: ranks that are not in it are the ones that were missed.
    pub call: Option<Call>,
}

/// What one rank knows of a failure.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    pub in_call: bool,
    pub line: Option<String>,
    pub elsewhere: Vec<String>,
}

/// The judge asks everybody what they know before it pronounces the error.
#[derive(Debug)]
pub(super) struct Inquiry {
    pub proposal: Proposal,
    pub known: Vec<Option<Known>>,
    pub since: Instant,
}

impl World {
    /// Has the world fail. The judge takes the first proposal, whoever makes it.
    pub(in crate::comm::wired) fn propose(&self, proposal: Proposal) {
        {
            let mut proposed = lock(&self.proposed);
            if self.fate.get().is_some() || proposed.is_some() {
                return;
            }
            *proposed = Some((proposal.clone(), self.wire.now()));
        }
        self.hand_in(&proposal);
        self.attend();
    }

    fn hand_in(&self, proposal: &Proposal) {
        self.tell(self.judge(), &Word::Propose(proposal.clone()));
    }

    /// Looks who is gone without a word. The judge may be among them.
    pub(super) fn miss(&self) {
        for (rank, problem) in self.wire.lost() {
            if lock(&self.ended)[rank] || self.is_lost(rank) {
                continue;
            }
            log::warn!("rank {} has lost rank {rank}: {problem}", self.wire.rank());
            let judged = self.judge() == rank;
            self.lost[rank].store(true, Ordering::Release);
            let pending = lock(&self.proposed).clone();
            match pending {
                Some((proposal, _)) if judged && self.fate.get().is_none() => self.hand_in(&proposal),
                Some(_) => {}
                None => {
                    let waits = |group: &Arc<Group>| {
                        let call = if group.members.contains(&rank) { group.watch.current(group.rank) } else { None };
                        call.map(|call| call.to_string())
                    };
                    let operation = self.groups().iter().find_map(waits).unwrap_or_else(|| "nobody".into());
                    let (group, log) = (self.name.clone(), CallLog::default());
                    let members = (0..self.wire.size()).collect();
                    let error = Error::RankLost { group: group.clone(), rank, operation, log };
                    let proposal = Proposal { error, group, members, call: None };
                    let mut proposed = lock(&self.proposed);
                    if proposed.is_none() && self.fate.get().is_none() {
                        *proposed = Some((proposal.clone(), self.wire.now()));
                        drop(proposed);
                        self.hand_in(&proposal);
                    }
                }
            }
        }
    }

    /// Has the world fail, and waits until it is known with which error.
    pub(in crate::comm::wired) fn fail(&self, proposal: Proposal) -> Error {
        let own = proposal.error.clone();
        self.propose(proposal);
        let since = self.wire.now();
        while self.fate.get().is_none() && self.elapsed(since) < 2 * ALONE {
            self.attend();
            self.wire.sleep(Duration::from_micros(100));
        }
        self.fate.get().cloned().unwrap_or(own)
    }

    /// What this rank knows of a failure.
    pub(super) fn know(&self, proposal: &Proposal) -> Known {
        let mut known = Known::default();
        let past = lock(&self.past);
        known.line = past
            .iter()
            .find(|(name, members, _)| *name == proposal.group && *members == proposal.members)
            .map(|(_, _, line)| line.clone());
        drop(past);
        for group in self.groups() {
            if group.name == proposal.group && group.members == proposal.members {
                known.line = Some(group.watch.line(group.rank));
                known.in_call = proposal.call.is_some_and(|call| group.watch.is_in(group.rank, &call));
            } else {
                known.elsewhere.extend(group.watch.waiting().map(|line| format!("in `{}` {line}", group.name)));
            }
        }
        known
    }

    /// Pronounces the error when all have said what they know, or have had the time to.
    pub(super) fn conclude(&self, answered: bool) {
        let inquiry = lock(&self.inquiry);
        let Some(Inquiry { proposal, known, since }) = inquiry.as_ref() else { return };
        let complete = answered && known.iter().enumerate().all(|(rank, known)| known.is_some() || self.is_lost(rank));
        if self.fate.get().is_some() || !(complete || self.elapsed(*since) > INQUIRY) {
            return;
        }
        let silent = |rank: usize| format!("rank {rank}: no answer");
        let lines = proposal.members.iter().enumerate().map(|(rank, member)| {
            known[*member].as_ref().map_or_else(
                || silent(rank),
                |known| known.line.clone().unwrap_or_else(|| format!("rank {rank}: has left")),
            )
        });
        let elsewhere = known.iter().flatten().flat_map(|known| known.elsewhere.iter().cloned());
        let mut error = with_log(proposal.error.clone(), CallLog::new(lines.chain(elsewhere)));
        if let (Error::Timeout { missing, .. }, Some(_)) = (&mut error, proposal.call)
            && missing.is_empty()
        {
            let absent = |member: usize| known[member].as_ref().is_none_or(|known| !known.in_call);
            *missing = missed((0..proposal.members.len()).filter(|rank| absent(proposal.members[*rank])));
        }
        drop(inquiry);
        self.tell_all(&Word::Fate(error));
    }

    /// The world has failed. The groups that this rank decides for are closed.
    pub(super) fn accept(&self, error: Error) {
        if self.fate.set(error).is_err() {
            return;
        }
        for group in self.groups().iter().filter(|group| group.rank == 0) {
            let committed = {
                let mut decider = lock(&group.decider);
                decider.closed = true;
                decider.committed
            };
            let closed = Word::Closed { group: group.id, committed };
            group.members[1..].iter().for_each(|member| self.tell(*member, &closed));
        }
    }
}
