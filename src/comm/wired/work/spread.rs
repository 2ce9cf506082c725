//! Data that goes to others as it is.

use std::ops::Range;

use super::shares::Shares;
use super::{Lent, Place, Work, cut, destination};
use crate::Error;
use crate::comm::transport::BufferRef;
use crate::comm::wired::board::{Board, Rounds};
use crate::comm::wired::group::Kind;
use crate::comm::{Call, Operation, Output, part};

/// Where a rank receives more than this, all make sure beforehand that nobody lacks the memory: that takes next to no time then.
const LARGE: usize = 16 << 20;

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
    /// or are laid out on a board. `tell` tells all ranks a number, and what the others have told: the memory that each lacks.
    pub(super) fn collect(
        &self,
        input: BufferRef<'_>,
        output: &mut dyn Output,
        board: Option<(&Board, &Rounds)>,
        tell: &mut dyn FnMut(u64) -> Result<Vec<u64>, Error>,
    ) -> Result<u64, Error> {
        let (n, rank, shares) = (self.group.size(), self.group.rank, Shares(self.calls));
        // All ranks come to the same conclusion.
        let most = shares.most().map_err(|to| self.short(to, usize::MAX))?;
        let Call { dtype: Some(dtype), extent, .. } = self.calls[shares.source(rank)] else { return Ok(0) };
        let (row, total) = (shares.row(rank), shares.received(rank).unwrap_or_default());
        let takes = !matches!(self.call.operation, Operation::Gather { root } if root != rank);
        let mut scratch = Vec::new();
        let mut allocated = takes.then(|| output.allocate(&extent.with_rows(total), dtype));
        let begin = allocated.as_mut().map(|allocated| destination(allocated, &mut scratch, total * row));
        let lacks = matches!(begin, Some(None));
        if most >= LARGE && board.is_none() {
            // Nobody has begun: a rank that has no memory spoils this collective, and no more.
            let told = tell(if lacks { (total * row) as u64 } else { 0 })?;
            if let Some((to, bytes)) = told.iter().enumerate().find(|(_, bytes)| **bytes > 0) {
                return Err(self.short(to, usize::try_from(*bytes).unwrap_or(usize::MAX)));
            }
        } else if lacks {
            return Err(self.fails_short(total * row));
        }
        // After the places, so that it is dropped before them.
        let mut lent = self.lent();
        let given = |to: usize| {
            let rows = shares.rows(rank, to);
            // SAFETY: the rows lie within the input.
            Place { data: unsafe { input.as_ptr().add(rows.start * row).cast_mut() }, bytes: rows.len() * row }
        };
        for other in self.others().filter(|_| board.is_none()) {
            self.give(other, Kind::Parts, given(other), &mut lent)?;
        }
        let Some(Some(begin)) = begin else { return self.finish(&mut lent).map(|()| 0) };
        let (mut place, mut moved) = (begin, 0);
        for from in 0..n {
            let rows = shares.rows(from, rank);
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
        let finished = self.finish(&mut lent);
        drop(lent);
        let settled = self.settle(dtype, &[Place { data: begin, bytes: total * row }]);
        finished.and(settled)?;
        allocated.transpose().map(|_| moved)
    }
}
