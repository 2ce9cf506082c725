//! How the ranks of a group come to a collective; the protocol is told in the [module](super).

mod board;
#[cfg(fuzzing)]
pub(super) mod fuzzing;
mod messages;

use std::time::Duration;

use super::codec::{Reader, Writer};
use super::group::{Group, lock};
use super::pace::Pace;
use super::venue::Venue;
use super::world::{Proposal, World};
use crate::Error;
use crate::comm::{Call, CallLog, Operation};

/// Bytes of what a rank brings to a collective.
pub(super) const POST: usize = 192;

/// How long a rank that finds a peer gone waits for the reason, which may be on its way.
const GRACE: Duration = Duration::from_millis(100);
/// How long a rank waits for the decider's word once the world has failed.
const LAST_WORD: Duration = Duration::from_secs(2);

/// What a rank brings to a collective.
#[derive(Debug, Clone, Copy)]
pub(super) struct Post {
    pub call: Call,
    /// For [`Operation::Split`]; at the second meeting of a collective, what the rank tells.
    pub color: u64,
    pub key: i64,
    /// Whether this rank has reached the board that was offered, see [`Venue`].
    pub reaches: bool,
}

impl Post {
    pub fn to_bytes(self) -> [u8; POST] {
        let mut writer = Writer(Vec::with_capacity(POST));
        writer.call(&self.call).number(self.color).number(self.key as u64).byte(self.reaches.into());
        let mut bytes = [0; POST];
        bytes[..writer.0.len()].copy_from_slice(&writer.0);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let call = reader.call()?;
        let (color, key, reaches) = (reader.number()?, reader.number()? as i64, reader.byte()? != 0);
        Some(Self { call, color, key, reaches })
    }
}

/// A rank on its way into a collective.
pub(super) struct Agreement<'a> {
    pub world: &'a World,
    pub group: &'a Group,
    /// Number of this meeting.
    pub sequence: u64,
    /// Number of the collective, for people.
    pub told: u64,
    pub post: Post,
    /// Number of this call in the log.
    pub number: u64,
}

impl Agreement<'_> {
    /// Meets the others. Returns what all ranks bring, and the number of the group that the decider has made for them,
    /// if this is a split.
    pub fn meet(&self, venue: &mut Venue) -> Result<(Vec<Post>, u64), Error> {
        if let Some((board, rounds)) = venue.board(self.group) {
            return self.on_board(board, rounds);
        }
        self.by_messages(venue)
    }

    /// The decider commits the collective, unless the calls do not agree or the world has failed. Returns the number of a
    /// group that is made by it.
    fn decide(&self, posts: &[Post]) -> Result<u64, Error> {
        if !agree(posts) {
            let calls = posts.iter().map(|post| post.call).collect();
            let (group, log) = (self.group.name.clone(), CallLog::default());
            return Err(self.fail(Error::Mismatch { group, sequence: self.told, calls, log }));
        }
        let id = match posts[0].call.operation {
            Operation::Split => self.world.new_group_id()?,
            _ => 0,
        };
        let mut decider = lock(&self.group.decider);
        match (decider.closed, self.world.fate()) {
            (true, Some(error)) => Err(error.clone()),
            _ => {
                decider.committed += 1;
                Ok(id)
            }
        }
    }

    fn is_group(&self, id: u64) -> bool {
        id < Group::most(self.world.wire.tags())
    }

    fn garbled(&self) -> Error {
        let problem = "a call is garbled: do all ranks run this program?".into();
        self.fail(Error::Engine { engine: self.world.wire.engine(), problem })
    }

    /// Waits until `come` says that it is time, or for the end of the world.
    fn wait(&self, mut pace: Pace<'_>, mut come: impl FnMut() -> Result<bool, Error>) -> Result<(), Error> {
        let (mut gone_since, mut over_since) = (None, None);
        while !come()? {
            let Some(waited) = pace.pause() else { continue };
            if let Some(error) = self.world.fate() {
                if self.is_over(waited, over_since.get_or_insert(waited)) {
                    return Err(error.clone());
                }
                continue;
            }
            self.group.watch.sleeps(self.group.rank, self.number, self.world.wire.now() - waited);
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
        Ok(())
    }

    /// Whether this collective will not take place any more. Only the decider can tell.
    fn is_over(&self, waited: Duration, since: &Duration) -> bool {
        match self.group.rank {
            0 => true,
            _ if self.world.is_lost(self.group.members[0]) => true,
            _ => match self.group.closed.get() {
                Some(committed) => *committed <= self.sequence,
                None => waited.saturating_sub(*since) > self.world.within(LAST_WORD),
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
        Proposal { error, group, members, call: Some((self.sequence, self.post.call)) }
    }
}

/// Whether the calls of all ranks belong together. A call without a dtype agrees with any; the others agree on one.
fn agree(posts: &[Post]) -> bool {
    let mut dtypes = posts.iter().filter_map(|post| post.call.dtype);
    let first = dtypes.next();
    dtypes.all(|dtype| Some(dtype) == first) && posts.iter().all(|post| post.call.agrees(&posts[0].call))
}
