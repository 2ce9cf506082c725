//! Messages between two ranks.
//!
//! A message is a header, which says tag, dtype and shape, and its bytes: behind the header if they are few, else as a
//! message of its own, straight from the sender's tensor into the receiver's. The tags of a wire are too narrow for ours, so
//! all messages from one rank to another go in one line, and the receiver puts aside what it has not been asked for yet.

use super::codec::{Reader, Writer};
use super::group::{Group, Inbox, Kind, lock};
use super::wire::Ticket;
use super::world::World;
use crate::Error;
use crate::comm::room::Room;
use crate::comm::{Message, host};
use burn::backend::TensorMetadata;

/// Messages up to so many bytes travel in their header.
const INLINE: usize = 2048;

/// A message that has come, or is coming.
#[derive(Debug)]
pub(super) struct Incoming {
    pub tag: u64,
    /// `None` once it has been handed on.
    room: Option<Room>,
    tickets: Vec<Ticket>,
}

/// Begins to send a message. The tensor is kept until it is there.
pub(super) fn post(world: &World, group: &Group, to: usize, tag: u64, Message(tensor): Message) -> Result<(), Error> {
    world.clear();
    let tensor = host::packed(tensor);
    let data = host::lend(&tensor);
    let len = data.elements() * data.dtype().size();
    let mut header = Writer::default();
    header.number(tag).dtype(Some(tensor.dtype())).list(tensor.shape().as_slice(), |w, dim| {
        w.number(*dim as u64);
    });
    if len <= INLINE && len > 0 {
        // SAFETY: the tensor is borrowed.
        header.0.extend_from_slice(unsafe { std::slice::from_raw_parts(data.as_ptr(), len) });
    }
    let mut tickets = Vec::new();
    // Held over both, so that headers and bytes come in the same order.
    let mut sent = lock(&group.sent);
    // SAFETY: both are kept on the heap until they are there.
    unsafe {
        let member = group.members[to];
        world.wire.send(member, group.tag(Kind::Header), header.0.as_ptr(), header.0.len(), &mut tickets)?;
        if len > INLINE {
            world.wire.send(member, group.tag(Kind::Payload), data.as_ptr(), len, &mut tickets)?;
        }
    }
    sent[to] += 1;
    drop(sent);
    let done = world.wire.progress(&mut tickets)?;
    if !done {
        world.keep(tickets, (header, tensor));
    }
    Ok(())
}

impl Inbox {
    /// Takes in whatever has come from `from`.
    pub fn fill(&mut self, world: &World, group: &Group, from: usize) -> Result<(), Error> {
        while let Some((_, bytes)) = world.wire.take(Some(group.members[from]), group.tag(Kind::Header))? {
            self.came += 1;
            world.clear();
            let engine = world.wire.engine();
            let garbled = || Error::Engine { engine, problem: format!("a message of rank {from} is garbled") };
            let mut reader = Reader(&bytes);
            let (tag, dtype) = (reader.number().ok_or_else(garbled)?, reader.dtype().flatten().ok_or_else(garbled)?);
            let dims = reader.list(Reader::index).ok_or_else(garbled)?;
            let mut room = Room::new("recv", &dims, dtype)?;
            let mut place = room.lend();
            let (data, len) = (place.as_mut_ptr(), place.elements() * dtype.size());
            let mut tickets = Vec::new();
            if len > INLINE {
                // SAFETY: the room is on the heap, is nobody else's, and is kept until all is there.
                unsafe {
                    let member = group.members[from];
                    world.wire.receive(member, group.tag(Kind::Payload), data, len, &mut tickets)?;
                }
            } else if reader.0.len() == len {
                // SAFETY: as long as that, and memory of our own.
                unsafe { reader.0.as_ptr().copy_to_nonoverlapping(data, len) };
            } else {
                return Err(garbled());
            }
            self.waiting.push_back(Incoming { tag, room: Some(room), tickets });
        }
        Ok(())
    }

    /// Takes the oldest message that bears `tag`, if all of it is there. Also tells whether there is one at all.
    pub fn get(&mut self, world: &World, tag: u64) -> Result<(Option<Message>, bool), Error> {
        let Some(place) = self.waiting.iter().position(|message| message.tag == tag) else {
            return Ok((None, false));
        };
        if !world.wire.progress(&mut self.waiting[place].tickets)? {
            return Ok((None, true));
        }
        let message = self.waiting.remove(place);
        let room = message.and_then(|mut message| message.room.take());
        // SAFETY: all of it is there.
        Ok((room.map(|room| Message(unsafe { room.filled() })), true))
    }

    pub fn tags(&self) -> Vec<u64> {
        self.waiting.iter().map(|message| message.tag).collect()
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.tickets.is_empty() {
            // The wire may still write there.
            std::mem::forget((self.room.take(), std::mem::take(&mut self.tickets)));
        }
    }
}
