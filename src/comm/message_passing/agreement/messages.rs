//! Agrees on a collective by messages: each rank sends its call to the group root, which answers with the calls of all.

use super::{Agreement, agree};
use crate::Error;
use crate::comm::message_passing::call_descriptor::{CallDescriptor, DESCRIPTOR_BYTES};
use crate::comm::message_passing::codec::Reader;
use crate::comm::message_passing::control_path::ControlPath;
use crate::comm::message_passing::endpoint::Request;
use crate::comm::message_passing::group::MessageKind;
use crate::comm::message_passing::shared_memory::Address;
use crate::comm::message_passing::wait::Wait;

/// Bytes that the group root appends to the calls: the number of a new group, and the address of shared memory.
const COMMIT_BYTES: usize = 8 + Address::BYTES;

impl Agreement<'_> {
    pub(super) fn by_messages(&self, control_path: &mut ControlPath) -> Result<(Vec<CallDescriptor>, u64), Error> {
        let n = self.group.size();
        let mut table = vec![0u8; n * DESCRIPTOR_BYTES + COMMIT_BYTES];
        let own_bytes = self.descriptor.to_bytes();
        let own = self.group.rank * DESCRIPTOR_BYTES..(self.group.rank + 1) * DESCRIPTOR_BYTES;
        table[own.clone()].copy_from_slice(&own_bytes);
        let all = |table: &[u8]| {
            let descriptors: Option<Vec<CallDescriptor>> =
                table[..n * DESCRIPTOR_BYTES].chunks_exact(DESCRIPTOR_BYTES).map(CallDescriptor::from_bytes).collect();
            descriptors.ok_or_else(|| self.garbled())
        };
        let (descriptors, id, offered);
        if self.group.rank == 0 {
            table = self.collect(table)?;
            descriptors = all(&table)?;
            id = self.commit(&descriptors)?;
            offered = control_path.offer(n);
            table[n * DESCRIPTOR_BYTES..][..8].copy_from_slice(&id.to_le_bytes());
            if let Some(address) = offered {
                table[n * DESCRIPTOR_BYTES + 8..].copy_from_slice(&address.to_bytes());
            }
            self.send_commit(table)?;
        } else {
            table = self.ask(table, own_bytes.to_vec())?;
            descriptors = all(&table)?;
            id = Reader(&table[n * DESCRIPTOR_BYTES..]).number().unwrap_or_default();
            offered = Address::from_bytes(&table[n * DESCRIPTOR_BYTES + 8..]);
            // Lengths and roots are read from these: they must match what this rank has called.
            if table[own] != own_bytes || !agree(&descriptors) || !self.is_group(id) {
                return Err(self.garbled());
            }
        }
        control_path.settle(self.group, &descriptors, offered);
        Ok((descriptors, id))
    }

    /// The group root's side: receives the calls of all.
    fn collect(&self, mut table: Vec<u8>) -> Result<Vec<u8>, Error> {
        let (endpoint, tag) = (&self.world.endpoint, self.group.tag(MessageKind::Call));
        let mut requests = Vec::with_capacity(self.group.size() - 1);
        let begun = (1..self.group.size()).try_for_each(|other| {
            let (member, target) = (self.group.members[other], table[other * DESCRIPTOR_BYTES..].as_mut_ptr());
            // SAFETY: the table is on the heap, and kept until the requests are done or cancelled.
            unsafe { endpoint.receive(member, tag, target, DESCRIPTOR_BYTES, &mut requests) }
        });
        self.receive(begun, requests, table)
    }

    fn send_commit(&self, commit: Vec<u8>) -> Result<(), Error> {
        let (endpoint, tag) = (&self.world.endpoint, self.group.tag(MessageKind::Commit));
        let mut requests = Vec::new();
        // SAFETY: the bytes are on the heap, and kept until they are sent.
        let begun = self.group.members[1..].iter().try_for_each(|member| unsafe {
            endpoint.send(*member, tag, commit.as_ptr(), commit.len(), &mut requests)
        });
        let sent = begun.and_then(|()| endpoint.progress(&mut requests).map(drop));
        self.world.keep(requests, commit);
        sent
    }

    /// Another rank's side: sends its call to the group root and waits for the commit.
    fn ask(&self, mut table: Vec<u8>, own: Vec<u8>) -> Result<Vec<u8>, Error> {
        let (endpoint, root, group) = (&self.world.endpoint, self.group.members[0], self.group);
        let (mut sent, mut requests) = (Vec::new(), Vec::new());
        // SAFETY: the call and the table are on the heap, and kept until the requests are done or cancelled.
        let begun = unsafe {
            let data = table.as_mut_ptr();
            endpoint.receive(root, group.tag(MessageKind::Commit), data, table.len(), &mut requests).and_then(|()| {
                endpoint.send(root, group.tag(MessageKind::Call), own.as_ptr(), DESCRIPTOR_BYTES, &mut sent)
            })
        };
        let outcome = self.receive(begun, requests, table);
        let progressed = endpoint.progress(&mut sent);
        self.world.keep(sent, own);
        progressed.and(outcome)
    }

    /// Waits for the receives into the table, if they were posted, or until the world has failed.
    fn receive(&self, begun: Result<(), Error>, mut requests: Vec<Request>, table: Vec<u8>) -> Result<Vec<u8>, Error> {
        let progress = || self.world.endpoint.progress(&mut requests);
        match begun.and_then(|()| self.wait(Wait::new(self.world, false), progress)) {
            Ok(()) => Ok(table),
            Err(error) => {
                self.world.cancel_receives(requests, table);
                Err(error)
            }
        }
    }
}
