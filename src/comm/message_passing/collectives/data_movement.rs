//! Moves data without a reduction: broadcast, gathers, scatter, all-to-all.

use std::ops::Range;

use super::receive_counts::ReceiveCounts;
use super::{CollectiveRun, NumberExchange, PendingTransfers, Segment, destination, segments_of};
use crate::Error;
use crate::comm::message_passing::group::MessageKind;
use crate::comm::message_passing::shared_memory::{Rounds, SharedMemory};
use crate::comm::transport::BufferRef;
use crate::comm::{Call, Operation, OutputAllocator, part};

impl CollectiveRun<'_> {
    pub(super) fn broadcast(&self, root: usize, pieces: &[Segment], size: usize) -> Result<u64, Error> {
        let (n, rank) = (self.group.size(), self.group.rank);
        let bytes: usize = pieces.iter().map(|piece| piece.bytes).sum();
        let mut transfers = self.transfers();
        let send = |to: usize, kind: MessageKind, share: Range<usize>, transfers: &mut PendingTransfers<'_>| {
            segments_of(pieces, share, size).try_for_each(|segment| self.post_send(to, kind, segment, transfers))
        };
        let receive = |from: usize, kind: MessageKind, share: Range<usize>, transfers: &mut PendingTransfers<'_>| {
            segments_of(pieces, share, size).try_for_each(|segment| self.post_receive(from, kind, segment, transfers))
        };
        let all = 0..bytes / size;
        if n == 2 || bytes <= self.world.endpoint.info().thresholds.broadcast {
            if rank == root {
                for other in self.others() {
                    send(other, MessageKind::Contributions, all.clone(), &mut transfers)?;
                }
            } else {
                receive(root, MessageKind::Contributions, all.clone(), &mut transfers)?;
            }
        } else {
            // The root has all of it: the others share the parts.
            let share = |rank: usize| part(bytes / size, n - 1, (rank + n - root - 1) % n);
            let others = || self.others().filter(|other| *other != root);
            if rank == root {
                for other in others() {
                    send(other, MessageKind::Contributions, share(other), &mut transfers)?;
                }
            } else {
                let mut mine = self.transfers();
                receive(root, MessageKind::Contributions, share(rank), &mut mine)?;
                for other in others() {
                    receive(other, MessageKind::Results, share(other), &mut transfers)?;
                }
                self.finish(&mut mine)?;
                for other in others() {
                    send(other, MessageKind::Results, share(rank), &mut transfers)?;
                }
            }
        }
        self.finish(&mut transfers)?;
        Ok(if rank == root { 0 } else { bytes as u64 })
    }

    /// Collects some rows of every rank's input, in rank order, in the output. The inputs of the others come in
    /// messages, or are in their slots. `exchange` is for [`check_memory`](Self::check_memory).
    pub(super) fn collect(
        &self,
        input: BufferRef<'_>,
        output: &mut dyn OutputAllocator,
        shared_memory: Option<(&SharedMemory, &Rounds)>,
        exchange: NumberExchange<'_>,
    ) -> Result<u64, Error> {
        let (n, rank, counts) = (self.group.size(), self.group.rank, ReceiveCounts(self.calls));
        // All ranks come to the same result.
        let most = counts.most().map_err(|to| self.out_of_memory(to, usize::MAX))?;
        let Call { dtype: Some(dtype), shape, .. } = self.calls[counts.source(rank)] else { return Ok(0) };
        let (row, total) = (counts.row(rank), counts.received(rank).unwrap_or_default());
        let takes = !matches!(self.call.operation, Operation::Gather { root } if root != rank);
        let mut scratch = Vec::new();
        let mut allocated = takes.then(|| output.allocate(&shape.with_rows(total), dtype));
        let begin = allocated.as_mut().map(|allocated| destination(allocated, &mut scratch, total * row));
        let lacks = matches!(begin, Some(None)).then_some(total * row);
        match (shared_memory, lacks) {
            (None, _) => self.check_memory(lacks, most, exchange)?,
            (Some(_), Some(bytes)) => return Err(self.fail_out_of_memory(bytes)),
            (Some(_), None) => {}
        }
        // Declared after the buffers, so that it is dropped before them.
        let mut transfers = self.transfers();
        let contribution = |to: usize| {
            let rows = counts.rows(rank, to);
            // SAFETY: the rows lie within the input.
            Segment { data: unsafe { input.as_ptr().add(rows.start * row).cast_mut() }, bytes: rows.len() * row }
        };
        for other in self.others().filter(|_| shared_memory.is_none()) {
            self.post_send(other, MessageKind::Contributions, contribution(other), &mut transfers)?;
        }
        let Some(Some(begin)) = begin else { return self.finish(&mut transfers).map(|()| 0) };
        let (mut target, mut moved) = (begin, 0);
        for from in 0..n {
            let rows = counts.rows(from, rank);
            let bytes = rows.len() * row;
            match shared_memory {
                // It is there already.
                _ if from == rank && contribution(rank).data == target => {}
                // SAFETY: as long as that, and not the same memory.
                _ if from == rank => unsafe { target.copy_from_nonoverlapping(contribution(rank).data, bytes) },
                // SAFETY: the input of that rank is in its slot, from the beginning.
                Some((shared_memory, rounds)) => unsafe {
                    target.copy_from_nonoverlapping(shared_memory.slot(from, rounds).add(rows.start * row), bytes);
                },
                None => self.post_receive(
                    from,
                    MessageKind::Contributions,
                    Segment { data: target, bytes },
                    &mut transfers,
                )?,
            }
            moved += if from == rank { 0 } else { bytes as u64 };
            // SAFETY: the output has room for all.
            target = unsafe { target.add(bytes) };
        }
        let finished = self.finish(&mut transfers);
        drop(transfers);
        let bools = self.check_bools(dtype, &[Segment { data: begin, bytes: total * row }]);
        finished.and(bools)?;
        allocated.transpose().map(|_| moved)
    }
}
