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
use burn::tensor::DType;

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
    let inline = world.wire.sizes().inline;
    let mut tickets = Vec::new();
    // Held over all, so that headers and bytes come in the same order.
    let mut sent = lock(&group.sent);
    let mut header = Writer::default();
    header.number(sent[to]).number(tag).dtype(Some(tensor.dtype())).list(tensor.shape().as_slice(), |w, dim| {
        w.number(*dim as u64);
    });
    let posted = group.board.get().filter(|_| to != group.rank).and_then(|board| {
        let enclosed = if len <= board.letter_room() { len } else { 0 };
        // SAFETY: the tensor is borrowed.
        let posted = unsafe { board.post_letter((group.rank, to), &header.0, data.as_ptr(), enclosed) };
        posted.then_some(enclosed)
    });
    if posted.is_none() && len <= inline && len > 0 {
        // SAFETY: the tensor is borrowed, and as long as that.
        header.0.extend_from_slice(unsafe { std::slice::from_raw_parts(data.as_ptr(), len) });
    }
    let member = group.members[to];
    // SAFETY: the tensor and the header are on the heap, and kept until they are there, whatever becomes of this.
    let begun = unsafe {
        let begun = match posted {
            Some(_) => Ok(()),
            None => world.wire.send(member, group.tag(Kind::Header), header.0.as_ptr(), header.0.len(), &mut tickets),
        };
        begun.and_then(|()| match len > posted.unwrap_or(inline) {
            true => world.wire.send(member, group.tag(Kind::Payload), data.as_ptr(), len, &mut tickets),
            false => Ok(()),
        })
    };
    if begun.is_ok() {
        sent[to] += 1;
    }
    drop(sent);
    let progressed = begun.and_then(|()| world.wire.progress(&mut tickets).map(drop));
    world.keep(tickets, (header, tensor));
    progressed
}

/// What a message says of itself.
struct Header {
    number: u64,
    tag: u64,
    dtype: DType,
    dims: Vec<usize>,
}

impl Header {
    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let (number, tag) = (reader.number()?, reader.number()?);
        Some(Self { number, tag, dtype: reader.dtype().flatten()?, dims: reader.list(Reader::index)? })
    }
}

impl Inbox {
    /// Takes in what has come from `from`, until there is a message that bears `tag`.
    pub fn fill(&mut self, world: &World, group: &Group, from: usize, tag: u64) -> Result<(), Error> {
        while self.waiting.iter().all(|message| message.tag != tag) {
            if self.take_letter(world, group, from)? {
                continue;
            }
            let bytes = match self.ahead.take() {
                Some(bytes) => bytes,
                None => match world.wire.take(Some(group.members[from]), group.tag(Kind::Header))? {
                    Some((_, bytes)) => bytes,
                    None => break,
                },
            };
            let garbled = || garbled(world, from);
            let mut reader = Reader(&bytes);
            let header = Header::read(&mut reader).ok_or_else(garbled)?;
            if header.number > self.came {
                // Letters come before it. They are on the board, if this rank knows of the board already.
                self.ahead = Some(bytes);
                match self.take_letter(world, group, from)? {
                    true => continue,
                    false => break,
                }
            }
            world.clear();
            self.take_in(world, group, from, header, world.wire.sizes().inline, |place, len| {
                // SAFETY: as long as that, and memory of our own.
                let fits = reader.0.len() == len;
                fits.then(|| unsafe { reader.0.as_ptr().copy_to_nonoverlapping(place, len) }).is_some()
            })?;
        }
        Ok(())
    }

    /// Takes in the next letter of `from` on the board, if there is one and no message over the wire comes before it.
    fn take_letter(&mut self, world: &World, group: &Group, from: usize) -> Result<bool, Error> {
        let Some(board) = group.board.get() else { return Ok(false) };
        let Some((header, data)) = board.next_letter((from, group.rank)) else { return Ok(false) };
        let header = Header::read(&mut Reader(&header)).ok_or_else(|| garbled(world, from))?;
        if header.number > self.came {
            return Ok(false);
        }
        // SAFETY: no more than fits into a letter, to memory of our own.
        self.take_in(world, group, from, header, board.letter_room(), |place, len| unsafe {
            data.copy_to_nonoverlapping(place, len);
            true
        })?;
        board.take_letter((from, group.rank));
        Ok(true)
    }

    /// Takes in a message. If it is no longer than `enclosed`, its bytes came with the header, and `copy` has them.
    fn take_in(
        &mut self,
        world: &World,
        group: &Group,
        from: usize,
        Header { number, tag, dtype, dims }: Header,
        enclosed: usize,
        copy: impl FnOnce(*mut u8, usize) -> bool,
    ) -> Result<(), Error> {
        if number != self.came {
            return Err(garbled(world, from));
        }
        let no_memory = |error| match error {
            Error::InvalidArgument { operation, .. } => {
                let bytes = dims.iter().fold(dtype.size(), |bytes, dim| bytes.saturating_mul(*dim));
                let (group, rank) = (&group.name, group.rank);
                let problem = format!(
                    "rank {rank} of group `{group}` has no memory for the {bytes} bytes, {dims:?} of {dtype:?}, that rank {from} \
                     sends it with tag {tag}; send less at a time, or give the rank more memory"
                );
                Error::invalid(operation, problem)
            }
            error => error,
        };
        let mut room = Room::new("recv", &dims, dtype).map_err(no_memory)?;
        let mut place = room.lend();
        let (data, len) = (place.as_mut_ptr(), place.elements() * dtype.size());
        // Owns the room from now on: it keeps it, should the wire have begun to write there.
        let mut message = Incoming { tag, room: Some(room), tickets: Vec::new() };
        if len > enclosed {
            // SAFETY: the room is on the heap, is nobody else's, and is kept until all is there.
            unsafe {
                let member = group.members[from];
                world.wire.receive(member, group.tag(Kind::Payload), data, len, &mut message.tickets)?;
            }
        } else if !copy(data, len) {
            return Err(garbled(world, from));
        }
        self.came += 1;
        self.waiting.push_back(message);
        Ok(())
    }

    /// Takes the oldest message that bears `tag`, if all of it is there. Also tells whether there is one at all.
    pub fn get(&mut self, world: &World, from: usize, tag: u64) -> Result<(Option<Message>, bool), Error> {
        let Some(place) = self.waiting.iter().position(|message| message.tag == tag) else {
            return Ok((None, false));
        };
        if !world.wire.progress(&mut self.waiting[place].tickets)? {
            return Ok((None, true));
        }
        let room = self.waiting.remove(place).and_then(|mut message| message.room.take());
        // SAFETY: all of it is there.
        match room.map(|room| unsafe { room.filled() }) {
            Some(None) => Err(garbled(world, from)),
            message => Ok((message.flatten().map(Message), true)),
        }
    }

    pub fn tags(&self) -> Vec<u64> {
        self.waiting.iter().map(|message| message.tag).collect()
    }
}

fn garbled(world: &World, from: usize) -> Error {
    Error::Engine { engine: world.wire.engine(), problem: format!("a message of rank {from} is garbled") }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.tickets.is_empty() {
            // The wire may still write there.
            std::mem::forget((self.room.take(), std::mem::take(&mut self.tickets)));
        }
    }
}
