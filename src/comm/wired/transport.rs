//! A rank's place in a group of processes.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::agree::{Agreement, Post};
use super::board::{Board, Rounds};
use super::group::{Group, lock};
use super::mail;
use super::pace::Pace;
use super::venue::Venue;
use super::work::{self, Work};
use super::world::{Presence, Proposal, World};
use crate::Error;
use crate::comm::{Call, CallLog, Extent, Message, Operation, Transfer, Transport};

/// How long a rank that finds the sender gone waits for the reason, which may be on its way.
const GRACE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct WiredTransport {
    presence: Arc<Presence>,
    group: Arc<Group>,
    /// Held during a collective: a rank does one at a time.
    turn: Mutex<Turn>,
    panicked: AtomicBool,
}

/// What is next in a group.
#[derive(Debug)]
struct Turn {
    /// Number of the next meeting.
    sequence: u64,
    /// Meetings so far beyond the first of a collective.
    extra: u64,
    venue: Venue,
    /// Memory that collectives work in.
    scratch: Vec<u64>,
}

/// A collective that all ranks have come to. It is over when this is dropped.
struct Met<'a> {
    turn: MutexGuard<'a, Turn>,
    group: &'a Group,
    /// Of the call, in the log.
    number: u64,
    /// Whether all have come to the last meeting of it.
    complete: bool,
    posts: Vec<Post>,
    /// Number of the group that is made.
    id: u64,
    on_board: bool,
}

impl Met<'_> {
    /// The board that they have met on.
    fn board(&mut self) -> Option<(&Board, &mut Rounds)> {
        self.turn.venue.board(self.group).filter(|_| self.on_board)
    }

    /// Meets the others once more in the same collective. Returns what each tells all.
    fn again(&mut self, world: &World, call: &Call, told: u64) -> Result<Vec<u64>, Error> {
        self.turn_over();
        let (group, turn) = (self.group, &mut *self.turn);
        (self.complete, self.on_board) = (false, turn.venue.board(group).is_some());
        turn.extra += 1;
        let post = Post { call: *call, color: told, key: 0, reaches: turn.venue.reaches() };
        let (sequence, number) = (turn.sequence, self.number);
        let agreement = Agreement { world, group, sequence, told: sequence - turn.extra, post, number };
        let (posts, _) = agreement.meet(&mut turn.venue)?;
        turn.sequence += 1;
        self.complete = true;
        Ok(posts.iter().map(|post| post.color).collect())
    }

    /// A meeting is over.
    fn turn_over(&mut self) {
        if let Some((_, rounds)) = self.board() {
            rounds.turn_over();
        }
        if self.complete {
            self.group.done.fetch_add(1, Ordering::Release);
        }
    }
}

impl Drop for Met<'_> {
    fn drop(&mut self) {
        self.turn_over();
        self.group.watch.finish(self.group.rank, self.number);
    }
}

impl WiredTransport {
    pub fn new(presence: Arc<Presence>, group: Arc<Group>) -> Arc<Self> {
        presence.0.add(&group);
        let venue = Venue::new(presence.0.wire.shares_memory(), group.size());
        let turn = Mutex::new(Turn { sequence: 0, extra: 0, venue, scratch: Vec::new() });
        Arc::new(Self { presence, group, turn, panicked: AtomicBool::new(false) })
    }

    fn world(&self) -> &World {
        &self.presence.0
    }

    /// Meets the others in their next collective. `prepare` is called before, if that is on a board.
    fn meet(&self, post: Post, prepare: impl FnOnce(&Board, &Rounds)) -> Result<Met<'_>, Error> {
        let (world, group) = (self.world(), &*self.group);
        let mut turn = lock(&self.turn);
        if let Some(error) = world.fate() {
            return Err(error.clone());
        }
        world.last_group.store(group.id, Ordering::Relaxed);
        let number = group.watch.begin(group.rank, &post.call);
        let post = Post { reaches: turn.venue.reaches(), ..post };
        let on_board = turn.venue.board(group).map(|(board, rounds)| prepare(board, rounds)).is_some();
        let sequence = turn.sequence;
        let agreement = Agreement { world, group, sequence, told: sequence - turn.extra, post, number };
        let (posts, id) = agreement.meet(&mut turn.venue)?;
        turn.sequence += 1;
        Ok(Met { turn, group, number, complete: true, posts, id, on_board })
    }

    fn check_rank(&self, rank: usize, operation: &'static str) -> Result<(), Error> {
        match rank < self.size() {
            true => Ok(()),
            false => Err(Error::NoSuchRank { group: self.group.name.clone(), rank, size: self.size(), operation }),
        }
    }

    fn proposal(&self, error: Error) -> Proposal {
        Proposal { error, group: self.group.name.clone(), members: self.group.members.clone(), call: None }
    }

    /// Waits for a message that is not there yet.
    fn wait_for(&self, from: usize, tag: u64) -> Result<Message, Error> {
        let (world, group) = (self.world(), &*self.group);
        let call = Call::new(Operation::Receive { from, tag }, None, Extent::flat(0));
        let number = group.watch.begin(group.rank, &call);
        let mut pace = Pace::new(world, false);
        let mut gone_since = None;
        loop {
            // Looked at before the mailbox: what the sender sent before it left is still received.
            let left = lock(&group.left).iter().find(|left| left.rank == from).copied();
            let (came, tags) = {
                let mut inbox = lock(&group.inboxes[from]);
                inbox.fill(world, group, from, tag)?;
                let (message, coming) = inbox.get(world, from, tag)?;
                if let Some(message) = message {
                    group.watch.finish(group.rank, number);
                    return Ok(message);
                }
                // A message that is on its way is not missing.
                (if coming { 0 } else { inbox.came }, inbox.tags())
            };
            let Some(waited) = pace.pause() else { continue };
            if let Some(error) = world.fate() {
                return Err(error.clone());
            }
            group.watch.sleeps(group.rank, number, world.wire.now() - waited);
            if let Some(left) = left.filter(|left| left.messages <= came) {
                if waited - *gone_since.get_or_insert(waited) > GRACE {
                    let (name, operation, log) = (group.name.clone(), call.to_string(), CallLog::default());
                    world.propose(self.proposal(match left.panicked {
                        true => {
                            let message = "see its own message".into();
                            Error::RankPanicked { rank: group.members[from], message, log }
                        }
                        false => Error::RankLost { group: name, rank: from, operation, log },
                    }));
                }
            } else if waited > world.timeout {
                world.propose(self.proposal(Error::Timeout {
                    group: group.name.clone(),
                    rank: group.rank,
                    operation: call.to_string(),
                    waited,
                    missing: format!("rank {from}; tags that it has sent and nobody has read: {tags:?}"),
                    log: CallLog::default(),
                }));
            }
        }
    }
}

impl Transport for WiredTransport {
    fn engine(&self) -> &'static str {
        self.world().wire.engine()
    }

    fn group(&self) -> &Arc<str> {
        &self.group.name
    }

    fn rank(&self) -> usize {
        self.group.rank
    }

    fn world_rank(&self) -> usize {
        self.world().wire.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn collective(&self, call: &Call, transfer: Transfer<'_, '_>) -> Result<u64, Error> {
        let post = Post { call: *call, color: 0, key: 0, reaches: false };
        let mut met = self.meet(post, |board, rounds| work::lay_out(board, rounds, call, &transfer))?;
        let calls: Vec<Call> = met.posts.iter().map(|post| post.call).collect();
        let scratch = RefCell::new(std::mem::take(&mut met.turn.scratch));
        let work = Work { world: self.world(), group: &self.group, call, calls: &calls, scratch };
        let board = met.board().filter(|(board, _)| work::all_suit(board, &calls));
        let outcome = match (transfer, board) {
            (Transfer::Nothing, _) => Ok(0),
            (Transfer::InPlace(buffers), board) => work.in_place(buffers, board),
            (Transfer::Through { input, output }, Some((board, rounds))) => {
                work.through(input, output, Some((board, &*rounds)), &mut |_| Ok(Vec::new()))
            }
            (Transfer::Through { input, output }, None) => {
                work.through(input, output, None, &mut |told| met.again(self.world(), call, told))
            }
        };
        met.turn.scratch = work.scratch.into_inner();
        outcome
    }

    fn send(&self, to: usize, tag: u64, message: Message) -> Result<(), Error> {
        self.check_rank(to, "send")?;
        if let Some(error) = self.world().fate() {
            return Err(error.clone());
        }
        mail::post(self.world(), &self.group, to, tag, message)
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Message, Error> {
        let here = self.try_receive(from, tag)?;
        // Only a receive that has to wait is worth a line in the log.
        here.map_or_else(|| self.wait_for(from, tag), Ok)
    }

    fn try_receive(&self, from: usize, tag: u64) -> Result<Option<Message>, Error> {
        self.check_rank(from, "recv")?;
        if let Some(error) = self.world().fate() {
            return Err(error.clone());
        }
        let mut inbox = lock(&self.group.inboxes[from]);
        inbox.fill(self.world(), &self.group, from, tag)?;
        Ok(inbox.get(self.world(), from, tag)?.0)
    }

    fn timeout(&self) -> Duration {
        self.world().timeout
    }

    fn split(&self, name: &str, color: u64, key: i64) -> Result<Arc<dyn Transport>, Error> {
        let call = Call::split(name);
        let met = self.meet(Post { call, color, key, reaches: false }, |_, _| {})?;
        let mut members: Vec<(i64, usize)> = (met.posts.iter().enumerate())
            .filter(|(_, other)| other.color == color)
            .map(|(rank, other)| (other.key, rank))
            .collect();
        members.sort_unstable();
        let rank = members.iter().position(|(_, rank)| *rank == self.group.rank).unwrap_or_default();
        let members = members.into_iter().map(|(_, rank)| self.group.members[rank]).collect();
        let group = Group::new(met.id, format!("{}/{name}{color}", self.group.name).into(), members, rank);
        Ok(Self::new(self.presence.clone(), group))
    }

    fn abort(&self, error: Error) {
        if self.world().fate().is_none() {
            self.world().fail(self.proposal(error));
        }
    }

    fn leave(&self) {
        self.world().depart();
    }

    fn panicking(&self) {
        self.panicked.store(true, Ordering::Relaxed);
    }

    fn failure(&self) -> Option<Error> {
        self.world().attend();
        self.world().fate().cloned()
    }

    fn log(&self) -> CallLog {
        CallLog::new(std::iter::once(self.group.watch.line(self.group.rank)))
    }
}

impl Drop for WiredTransport {
    fn drop(&mut self) {
        self.world().leave(&self.group, self.panicked.load(Ordering::Relaxed));
    }
}
