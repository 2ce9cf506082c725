//! Point-to-point messages over an endpoint or a mailbox in shared memory.
//!
//! A message is a header, which has tag, dtype and shape, and its bytes: after the header if they are few, else as a
//! message of its own, straight from the sender's tensor into the receiver's. The tags of an endpoint are too narrow
//! for ours, so all messages from one rank to another share one tag, and the receiver queues those that it has not been
//! asked for yet.

use super::codec::{Reader, Writer};
use super::group::{Group, MessageKind};
use super::inbox::{Inbox, Incoming};
use super::world::World;
use crate::Error;
use crate::comm::receive_buffer::ReceiveBuffer;
use crate::comm::{Message, host_buffer};
use crate::lock::lock;
use burn::backend::TensorMetadata;
use burn::tensor::DType;

/// Starts to send a message. The tensor is kept until it is sent.
pub(super) fn send(world: &World, group: &Group, to: usize, tag: u64, Message(tensor): Message) -> Result<(), Error> {
    world.release_sent();
    let tensor = host_buffer::contiguous(tensor);
    let data = host_buffer::buffer_ref(&tensor);
    let len = data.elements() * data.dtype().size();
    let inline = world.endpoint.info().thresholds.inline;
    let mut requests = Vec::new();
    // Locked throughout, so that headers and bytes are sent in the same order.
    let mut sent = lock(&group.sent);
    let mut header = Writer::default();
    header.number(sent[to]).number(tag).dtype(Some(tensor.dtype())).list(tensor.shape().as_slice(), |w, dim| {
        w.number(*dim as u64);
    });
    let posted = group.shared_memory.get().filter(|_| to != group.rank).and_then(|shared_memory| {
        let enclosed = if len <= shared_memory.entry_bytes() { len } else { 0 };
        // SAFETY: the tensor is borrowed.
        let posted = unsafe { shared_memory.post_message((group.rank, to), &header.0, data.as_ptr(), enclosed) };
        posted.then_some(enclosed)
    });
    if posted.is_none() && len <= inline && len > 0 {
        // SAFETY: the tensor is borrowed, and as long as that.
        header.0.extend_from_slice(unsafe { std::slice::from_raw_parts(data.as_ptr(), len) });
    }
    let member = group.members[to];
    // SAFETY: the tensor and the header are on the heap, and kept until they are sent, whatever happens.
    let begun = unsafe {
        let begun = match posted {
            Some(_) => Ok(()),
            None => world.endpoint.send(
                member,
                group.tag(MessageKind::Header),
                header.0.as_ptr(),
                header.0.len(),
                &mut requests,
            ),
        };
        begun.and_then(|()| match len > posted.unwrap_or(inline) {
            true => world.endpoint.send(member, group.tag(MessageKind::Payload), data.as_ptr(), len, &mut requests),
            false => Ok(()),
        })
    };
    if begun.is_ok() {
        sent[to] += 1;
    }
    drop(sent);
    let progressed = begun.and_then(|()| world.endpoint.progress(&mut requests).map(drop));
    world.keep(requests, (header, tensor));
    progressed
}

/// The header of a message.
struct PayloadHeader {
    number: u64,
    tag: u64,
    dtype: DType,
    dims: Vec<usize>,
}

impl PayloadHeader {
    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let (number, tag) = (reader.number()?, reader.number()?);
        Some(Self { number, tag, dtype: reader.dtype().flatten()?, dims: reader.list(Reader::index)? })
    }
}

impl Inbox {
    /// Receives what `from` has sent, until there is a message with this `tag`.
    pub fn fill(&mut self, world: &World, group: &Group, from: usize, tag: u64) -> Result<(), Error> {
        while self.waiting.iter().all(|message| message.tag != tag) {
            if self.take_from_mailbox(world, group, from)? {
                continue;
            }
            let bytes = match self.ahead.take() {
                Some(bytes) => bytes,
                None => {
                    world.endpoint.drive();
                    match world.endpoint.take(Some(group.members[from]), group.tag(MessageKind::Header))? {
                        Some((_, bytes)) => bytes,
                        None => break,
                    }
                }
            };
            let garbled = || garbled(world, from);
            let mut reader = Reader(&bytes);
            let header = PayloadHeader::read(&mut reader).ok_or_else(garbled)?;
            if header.number > self.came {
                // Messages in the mailbox precede it, if this rank has attached to the shared memory already.
                self.ahead = Some(bytes);
                match self.take_from_mailbox(world, group, from)? {
                    true => continue,
                    false => break,
                }
            }
            world.release_sent();
            self.accept(world, group, from, header, world.endpoint.info().thresholds.inline, |target, len| {
                // SAFETY: as long as that, and memory of our own.
                let fits = reader.0.len() == len;
                fits.then(|| unsafe { reader.0.as_ptr().copy_to_nonoverlapping(target, len) }).is_some()
            })?;
        }
        Ok(())
    }

    /// Receives the next message of `from` in the mailbox, if there is one and no message from the endpoint precedes
    /// it.
    fn take_from_mailbox(&mut self, world: &World, group: &Group, from: usize) -> Result<bool, Error> {
        let Some(shared_memory) = group.shared_memory.get() else { return Ok(false) };
        let Some((header, data)) = shared_memory.next_message((from, group.rank)) else { return Ok(false) };
        let header = PayloadHeader::read(&mut Reader(&header)).ok_or_else(|| garbled(world, from))?;
        if header.number > self.came {
            return Ok(false);
        }
        // SAFETY: no more than an entry has, to memory of our own.
        self.accept(world, group, from, header, shared_memory.entry_bytes(), |target, len| unsafe {
            data.copy_to_nonoverlapping(target, len);
            true
        })?;
        shared_memory.take_message((from, group.rank));
        Ok(true)
    }

    /// Receives a message. If it is no longer than `enclosed`, its bytes came with the header, and `copy` copies them.
    fn accept(
        &mut self,
        world: &World,
        group: &Group,
        from: usize,
        PayloadHeader { number, tag, dtype, dims }: PayloadHeader,
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
        let mut buffer = ReceiveBuffer::new("recv", &dims, dtype).map_err(no_memory)?;
        let mut target = buffer.buffer_mut();
        let (data, len) = (target.as_mut_ptr(), target.elements() * dtype.size());
        // Owns the buffer from now on: it leaks it, should the endpoint have begun to write there.
        let mut message = Incoming { tag, buffer: Some(buffer), requests: Vec::new() };
        if len > enclosed {
            // SAFETY: the buffer is on the heap, has no other user, and is kept until all is received.
            unsafe {
                let member = group.members[from];
                world.endpoint.receive(member, group.tag(MessageKind::Payload), data, len, &mut message.requests)?;
            }
        } else if !copy(data, len) {
            return Err(garbled(world, from));
        }
        self.came += 1;
        self.waiting.push_back(message);
        Ok(())
    }

    /// Takes the oldest message with this `tag`, if all of it has arrived. Also returns whether there is one at all.
    pub fn get(&mut self, world: &World, from: usize, tag: u64) -> Result<(Option<Message>, bool), Error> {
        let Some(index) = self.waiting.iter().position(|message| message.tag == tag) else {
            return Ok((None, false));
        };
        if !world.endpoint.progress(&mut self.waiting[index].requests)? {
            return Ok((None, true));
        }
        let buffer = self.waiting.remove(index).and_then(|mut message| message.buffer.take());
        // SAFETY: all of it has been received.
        match buffer.map(|buffer| unsafe { buffer.into_tensor() }) {
            Some(None) => Err(garbled(world, from)),
            message => Ok((message.flatten().map(Message), true)),
        }
    }

    pub fn tags(&self) -> Vec<u64> {
        self.waiting.iter().map(|message| message.tag).collect()
    }
}

fn garbled(world: &World, from: usize) -> Error {
    Error::Transport { transport: world.endpoint.name(), problem: format!("a message of rank {from} is garbled") }
}
