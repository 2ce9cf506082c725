//! How the ranks of a group come to a collective; the protocol is told in the [module](super).

use std::time::Duration;

use super::codec::{Reader, Writer};
use super::group::{Group, Kind, lock};
use super::pace::Pace;
use super::wire::Ticket;
use super::world::{Proposal, World};
use crate::Error;
use crate::comm::{Call, CallLog, Operation};

/// Bytes of what a rank brings to a collective.
const POST: usize = 192;

/// How long a rank that finds a peer gone waits for the reason, which may be on its way.
const GRACE: Duration = Duration::from_millis(100);
/// How long a rank waits for the decider's word once the world has failed.
const LAST_WORD: Duration = Duration::from_secs(2);

/// What a rank brings to a collective.
#[derive(Debug, Clone, Copy)]
pub(super) struct Post {
    pub call: Call,
    /// For [`Operation::Split`].
    pub color: u64,
    pub key: i64,
}

fn write(post: &Post, into: &mut [u8]) {
    let mut writer = Writer(Vec::with_capacity(POST));
    writer.call(&post.call).number(post.color).number(post.key as u64);
    into[..writer.0.len()].copy_from_slice(&writer.0);
}

fn read(bytes: &[u8]) -> Option<Post> {
    let mut reader = Reader(bytes);
    let call = reader.call()?;
    Some(Post { call, color: reader.number()?, key: reader.number()? as i64 })
}

/// A rank on its way into a collective.
pub(super) struct Agreement<'a> {
    pub world: &'a World,
    pub group: &'a Group,
    pub sequence: u64,
    pub post: Post,
    /// Number of this call in the log.
    pub number: u64,
}

impl Agreement<'_> {
    /// Meets the others. Returns what all ranks bring, and the number of the group that the decider has made for them,
    /// if this is a split.
    pub fn meet(&self) -> Result<(Vec<Post>, u64), Error> {
        let n = self.group.size();
        let mut table = vec![0u8; n * POST + 8];
        write(&self.post, &mut table[self.group.rank * POST..][..POST]);
        let garbled = || {
            let problem = "a call is garbled: do all ranks run this program?".into();
            self.fail(Error::Engine { engine: self.world.wire.engine(), problem })
        };
        let all = |table: &[u8]| {
            let posts: Option<Vec<Post>> = (0..n).map(|rank| read(&table[rank * POST..][..POST])).collect();
            posts.ok_or_else(garbled)
        };
        let posts = if self.group.rank == 0 {
            self.collect(&mut table)?;
            let posts = all(&table)?;
            self.decide(&posts, &mut table)?;
            self.announce(&table)?;
            posts
        } else {
            let own = self.group.rank * POST..(self.group.rank + 1) * POST;
            let called = table[own.clone()].to_vec();
            self.ask(&mut table)?;
            let posts = all(&table)?;
            // Lengths and roots are taken from these: they must go with what this rank has called.
            if table[own] != called || !agree(&posts) {
                return Err(garbled());
            }
            posts
        };
        let id = Reader(&table[n * POST..]).number().unwrap_or_default();
        if id >= Group::most(self.world.wire.tags()) {
            return Err(garbled());
        }
        Ok((posts, id))
    }

    /// The decider's part: takes the calls of all.
    fn collect(&self, table: &mut [u8]) -> Result<(), Error> {
        let mut tickets = Vec::with_capacity(self.group.size() - 1);
        for other in 1..self.group.size() {
            let (member, place) = (self.group.members[other], table[other * POST..].as_mut_ptr());
            // SAFETY: the table outlives the tickets: they are done, or taken back, before this returns.
            let begun =
                unsafe { self.world.wire.receive(member, self.group.tag(Kind::Call), place, POST, &mut tickets) };
            if let Err(error) = begun {
                self.world.wire.cancel(&mut tickets);
                return Err(error);
            }
        }
        self.wait(&mut tickets)
    }

    /// Commits the collective, unless the calls do not agree or the world has failed.
    fn decide(&self, posts: &[Post], table: &mut [u8]) -> Result<(), Error> {
        let n = self.group.size();
        if !agree(posts) {
            let calls = posts.iter().map(|post| post.call).collect();
            let (group, log) = (self.group.name.clone(), CallLog::default());
            return Err(self.fail(Error::Mismatch { group, sequence: self.sequence, calls, log }));
        }
        if posts[0].call.operation == Operation::Split {
            table[n * POST..].copy_from_slice(&self.world.new_group_id()?.to_le_bytes());
        }
        let mut decider = lock(&self.group.decider);
        match (decider.closed, self.world.fate()) {
            (true, Some(error)) => Err(error.clone()),
            _ => {
                decider.committed += 1;
                Ok(())
            }
        }
    }

    fn announce(&self, table: &[u8]) -> Result<(), Error> {
        let verdict: Box<[u8]> = table.into();
        let mut tickets = Vec::new();
        for other in 1..self.group.size() {
            let (member, tag) = (self.group.members[other], self.group.tag(Kind::Verdict));
            // SAFETY: the bytes are on the heap, and kept until they are sent.
            unsafe { self.world.wire.send(member, tag, verdict.as_ptr(), verdict.len(), &mut tickets)? };
        }
        if !self.world.wire.progress(&mut tickets)? {
            self.world.keep(tickets, verdict);
        }
        Ok(())
    }

    /// Another rank's part: sends its call to the decider and waits for its word.
    fn ask(&self, table: &mut [u8]) -> Result<(), Error> {
        let (decider, len) = (self.group.members[0], table.len());
        let own: Box<[u8]> = table[self.group.rank * POST..][..POST].into();
        let (mut sent, mut tickets) = (Vec::new(), Vec::new());
        // SAFETY: what is sent is on the heap and kept; the table outlives the tickets as in `collect`.
        unsafe {
            let tag = self.group.tag(Kind::Verdict);
            self.world.wire.receive(decider, tag, table.as_mut_ptr(), len, &mut tickets)?;
            let begun = self.world.wire.send(decider, self.group.tag(Kind::Call), own.as_ptr(), POST, &mut sent);
            if let Err(error) = begun {
                self.world.wire.cancel(&mut tickets);
                return Err(error);
            }
        }
        let outcome = self.wait(&mut tickets);
        if !self.world.wire.progress(&mut sent)? {
            self.world.keep(sent, own);
        }
        outcome
    }

    /// Waits for the tickets, or for the end of the world. They are done or taken back afterwards.
    fn wait(&self, tickets: &mut Vec<Ticket>) -> Result<(), Error> {
        let mut pace = Pace::new(self.world, false);
        let (mut gone_since, mut over_since) = (None, None);
        loop {
            match self.world.wire.progress(tickets) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => {
                    self.world.wire.cancel(tickets);
                    return Err(error);
                }
            }
            let Some(waited) = pace.pause() else { continue };
            if let Some(error) = self.world.fate() {
                if self.is_over(waited, over_since.get_or_insert(waited)) {
                    self.world.wire.cancel(tickets);
                    return Err(error.clone());
                }
                continue;
            }
            self.group.watch.sleeps(self.group.rank, self.number, std::time::Instant::now() - waited);
            if let Some((rank, panicked)) = self.gone() {
                if waited - *gone_since.get_or_insert(waited) > GRACE {
                    let log = CallLog::default();
                    let group = self.group.name.clone();
                    self.propose(match panicked {
                        true => {
                            let rank = self.group.members.get(rank).copied().unwrap_or(rank);
                            let message = "see its own message".into();
                            Error::RankPanicked { rank, message, log }
                        }
                        false => Error::RankLost { group, rank, operation: self.post.call.to_string(), log },
                    });
                }
            } else if waited > self.world.timeout {
                self.propose(Error::Timeout {
                    group: self.group.name.clone(),
                    rank: self.group.rank,
                    operation: self.post.call.to_string(),
                    waited,
                    // Rank 0 of the world finds out.
                    missing: String::new(),
                    log: CallLog::default(),
                });
            }
        }
    }

    /// Whether this collective will not take place any more. Only the decider can tell.
    fn is_over(&self, waited: Duration, since: &Duration) -> bool {
        match self.group.rank {
            0 => true,
            _ if self.world.is_lost(self.group.members[0]) => true,
            _ => match self.group.closed.get() {
                Some(committed) => *committed <= self.sequence,
                None => waited.saturating_sub(*since) > LAST_WORD,
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
        let (group, members) = (self.group.name.clone(), self.group.members.clone());
        Proposal { error, group, members, call: Some(self.post.call) }
    }
}

/// Whether the calls of all ranks belong together. A call without a dtype agrees with any; the others agree on one.
fn agree(posts: &[Post]) -> bool {
    let mut dtypes = posts.iter().filter_map(|post| post.call.dtype);
    let first = dtypes.next();
    dtypes.all(|dtype| Some(dtype) == first) && posts.iter().all(|post| post.call.agrees(&posts[0].call))
}
