//! How a world fails: a rank proposes an error, the judge asks all what they know, and pronounces it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::World;
use super::words::Word;
use crate::Error;
use crate::comm::blame::{Waits, waits_for};
use crate::comm::watch::missed;
use crate::comm::wired::codec::with_log;
use crate::comm::wired::group::{Group, lock};
use crate::comm::{Call, CallLog};

/// How long a judge waits for what the others know of a failure.
const INQUIRY: Duration = Duration::from_millis(500);
/// How long a rank that has proposed an error waits for the judge's question before it turns to the next rank.
const SILENCE: Duration = Duration::from_secs(3);

/// A failure that a rank has found.
#[derive(Debug, Clone)]
pub(in crate::comm::wired) struct Proposal {
    pub error: Error,
    pub group: Arc<str>,
    /// World ranks of that group.
    pub members: Vec<usize>,
    /// The call that ran out of time, and its number in the group: ranks that are not in it are the ones that were missed.
    pub call: Option<(u64, Call)>,
}

/// What one rank knows of a failure.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    /// How long it has been in the call, if it is.
    pub waits: Option<Duration>,
    pub line: Option<String>,
    pub elsewhere: Vec<String>,
    /// The ranks of the world that it waits for in the calls that it is in.
    pub waits_for: Vec<usize>,
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

    /// Turns to the next rank if the judge has not asked anybody anything: its process is stopped, or has ended.
    pub(super) fn remind(&self) {
        if self.fate.get().is_some() {
            return;
        }
        let silence = self.within(SILENCE);
        let proposal = {
            let mut proposed = lock(&self.proposed);
            let asked = lock(&self.asked).is_some_and(|(_, when)| self.elapsed(when) <= silence);
            let Some((proposal, since)) = proposed.as_mut().filter(|(_, since)| self.elapsed(*since) > silence) else {
                return;
            };
            if asked {
                return;
            }
            let judge = self.judge();
            if judge != self.wire.rank() {
                log::warn!("rank {} has no word from rank {judge} on how the world fails", self.wire.rank());
                self.silent[judge].store(true, Ordering::Release);
            }
            *since = self.wire.now();
            proposal.clone()
        };
        self.hand_in(&proposal);
    }

    /// A rank proposes an error: this one is the judge, for it at least.
    pub(super) fn look_into(&self, by: usize, proposal: Proposal) {
        if let Some(error) = self.fate.get() {
            // It has missed that.
            return self.tell(by, &Word::Fate(error.clone()));
        }
        // Another judge is at work. Should it fall silent, the proposal comes again.
        let asked = lock(&self.asked).is_some_and(|(by, when)| {
            by != self.wire.rank() && !self.is_lost(by) && self.elapsed(when) <= self.within(SILENCE)
        });
        let mut inquiry = lock(&self.inquiry);
        if inquiry.is_some() || asked {
            return;
        }
        let known = vec![None; self.wire.size()];
        *inquiry = Some(Inquiry { proposal: proposal.clone(), known, since: self.wire.now() });
        drop(inquiry);
        self.tell_all(&Word::Ask(proposal));
    }

    /// A judge wants to know. Of two judges the lower one goes on, so that all hear of one error.
    pub(super) fn asked(&self, by: usize, proposal: &Proposal) {
        *lock(&self.asked) = Some((by, self.wire.now()));
        if by < self.wire.rank() {
            lock(&self.inquiry).take();
        }
        if let Some(error) = self.fate.get() {
            self.tell(by, &Word::Fate(error.clone()));
        }
        self.tell(by, &Word::Know(self.know(proposal)));
    }

    /// Looks who is gone without a word. The judge may be among them.
    pub(super) fn miss(&self) {
        for (rank, problem) in self.wire.lost() {
            if self.is_lost(rank) {
                continue;
            }
            if lock(&self.ended)[rank] {
                // It has taken leave: nobody misses it, but it can't be asked or told any more.
                let judged = self.judge() == rank;
                self.lost[rank].store(true, Ordering::Release);
                if let Some((proposal, _)) =
                    lock(&self.proposed).clone().filter(|_| judged && self.fate.get().is_none())
                {
                    self.hand_in(&proposal);
                }
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
                        let call = group.members.contains(&rank).then(|| group.watch.current(group.rank)).flatten()?;
                        Some(if group.name == self.name {
                            call.to_string()
                        } else {
                            format!("{call} of `{}`", group.name)
                        })
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
        // Three judges may be silent, one behind the other.
        let most = 4 * self.within(SILENCE) + 2 * self.within(INQUIRY);
        while self.fate.get().is_none() && self.elapsed(since) < most {
            self.attend();
            self.wire.sleep(Duration::from_micros(100));
        }
        self.accept(own.clone());
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
        let last = self.last_group.load(Ordering::Relaxed);
        for group in self.groups() {
            known.waits_for.extend(waits_for(&group.watch, &group.members, group.rank));
            if group.name == proposal.group && group.members == proposal.members {
                known.line = Some(group.watch.line(group.rank));
                known.waits = proposal.call.and_then(|(sequence, call)| {
                    // In the next one, or still in the one before, it is not in this one.
                    let here = group.done.load(Ordering::Acquire) == sequence;
                    group.watch.waits_in(group.rank, &call, self.wire.now()).filter(|_| here)
                });
            } else if last == group.id && matches!(proposal.error, Error::RankLost { .. }) {
                // Where it works, though nobody waits there.
                known.elsewhere.push(format!("in `{}` {}", group.name, group.watch.line(group.rank)));
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
        if self.fate.get().is_some() || !(complete || self.elapsed(*since) > self.within(INQUIRY)) {
            return;
        }
        let ended = lock(&self.ended).clone();
        let lines = proposal.members.iter().enumerate().map(|(rank, member)| match &known[*member] {
            None if !ended[*member] => format!("rank {rank}: no answer"),
            Some(Known { line: Some(line), .. }) => line.clone(),
            _ => format!("rank {rank}: has left"),
        });
        let elsewhere = known.iter().flatten().flat_map(|known| known.elsewhere.iter().cloned());
        let others = (0..known.len()).filter(|rank| known[*rank].is_none() && !ended[*rank]);
        let others = others.filter(|rank| !proposal.members.contains(rank));
        let others = others.map(|rank| format!("in `{}` rank {rank}: no answer", self.name));
        let mut error = with_log(proposal.error.clone(), CallLog::new(lines.chain(elsewhere).chain(others)));
        if let Error::Timeout { missing, .. } = &mut error {
            let waits = |rank: &usize| known[proposal.members[*rank]].as_ref().and_then(|known| known.waits);
            let ranks = 0..proposal.members.len();
            let late: Vec<usize> = ranks.clone().filter(|rank| waits(rank).is_none()).collect();
            let said = match ranks.clone().filter_map(|rank| waits(&rank)).min() {
                // The last one had all the time, too.
                Some(shortest) if shortest > self.timeout / 2 && ranks.clone().all(|rank| waits(&rank).is_some()) => {
                    format!(
                        "each other: all ranks have been in it for at least {shortest:.1?}, so the engine has lost something"
                    )
                }
                _ if missing.is_empty() => missed(late.iter().copied()),
                _ => std::mem::take(missing),
            };
            let waits_for: Vec<Option<Vec<usize>>> =
                known.iter().map(|known| known.as_ref().map(|known| known.waits_for.clone())).collect();
            let (members, whole) = (proposal.members.as_slice(), proposal.group == self.name);
            let waits = Waits { members, whole, waits_for: &waits_for, ended: &ended };
            *missing = waits.blame(proposal.call.map(|_| late.as_slice()), said);
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
