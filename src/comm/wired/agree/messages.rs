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
            table = self.collect(table)?;
            posts = all(&table)?;
            id = self.decide(&posts)?;
            offered = venue.offer(n);
            table[n * POST..][..8].copy_from_slice(&id.to_le_bytes());
            if let Some(address) = offered {
                table[n * POST + 8..].copy_from_slice(&address.to_bytes());
            }
            self.announce(table)?;
        } else {
            table = self.ask(table, called.to_vec())?;
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
    fn collect(&self, mut table: Vec<u8>) -> Result<Vec<u8>, Error> {
        let (wire, tag) = (&self.world.wire, self.group.tag(Kind::Call));
        let mut tickets = Vec::with_capacity(self.group.size() - 1);
        let begun = (1..self.group.size()).try_for_each(|other| {
            let (member, place) = (self.group.members[other], table[other * POST..].as_mut_ptr());
            // SAFETY: the table is on the heap, and kept until the tickets are done or taken back.
            unsafe { wire.receive(member, tag, place, POST, &mut tickets) }
        });
        self.receive(begun, tickets, table)
    }

    fn announce(&self, verdict: Vec<u8>) -> Result<(), Error> {
        let (wire, tag) = (&self.world.wire, self.group.tag(Kind::Verdict));
        let mut tickets = Vec::new();
        // SAFETY: the bytes are on the heap, and kept until they are sent.
        let begun = self.group.members[1..]
            .iter()
            .try_for_each(|member| unsafe { wire.send(*member, tag, verdict.as_ptr(), verdict.len(), &mut tickets) });
        let sent = begun.and_then(|()| wire.progress(&mut tickets).map(drop));
        self.world.keep(tickets, verdict);
        sent
    }

    /// Another rank's part: sends its call to the decider and waits for its word.
    fn ask(&self, mut table: Vec<u8>, own: Vec<u8>) -> Result<Vec<u8>, Error> {
        let (wire, decider, group) = (&self.world.wire, self.group.members[0], self.group);
        let (mut sent, mut tickets) = (Vec::new(), Vec::new());
        // SAFETY: what is sent and the table are on the heap, and kept until the tickets are done or taken back.
        let begun = unsafe {
            let place = table.as_mut_ptr();
            wire.receive(decider, group.tag(Kind::Verdict), place, table.len(), &mut tickets)
                .and_then(|()| wire.send(decider, group.tag(Kind::Call), own.as_ptr(), POST, &mut sent))
        };
        let outcome = self.receive(begun, tickets, table);
        let progressed = wire.progress(&mut sent);
        self.world.keep(sent, own);
        progressed.and(outcome)
    }

    /// Waits for what is received into the table, if it could be begun, or for the end of the world.
    fn receive(&self, begun: Result<(), Error>, mut tickets: Vec<Ticket>, table: Vec<u8>) -> Result<Vec<u8>, Error> {
        let progress = || self.world.wire.progress(&mut tickets);
        match begun.and_then(|()| self.wait(Pace::new(self.world, false), progress)) {
            Ok(()) => Ok(table),
            Err(error) => {
                self.world.give_up(tickets, table);
                Err(error)
            }
        }
    }
}
