//! Data that goes to others as it is.

use std::ops::Range;

use super::{Lent, Place, Work, cut, destination};
use crate::Error;
use crate::comm::transport::BufferRef;
use crate::comm::wired::board::{Board, Rounds};
use crate::comm::wired::group::Kind;
use crate::comm::{Call, Operation, Output, part};

impl Work<'_> {
    pub(super) fn broadcast(&self, root: usize, pieces: &[Place], size: usize) -> Result<u64, Error> {
        let (n, rank) = (self.group.size(), self.group.rank);
        let bytes: usize = pieces.iter().map(|piece| piece.bytes).sum();
        let mut lent = self.lent();
        let give = |to: usize, kind: Kind, share: Range<usize>, lent: &mut Lent<'_>| {
            cut(pieces, share, size).try_for_each(|place| self.give(to, kind, place, lent))
        };
        let get = |from: usize, kind: Kind, share: Range<usize>, lent: &mut Lent<'_>| {
            cut(pieces, share, size).try_for_each(|place| self.get(from, kind, place, lent))
        };
        let all = 0..bytes / size;
        if n == 2 || bytes <= self.world.wire.sizes().broadcast {
            if rank == root {
                for other in self.others() {
                    give(other, Kind::Parts, all.clone(), &mut lent)?;
                }
            } else {
                get(root, Kind::Parts, all.clone(), &mut lent)?;
            }
        } else {
            // The root has it all: the parts are the others'.
            let share = |rank: usize| part(bytes / size, n - 1, (rank + n - root - 1) % n);
            let others = || self.others().filter(|other| *other != root);
            if rank == root {
                for other in others() {
                    give(other, Kind::Parts, share(other), &mut lent)?;
                }
            } else {
                let mut mine = self.lent();
                get(root, Kind::Parts, share(rank), &mut mine)?;
                for other in others() {
                    get(other, Kind::Results, share(other), &mut lent)?;
                }
                self.finish(&mut mine)?;
                for other in others() {
                    give(other, Kind::Results, share(rank), &mut lent)?;
                }
            }
        }
        self.finish(&mut lent)?;
        Ok(if rank == root { 0 } else { bytes as u64 })
    }

    /// Gathers some rows of every rank's input, in rank order, in the output. The inputs of the others come in messages,
    /// or are laid out on a board.
    pub(super) fn collect(
        &self,
        input: BufferRef<'_>,
        output: &mut dyn Output,
        board: Option<(&Board, &Rounds)>,
    ) -> Result<u64, Error> {
        let (n, rank) = (self.group.size(), self.group.rank);
        let rows = |from: usize, to: usize| {
            let rows = self.calls[from].extent.rows();
            match self.call.operation {
                Operation::AllGather => 0..rows,
                Operation::Gather { root } if root == to => 0..rows,
                Operation::Scatter { root } if root == from => part(rows, n, to),
                Operation::AllToAll => part(rows, n, to),
                _ => 0..0,
            }
        };
        let source = match self.call.operation {
            Operation::Scatter { root } => root,
            _ => rank,
        };
        let Call { dtype: Some(dtype), extent, .. } = self.calls[source] else { return Ok(0) };
        let row = extent.width() * dtype.size();
        let mut scratch = Vec::new();
        let mut allocated = Ok(None);
        // After the places, so that it is dropped before them.
        let mut lent = self.lent();
        let given = |to: usize| {
            let rows = rows(rank, to);
            // SAFETY: the rows lie within the input.
            Place { data: unsafe { input.as_ptr().add(rows.start * row).cast_mut() }, bytes: rows.len() * row }
        };
        for other in self.others().filter(|_| board.is_none()) {
            self.give(other, Kind::Parts, given(other), &mut lent)?;
        }
        let total: usize = (0..n).map(|from| rows(from, rank).len()).sum();
        let takes = !matches!(self.call.operation, Operation::Gather { root } if root != rank);
        let mut moved = 0;
        if takes {
            allocated = output.allocate(&extent.with_rows(total), dtype).map(Some);
            let mut place = match &mut allocated {
                Ok(Some(buffer)) => buffer.as_mut_ptr(),
                _ => destination(&mut Err(Error::User(String::new())), &mut scratch, total * row),
            };
            for from in 0..n {
                let rows = rows(from, rank);
                let bytes = rows.len() * row;
                match board {
                    // SAFETY: as long as that, and not the same memory.
                    _ if from == rank => unsafe { place.copy_from_nonoverlapping(given(rank).data, bytes) },
                    // SAFETY: the input of that rank is on its side, from the beginning.
                    Some((board, rounds)) => unsafe {
                        place.copy_from_nonoverlapping(board.side(from, rounds).add(rows.start * row), bytes);
                    },
                    None => self.get(from, Kind::Parts, Place { data: place, bytes }, &mut lent)?,
                }
                moved += if from == rank { 0 } else { bytes as u64 };
                // SAFETY: the output has room for all.
                place = unsafe { place.add(bytes) };
            }
        }
        self.finish(&mut lent)?;
        drop(lent);
        allocated.map(|_| moved)
    }
}
