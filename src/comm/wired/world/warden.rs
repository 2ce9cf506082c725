//! The warden of a rank: it hears what the others say, pushes on what is being sent, and stays until all have ended.

use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::World;
use super::words::Word;
use crate::Error;
use crate::comm::wired::group::{Group, Kind, lock};

/// How long a rank that is about to leave must have been in no call.
const IDLE: Duration = Duration::from_millis(100);
/// How often a warden looks what has come.
const ROUND: Duration = Duration::from_millis(2);
/// How long a failed world waits for its ranks to go.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long a rank waits for what it has sent to be taken when all have ended, if it can take it back.
const LAST_BYTES: Duration = Duration::from_millis(200);

impl World {
    /// This rank is done with the world, whoever still holds a communicator.
    pub fn farewell(&self) {
        if !self.said_farewell.swap(true, Ordering::AcqRel) {
            self.tell_all(&Word::Bye);
        }
    }

    /// Leaves all groups, and is done with the world.
    pub fn depart(&self) {
        self.groups().iter().for_each(|group| self.leave(group, false));
        self.farewell();
    }

    /// Waits until this rank is in no call any more, as far as can be seen, or for the time-out: what is under way in the
    /// background comes to its end. Nothing is waited for where nobody holds a communicator.
    pub fn settle(&self) {
        let began = self.wire.now();
        let mut idle_since = began;
        let holds = || !self.said_farewell.load(Ordering::Acquire) && self.fate.get().is_none();
        while holds() && self.elapsed(idle_since) < IDLE && self.elapsed(began) < self.timeout {
            if self.groups().iter().any(|group| group.watch.current(group.rank).is_some()) {
                idle_since = self.wire.now();
            }
            self.wire.sleep(ROUND);
        }
    }

    /// The world is over for this rank: whoever still holds a communicator gets an error.
    pub fn close(&self) {
        let (engine, rank) = (self.wire.engine(), self.wire.rank());
        let problem =
            format!("the session of rank {rank} was dropped, and its communicators with it; drop the session last");
        let _ = self.fate.set(Error::Engine { engine, problem });
    }

    /// Hears what has come, and does what is to be done. Called by the warden, and by whoever waits.
    pub fn attend(&self) {
        let Ok(_one) = self.attending.try_lock() else { return };
        self.listen();
        // After all that was said has been heard: whoever has taken leave is not missed.
        self.miss();
        self.listen();
        self.conclude(false);
        self.remind();
        self.clear();
    }

    fn listen(&self) {
        loop {
            let own = lock(&self.own).pop_front().map(|message| (self.wire.rank(), message));
            let (from, message) = match own {
                Some(message) => message,
                None => match self.wire.take(None, Group::tag_of(0, Kind::Control)) {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    Err(problem) => {
                        log::error!("rank {} cannot hear the others: {problem}", self.wire.rank());
                        break;
                    }
                },
            };
            match Word::read(&message, self.wire.size()) {
                Some(word) => self.hear(from, word),
                None => log::error!("rank {} does not understand rank {from}", self.wire.rank()),
            }
        }
    }

    /// Lets go of what has been sent: its memory is wanted for what is received next.
    pub fn clear(&self) {
        lock(&self.outgoing).retain_mut(|parcel| !self.wire.progress(&mut parcel.tickets).unwrap_or(false));
    }

    fn hear(&self, from: usize, word: Word) {
        match word {
            Word::Propose(proposal) => self.look_into(from, proposal),
            Word::Ask(proposal) => self.asked(from, &proposal),
            Word::Know(known) => {
                if let Some(inquiry) = lock(&self.inquiry).as_mut() {
                    inquiry.known[from] = Some(known);
                }
                self.conclude(true);
            }
            Word::Fate(error) => self.accept(error),
            Word::Closed { group, committed } => {
                for group in self.groups().iter().filter(|other| other.id == group) {
                    let _ = group.closed.set(committed);
                }
            }
            Word::Left { group: id, left } => {
                // The list is held, so that a group that is being made either is in it or finds the news.
                let groups = lock(&self.groups);
                match groups.iter().filter_map(Weak::upgrade).find(|group| group.id == id) {
                    Some(group) => lock(&group.left).push(left),
                    None => lock(&self.early).push((id, left)),
                }
            }
            Word::Bye => lock(&self.ended)[from] = true,
        }
    }

    /// Attends to the world until all ranks have ended. Returns whether nothing of it is left.
    pub fn guard(&self) -> bool {
        let mut ended_since = None;
        let whole = loop {
            self.attend();
            let ended: Vec<bool> =
                lock(&self.ended).iter().enumerate().map(|(rank, ended)| *ended || self.is_lost(rank)).collect();
            if ended[self.wire.rank()] {
                let since: Instant = *ended_since.get_or_insert_with(|| self.wire.now());
                let all = ended.iter().all(|ended| *ended);
                // What is still on its way then, nobody will ever receive.
                let gives_back = self.wire.gives_back();
                let patience = if gives_back { LAST_BYTES } else { FAREWELL };
                if all && (lock(&self.outgoing).is_empty() || self.elapsed(since) > patience) {
                    break true;
                }
                let farewell = if gives_back { self.within(FAREWELL) } else { FAREWELL };
                if self.fate.get().is_some() && self.elapsed(since) > farewell {
                    // Whoever has not come by now is dead, or was sent something that it has never taken.
                    break all;
                }
                if gives_back && self.elapsed(since) > self.timeout {
                    // The others know that this rank has left. They may go on for as long as they like.
                    break all;
                }
            }
            let waits = || self.waiting.load(Ordering::Relaxed) > 0;
            if !waits() {
                self.wire.rest(ROUND);
            }
            // News that somebody waits for is taken by whoever waits: it would have to be woken a second time.
            if waits() {
                self.wire.sleep(ROUND);
            }
        };
        // What cannot be taken back stays where it is, for good.
        for mut parcel in lock(&self.outgoing).drain(..).filter(|_| self.wire.gives_back()) {
            self.wire.withdraw(&mut parcel.tickets);
        }
        self.wire.close(if whole { FAREWELL } else { LAST_BYTES });
        whole
    }
}
