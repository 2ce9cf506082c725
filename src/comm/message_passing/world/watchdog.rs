//! The watchdog thread of a rank: handles control messages, progresses sends, and stays until all ranks have ended.

use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::World;
use super::control_message::ControlMessage;
use crate::Error;
use crate::comm::message_passing::group::{Group, MessageKind};
use crate::lock::lock;

/// How long a rank must have been in no call before its session leaves.
const IDLE_TIME: Duration = Duration::from_millis(100);
/// How often the watchdog polls.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// How long a failed world waits for its ranks to end.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How long a rank waits for its sends to complete when all have ended, if it can reclaim their buffers.
const LAST_BYTES: Duration = Duration::from_millis(200);

impl World {
    /// Announces that this rank is done with the world, whoever still holds a communicator.
    pub fn announce_end(&self) {
        self.goes_on();
        if !self.end_announced.swap(true, Ordering::AcqRel) {
            self.broadcast_control(&ControlMessage::Finished);
        }
    }

    /// Leaves all groups, and is done with the world.
    pub fn leave_world(&self) {
        self.goes_on();
        self.groups().iter().for_each(|group| self.leave(group, false));
        self.announce_end();
    }

    /// Waits until this rank is in no call any more, as far as can be seen, or for the time-out: operations in the
    /// background finish. Does not wait where nobody holds a communicator.
    pub fn wait_until_idle(&self) {
        let began = self.endpoint.now();
        let mut idle_since = began;
        let holds = || !self.end_announced.load(Ordering::Acquire) && self.failure.get().is_none();
        while holds() && self.elapsed(idle_since) < IDLE_TIME && self.elapsed(began) < self.timeout {
            if self.groups().iter().any(|group| group.history.current(group.rank).is_some()) {
                idle_since = self.endpoint.now();
            }
            self.endpoint.clock().sleep(POLL_INTERVAL);
        }
    }

    /// The world is over for this rank: whoever still holds a communicator gets an error.
    pub fn close(&self) {
        let (transport, rank) = (self.endpoint.name(), self.endpoint.rank());
        let problem =
            format!("the session of rank {rank} was dropped, and its communicators with it; drop the session last");
        let _ = self.failure.set(Error::Transport { transport, problem });
    }

    /// Lets the endpoint progress, and [handles the control messages](Self::handle_control).
    pub fn poll_control(&self) {
        self.endpoint.drive();
        self.handle_control();
    }

    /// Handles the control messages that have arrived, and advances failures. Called by the watchdog, and by threads
    /// that wait.
    pub fn handle_control(&self) {
        let Ok(mut polled) = self.polling.try_lock() else { return };
        // The watchdog does this all the time.
        let now = self.endpoint.now();
        if let Some(last) = polled.replace(now) {
            self.was_absent(now.saturating_duration_since(last));
        }
        // Of a rank that is lost by now, all messages have arrived: one that has announced its end is not missed.
        let lost = self.endpoint.lost_ranks();
        self.receive_control();
        if self.record_lost_ranks(lost) {
            // What this rank has told itself.
            self.receive_control();
        }
        self.conclude_inquiry(false);
        self.repropose();
        self.release_sent();
    }

    fn receive_control(&self) {
        loop {
            let own = lock(&self.loopback).pop_front().map(|message| (self.endpoint.rank(), message));
            let (from, message) = match own {
                Some(message) => message,
                None => match self.endpoint.take(None, Group::tag_of(0, MessageKind::Control)) {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    Err(problem) => {
                        log::error!("rank {} cannot receive control messages: {problem}", self.endpoint.rank());
                        break;
                    }
                },
            };
            match ControlMessage::read(&message, self.endpoint.size()) {
                Some(message) => self.handle(from, message),
                None => {
                    log::error!("rank {} received a garbled control message from rank {from}", self.endpoint.rank())
                }
            }
        }
    }

    /// Drops the buffers of completed sends: their memory is wanted for what is received next.
    pub fn release_sent(&self) {
        lock(&self.transfers).retain_mut(|pending| !self.endpoint.progress(&mut pending.requests).unwrap_or(false));
    }

    fn handle(&self, from: usize, message: ControlMessage) {
        match message {
            ControlMessage::Propose(proposal) => self.start_inquiry(from, proposal),
            ControlMessage::Query(proposal) => self.answer_query(from, &proposal),
            ControlMessage::Report(report) => {
                if let Some(inquiry) = lock(&self.inquiry).as_mut() {
                    inquiry.reports[from] = Some(report);
                }
                self.conclude_inquiry(true);
            }
            ControlMessage::Failed(error) => self.set_failure(error),
            ControlMessage::Closed { group, committed } => {
                for group in self.groups().iter().filter(|other| other.id == group) {
                    let _ = group.closed.set(committed);
                }
            }
            ControlMessage::Left { group: id, left } => {
                // The list is locked, so that a group that is being made either is in it or finds the message.
                let groups = lock(&self.groups);
                match groups.iter().filter_map(Weak::upgrade).find(|group| group.id == id) {
                    Some(group) => lock(&group.left).push(left),
                    None => lock(&self.early_leaves).push((id, left)),
                }
            }
            ControlMessage::Finished => lock(&self.finished)[from] = true,
        }
    }

    /// Runs the watchdog until all ranks have ended. Returns whether the world ended cleanly.
    pub fn run_watchdog(&self) -> bool {
        let (mut finished_since, mut warned) = (None, false);
        let whole = loop {
            self.poll_control();
            let finished: Vec<bool> = lock(&self.finished)
                .iter()
                .enumerate()
                .map(|(rank, finished)| *finished || self.is_lost(rank))
                .collect();
            if finished[self.endpoint.rank()] {
                let since: Instant = *finished_since.get_or_insert_with(|| self.endpoint.now());
                let all = finished.iter().all(|finished| *finished);
                // Nobody will ever receive what is still being sent.
                let can_reclaim = self.endpoint.info().can_reclaim;
                let limit = if can_reclaim { LAST_BYTES } else { END_LIMIT };
                if all && (lock(&self.transfers).is_empty() || self.elapsed(since) > limit) {
                    break true;
                }
                let end_limit = if can_reclaim { self.phase_limit(END_LIMIT) } else { END_LIMIT };
                if self.failure.get().is_some() && self.elapsed(since) > end_limit {
                    // A rank that has not ended by now is dead, or was sent something that it has never received.
                    break all;
                }
                if can_reclaim && self.elapsed(since) > self.timeout {
                    // The others know that this rank has left. They may go on for as long as they like.
                    break all;
                }
                if !all && !warned && self.elapsed(since) > self.timeout {
                    warned = true;
                    let missing: Vec<usize> = (0..finished.len()).filter(|rank| !finished[*rank]).collect();
                    log::warn!(
                        "rank {} is done and waits for ranks {missing:?} of the world, which are not: {} ends with all its \
                         processes",
                        self.endpoint.rank(),
                        self.endpoint.name()
                    );
                }
            }
            let waits = || self.waiting.load(Ordering::Relaxed) > 0;
            if !waits() {
                self.endpoint.park(POLL_INTERVAL);
            }
            // A thread that waits receives its messages itself: the watchdog would only have to wake it.
            if waits() {
                self.endpoint.clock().sleep(POLL_INTERVAL);
            }
        };
        // What cannot be reclaimed is leaked.
        for mut pending in lock(&self.transfers).drain(..).filter(|_| self.endpoint.info().can_reclaim) {
            self.endpoint.reclaim(&mut pending.requests);
        }
        self.endpoint.close(if whole { END_LIMIT } else { LAST_BYTES });
        whole
    }
}
