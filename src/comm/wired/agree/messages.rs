//! Meeting by messages: a rank's call to the decider, and the calls of all with its word.

use super::{Agreement, POST, Post, agree};
use crate::Error;
use crate::comm::wired::board::Address;
use crate::comm::wired::codec::Reader;
use crate::comm::wired::group::Kind;
use crate::comm::wired::pace::Pace;
use crate::comm::wired::venue::Venue;
use crate::comm::wired::wire::Ticket;

/// Bytes of what the decider adds to the calls: the number of a new group, and where a board is.
const WORD: usize = 8 + Address::BYTES;

impl Agreement<'_> {
    pub(super) fn by_messages(&self, venue: &mut Venue) -> Result<(Vec<Post>, u64), Error> {
        let n = self.group.size();
        let mut table = vec![0u8; n * POST + WORD];
        let called = self.post.to_bytes();
        let own = self.group.rank * POST..(self.group.rank + 1) * POST;
        table[own.clone()].copy_from_slice(&called);
        let all = |table: &[u8]| {
            let posts: Option<Vec<Post>> = table[..n * POST].chunks_exact(POST).map(Post::from_bytes).collect();
            posts.ok_or_else(|| self.garbled())
        };
        let (posts, id, offered);
        if self.group.rank == 0 {
            self.collect(&mut table)?;
            posts = all(&table)?;
            id = self.decide(&posts)?;
            offered = venue.offer(n);
            table[n * POST..][..8].copy_from_slice(&id.to_le_bytes());
            if let Some(address) = offered {
                table[n * POST + 8..].copy_from_slice(&address.to_bytes());
            }
            self.announce(&table)?;
        } else {
            self.ask(&mut table)?;
            posts = all(&table)?;
            id = Reader(&table[n * POST..]).number().unwrap_or_default();
            offered = Address::from_bytes(&table[n * POST + 8..]);
            // Lengths and roots are taken from these: they must go with what this rank has called.
            if table[own] != called || !agree(&posts) || !self.is_group(id) {
                return Err(self.garbled());
            }
        }
        venue.settle(self.group, &posts, offered);
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
        self.receive(&mut tickets)
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
        let outcome = self.receive(&mut tickets);
        if !self.world.wire.progress(&mut sent)? {
            self.world.keep(sent, own);
        }
        outcome
    }

    /// Waits for the tickets, or for the end of the world. They are done or taken back afterwards.
    fn receive(&self, tickets: &mut Vec<Ticket>) -> Result<(), Error> {
        let outcome = self.wait(Pace::new(self.world, false), || self.world.wire.progress(tickets));
        if outcome.is_err() {
            self.world.wire.cancel(tickets);
        }
        outcome
    }
}
