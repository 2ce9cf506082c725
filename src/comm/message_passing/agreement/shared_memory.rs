//! Agrees on a collective through shared memory: each rank publishes its call, the group root reads all and commits.

use std::sync::atomic::Ordering;

use super::{Agreement, agree};
use crate::Error;
use crate::comm::message_passing::call_descriptor::{CallDescriptor, DESCRIPTOR_BYTES};
use crate::comm::message_passing::shared_memory::{Rounds, SharedMemory};
use crate::comm::message_passing::wait::Wait;

impl Agreement<'_> {
    pub(super) fn in_shared_memory(
        &self,
        shared_memory: &SharedMemory,
        rounds: &mut Rounds,
    ) -> Result<(Vec<CallDescriptor>, u64), Error> {
        let own_bytes = self.descriptor.to_bytes();
        shared_memory.write_descriptor(self.group.rank, rounds, &own_bytes);
        shared_memory.publish(rounds);
        let all = |rounds: &Rounds| {
            // Most calls are equal.
            let descriptor = |bytes: [u8; DESCRIPTOR_BYTES]| {
                if bytes == own_bytes { Some(self.descriptor) } else { CallDescriptor::from_bytes(&bytes) }
            };
            let descriptors: Option<Vec<CallDescriptor>> =
                (0..self.group.size()).map(|rank| descriptor(shared_memory.read_descriptor(rank, rounds))).collect();
            descriptors.ok_or_else(|| self.garbled())
        };
        if self.group.rank == 0 {
            self.wait(Wait::on_shared_memory(self.world, false), || Ok(shared_memory.all_published(rounds)))?;
            let descriptors = all(rounds)?;
            let id = self.commit(&descriptors)?;
            shared_memory.number().store(id, Ordering::Relaxed);
            shared_memory.commit(rounds);
            return Ok((descriptors, id));
        }
        self.wait(Wait::on_shared_memory(self.world, false), || Ok(shared_memory.committed(rounds)))?;
        let (descriptors, id) = (all(rounds)?, shared_memory.number().load(Ordering::Relaxed));
        // Lengths and roots are read from these: they must match what this rank has called.
        if !agree(&descriptors) || !self.is_group(id) {
            return Err(self.garbled());
        }
        Ok((descriptors, id))
    }
}
