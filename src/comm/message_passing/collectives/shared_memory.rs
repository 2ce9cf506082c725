//! Moves the data of short collectives through the slots of shared memory.
//!
//! A rank writes its contribution before the agreement; once the collective is committed, the others read it. A tensor
//! that does not fit into a slot is reduced or broadcast in several rounds. Two ranks reduce in one part: each reduces
//! all of it, reading the other's slot. More ranks do it in two: each reduces its share and publishes the result, which
//! the others read.

use std::ops::Range;

use super::{CollectiveRun, Segment, destination, segments, segments_of};
use crate::Error;
use crate::comm::message_passing::shared_memory::{Rounds, SharedMemory, copy_out};
use crate::comm::reduce::{Contribution, fold};
use crate::comm::transport::BufferRef;
use crate::comm::{Call, Operation, OutputAllocator, ReduceOp, Transfer, part};

/// Most bytes of a tensor that is reduced in shared memory.
const MAX_REDUCED: usize = 512 << 10;
/// Most bytes of a tensor that is broadcast in shared memory.
const MAX_BROADCAST: usize = 256 << 10;
/// Most bytes of a contribution to a gather or scatter in shared memory.
const MAX_GATHERED: usize = 64 << 10;
/// Bytes of a round, where there are several.
const MAX_ROUND: usize = 128 << 10;

fn bytes(call: &Call) -> usize {
    call.shape.elements() * call.dtype.map_or(0, |dtype| dtype.size())
}

/// Whether the contribution of one rank fits its slot.
fn fits(shared_memory: &SharedMemory, call: &Call) -> bool {
    let most = match call.operation {
        Operation::AllReduce(_) | Operation::Reduce { .. } => MAX_REDUCED,
        Operation::Broadcast { .. } => MAX_BROADCAST,
        Operation::ReduceScatter(_) | Operation::AllToAll => shared_memory.slot_bytes(),
        _ => MAX_GATHERED.min(shared_memory.slot_bytes()),
    };
    bytes(call) <= most
}

/// Whether the contributions of all ranks fit their slots.
pub(in crate::comm::message_passing) fn all_fit(shared_memory: &SharedMemory, calls: &[Call]) -> bool {
    calls.iter().all(|call| fits(shared_memory, call))
}

/// A chunk of a tensor that fits into a slot.
struct Chunk<'a> {
    pieces: &'a [Segment],
    /// Elements.
    range: Range<usize>,
    /// Bytes of one.
    element: usize,
}

impl Chunk<'_> {
    /// Most elements of a chunk: all ranks get equal shares of whole ones.
    fn most(shared_memory: &SharedMemory, element: usize) -> usize {
        shared_memory.slot_bytes().min(MAX_ROUND) / element / shared_memory.size() * shared_memory.size()
    }

    /// The share of it that a rank reduces.
    fn share(&self, size: usize, rank: usize) -> Range<usize> {
        let share = part(self.range.len(), size, rank);
        self.range.start + share.start..self.range.start + share.end
    }

    /// The memory segments of a part of it, each with its offset in a slot.
    fn runs(&self, part: Range<usize>) -> impl Iterator<Item = (Segment, usize)> {
        let mut offset = part.start.saturating_sub(self.range.start) * self.element;
        segments_of(self.pieces, part, self.element).map(move |run| {
            offset += run.bytes;
            (run, offset - run.bytes)
        })
    }

    /// Writes it into this rank's slot, but for a part that nobody else reads.
    fn write(&self, shared_memory: &SharedMemory, rounds: &Rounds, own: Range<usize>) {
        let slot = shared_memory.slot(rounds.rank(), rounds);
        for part in [self.range.start..own.start, own.end..self.range.end] {
            for (run, offset) in self.runs(part) {
                // SAFETY: within the slot, which is this rank's to write. Shared memory overlaps no tensor.
                unsafe { copy_out(run.data, slot.add(offset), run.bytes) };
            }
        }
    }

    /// Copies a part from a rank's slot. Returns its bytes.
    fn read(&self, shared_memory: &SharedMemory, rounds: &Rounds, from: usize, part: Range<usize>) -> usize {
        let slot = shared_memory.slot(from, rounds);
        let bytes = part.len() * self.element;
        for (run, offset) in self.runs(part) {
            // SAFETY: within the slot; this rank's tensor is its own.
            unsafe { run.data.copy_from_nonoverlapping(slot.add(offset), run.bytes) };
        }
        bytes
    }

    /// The part that nobody else reads in a collective in place; `None` if nothing is read at all.
    fn own(&self, operation: Operation, size: usize, rank: usize) -> Option<Range<usize>> {
        match operation {
            Operation::Broadcast { root } if root != rank => None,
            Operation::AllReduce(_) if size > 2 => Some(self.share(size, rank)),
            Operation::Reduce { .. } => Some(self.share(size, rank)),
            _ => Some(self.range.start..self.range.start),
        }
    }
}

/// Writes the contribution of this rank into its slot, before the agreement.
pub(in crate::comm::message_passing) fn write_slot(
    shared_memory: &SharedMemory,
    rounds: &Rounds,
    call: &Call,
    transfer: &Transfer<'_, '_>,
) {
    if !fits(shared_memory, call) {
        return;
    }
    let (size, rank) = (shared_memory.size(), rounds.rank());
    match transfer {
        Transfer::Nothing => {}
        Transfer::InPlace(buffers) => {
            let (pieces, element) = segments(buffers);
            let total = elements(&pieces, element);
            let chunk = Chunk { pieces: &pieces, range: 0..total.min(Chunk::most(shared_memory, element)), element };
            if let Some(own) = chunk.own(call.operation, size, rank) {
                chunk.write(shared_memory, rounds, own);
            }
        }
        Transfer::OutOfPlace { input, .. } => {
            let (rows, width) = (part(call.shape.rows(), size, rank), call.shape.width());
            let own = match call.operation {
                Operation::Scatter { root } if root != rank => return,
                Operation::Gather { root } if root == rank => return,
                Operation::AllGather | Operation::Gather { .. } => 0..0,
                _ => rows.start * width..rows.end * width,
            };
            let (element, range) = (input.dtype().size(), 0..input.elements());
            let pieces = [Segment { data: input.as_ptr().cast_mut(), bytes: range.end * element }];
            Chunk { pieces: &pieces, range, element }.write(shared_memory, rounds, own);
        }
    }
}

fn elements(pieces: &[Segment], element: usize) -> usize {
    pieces.iter().map(|piece| piece.bytes).sum::<usize>() / element
}

impl CollectiveRun<'_> {
    /// The share of a collective that works in place.
    pub(super) fn in_place_in_shared_memory(
        &self,
        shared_memory: &SharedMemory,
        rounds: &mut Rounds,
        pieces: &[Segment],
        element: usize,
    ) -> Result<u64, Error> {
        let (size, rank, operation) = (self.group.size(), self.group.rank, self.call.operation);
        let (total, most) = (elements(pieces, element), Chunk::most(shared_memory, element));
        let mut moved = 0;
        for start in (0..total).step_by(most) {
            let chunk = Chunk { pieces, range: start..total.min(start + most), element };
            if start > 0 {
                rounds.next_round();
                if let Some(own) = chunk.own(operation, size, rank) {
                    chunk.write(shared_memory, rounds, own);
                }
                shared_memory.publish(rounds);
                self.wait_published(shared_memory, rounds)?;
            }
            moved += match operation {
                Operation::Broadcast { root } if root == rank => 0,
                Operation::Broadcast { root } => chunk.read(shared_memory, rounds, root, chunk.range.clone()),
                Operation::AllReduce(op) if size == 2 => {
                    self.reduce_chunk(shared_memory, rounds, op, &chunk, chunk.range.clone(), false);
                    chunk.range.len() * element
                }
                Operation::AllReduce(op) => self.reduce_share(shared_memory, rounds, op, None, &chunk)?,
                Operation::Reduce { op, root } => self.reduce_share(shared_memory, rounds, op, Some(root), &chunk)?,
                operation => unreachable!("{operation:?} is not done in place"),
            };
        }
        Ok(moved as u64)
    }

    /// Reduces a part of all contributions, of which the others' are in their slots. The result overwrites this rank's,
    /// and its slot if it is to be published.
    fn reduce_chunk(
        &self,
        shared_memory: &SharedMemory,
        rounds: &Rounds,
        op: ReduceOp,
        chunk: &Chunk<'_>,
        part: Range<usize>,
        published: bool,
    ) {
        let Some(dtype) = self.call.dtype else { return };
        let rank = self.group.rank;
        for (run, offset) in chunk.runs(part) {
            // SAFETY: within the slots.
            let slot = |other: usize| unsafe { shared_memory.slot(other, rounds).add(offset) };
            let contribution = |other: usize| if other == rank { run.data } else { slot(other) };
            let sources: Vec<Contribution> = (0..self.group.size())
                .map(|other| Contribution { data: contribution(other), factor: self.factor(other) })
                .collect();
            // SAFETY: all are as long as this segment. The output is this rank's own contribution; nobody reads this
            // part of its slot before it is published.
            unsafe {
                fold(dtype, op, &sources, &[run.data], run.bytes / chunk.element);
                if published {
                    copy_out(run.data, slot(rank), run.bytes);
                }
            }
        }
    }

    /// Each rank reduces its share and publishes it; the ranks that get the result read the shares. Returns the bytes
    /// moved.
    fn reduce_share(
        &self,
        shared_memory: &SharedMemory,
        rounds: &mut Rounds,
        op: ReduceOp,
        root: Option<usize>,
        chunk: &Chunk<'_>,
    ) -> Result<usize, Error> {
        let (size, rank) = (self.group.size(), self.group.rank);
        let own = chunk.share(size, rank);
        self.reduce_chunk(shared_memory, rounds, op, chunk, own.clone(), true);
        shared_memory.publish(rounds);
        if root.is_none_or(|root| root == rank) {
            self.wait_published(shared_memory, rounds)?;
            for other in self.others() {
                chunk.read(shared_memory, rounds, other, chunk.share(size, other));
            }
        }
        let readers = root.map_or(size - 1, |root| usize::from(root != rank));
        Ok(own.len() * chunk.element * (size - 1 + readers))
    }

    pub(super) fn reduce_scatter_in_shared_memory(
        &self,
        shared_memory: &SharedMemory,
        rounds: &Rounds,
        op: ReduceOp,
        input: BufferRef<'_>,
        output: &mut dyn OutputAllocator,
    ) -> Result<u64, Error> {
        let Call { dtype: Some(dtype), shape, .. } = *self.call else { return Ok(0) };
        let (size, rank) = (self.group.size(), self.group.rank);
        let rows = part(shape.rows(), size, rank);
        let (start, elements) = (rows.start * shape.width() * dtype.size(), rows.len() * shape.width());
        let (mut allocated, mut scratch) = (output.allocate(&shape.with_rows(rows.len()), dtype), Vec::new());
        let bytes = elements * dtype.size();
        let Some(target) = destination(&mut allocated, &mut scratch, bytes) else {
            return Err(self.fail_out_of_memory(bytes));
        };
        let sources: Vec<Contribution> = (0..size)
            .map(|other| {
                let all = if other == rank { input.as_ptr() } else { shared_memory.slot(other, rounds) };
                // SAFETY: all inputs are of one length, and no longer than a slot.
                Contribution { data: unsafe { all.add(start) }, factor: self.factor(other) }
            })
            .collect();
        // SAFETY: all are as long as this rank's share; the output is new.
        unsafe { fold(dtype, op, &sources, &[target], elements) };
        self.check_bools(dtype, &[Segment { data: target, bytes }])?;
        allocated.map(|_| (bytes * (size - 1)) as u64)
    }
}
