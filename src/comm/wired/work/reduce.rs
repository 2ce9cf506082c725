//! Reductions by messages: every rank folds its share of all contributions, window by window.

use std::ops::Range;

use super::{Lent, Place, Work, cut, destination, grow};
use crate::Error;
use crate::comm::reduce::{Source, fold};
use crate::comm::transport::BufferRef;
use crate::comm::wired::group::Kind;
use crate::comm::{Call, Output, ReduceOp, part};

impl Work<'_> {
    /// Folds this rank's share of all contributions, window by window. `share` says which elements are whose, `result`
    /// where those of this rank go, `folded` what happens with a window that is done.
    fn fold_windows(
        &self,
        op: ReduceOp,
        pieces: &[Place],
        share: impl Fn(usize) -> Range<usize>,
        result: impl Fn(usize) -> *mut u8,
        mut folded: impl FnMut(usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(dtype) = self.call.dtype else { return Ok(()) };
        let (size, rank, window) = (dtype.size(), self.group.rank, self.world.wire.sizes().window);
        let window_of = |share: Range<usize>, number: usize| window_of(share, number, window / size);
        let windows = self.windows(&share, size);
        let mine = share(rank);
        let room = (mine.len() * size).min(window);
        // Contributions of the others to two windows: one that is folded, one that travels.
        let words = 2 * (self.group.size() - 1) * room.div_ceil(8);
        let mut scratch = self.scratch.borrow_mut();
        if !grow(&mut scratch, words) {
            return Err(self.fails_short(8 * words));
        }
        let temporary = scratch.as_mut_ptr().cast::<u8>();
        let temporary = |window: usize, other: usize| {
            let place = (window % 2) * (self.group.size() - 1) + if other < rank { other } else { other - 1 };
            // SAFETY: there is room for so many.
            unsafe { temporary.add(place * room.next_multiple_of(8)) }
        };
        // After the places, so that these are dropped before them.
        let mut travelling = [self.lent(), self.lent()];
        let post = |window: usize, lent: &mut Lent<'_>| {
            for other in self.others() {
                for place in cut(pieces, window_of(share(other), window), size) {
                    self.give(other, Kind::Parts, place, lent)?;
                }
                let mut to = temporary(window, other);
                for place in cut(pieces, window_of(mine.clone(), window), size) {
                    self.get(other, Kind::Parts, Place { data: to, bytes: place.bytes }, lent)?;
                    // SAFETY: the window is no longer than the room.
                    to = unsafe { to.add(place.bytes) };
                }
            }
            Ok::<_, Error>(())
        };
        post(0, &mut travelling[0])?;
        for window in 0..windows {
            if window + 1 < windows {
                post(window + 1, &mut travelling[(window + 1) % 2])?;
            }
            self.finish(&mut travelling[window % 2])?;
            let range = window_of(mine.clone(), window);
            let (mut passed, start) = (0, range.start);
            for own in cut(pieces, range, size) {
                let sources: Vec<Source> = (0..self.group.size())
                    .map(|other| Source {
                        // SAFETY: the contributions to this window lie one behind the other.
                        data: if other == rank { own.data } else { unsafe { temporary(window, other).add(passed) } },
                        factor: self.factor(other),
                    })
                    .collect();
                let output = result(start + passed / size);
                // SAFETY: all are as long as this run, and the output is this rank's own or its contribution itself.
                unsafe { fold(dtype, op, &sources, &[output], own.bytes / size) };
                passed += own.bytes;
            }
            folded(window)?;
        }
        Ok(())
    }

    fn windows(&self, share: &impl Fn(usize) -> Range<usize>, size: usize) -> usize {
        let longest = (0..self.group.size()).map(|rank| share(rank).len()).max().unwrap_or(0);
        (longest * size).div_ceil(self.world.wire.sizes().window)
    }

    pub(super) fn all_reduce(&self, op: ReduceOp, pieces: &[Place], root: Option<usize>) -> Result<u64, Error> {
        let (n, rank) = (self.group.size(), self.group.rank);
        let Some(dtype) = self.call.dtype else { return Ok(0) };
        let size = dtype.size();
        let total = pieces.iter().map(|piece| piece.bytes).sum::<usize>() / size;
        if n == 1 && !matches!(op, ReduceOp::PreMulSum(_)) {
            return Ok(0);
        }
        let share = |rank: usize| part(total, n, rank);
        let own =
            |element: usize| cut(pieces, element..element + 1, size).next().map_or(std::ptr::null_mut(), |p| p.data);
        let window_elements = self.world.wire.sizes().window / size;
        let window_of = |share: Range<usize>, number: usize| window_of(share, number, window_elements);
        let mut results = self.lent();
        self.fold_windows(op, pieces, share, own, |window| {
            for other in self.others() {
                if root.is_none_or(|root| root == other) {
                    for place in cut(pieces, window_of(share(rank), window), size) {
                        self.give(other, Kind::Results, place, &mut results)?;
                    }
                }
                if root.is_none_or(|root| root == rank) {
                    for place in cut(pieces, window_of(share(other), window), size) {
                        self.get(other, Kind::Results, place, &mut results)?;
                    }
                }
            }
            Ok(())
        })?;
        self.finish(&mut results)?;
        let bytes = (share(rank).len() * size) as u64;
        let written = match root {
            None => n as u64 - 1,
            Some(root) => u64::from(root != rank),
        };
        Ok(bytes * (n as u64 - 1) + bytes * written)
    }

    pub(super) fn reduce_scatter(
        &self,
        op: ReduceOp,
        input: BufferRef<'_>,
        output: &mut dyn Output,
    ) -> Result<u64, Error> {
        let Call { dtype: Some(dtype), extent, .. } = *self.call else { return Ok(0) };
        let (n, rank, size, width) = (self.group.size(), self.group.rank, dtype.size(), extent.width());
        let share = |rank: usize| {
            let rows = part(extent.rows(), n, rank);
            rows.start * width..rows.end * width
        };
        let mine = share(rank);
        let rows = part(extent.rows(), n, rank).len();
        let (mut allocated, mut scratch) = (output.allocate(&extent.with_rows(rows), dtype), Vec::new());
        let bytes = mine.len() * size;
        let Some(place) = destination(&mut allocated, &mut scratch, bytes) else {
            return Err(self.fails_short(bytes));
        };
        // Inputs are only read: they are given to others and folded from.
        let pieces = [Place { data: input.as_ptr().cast_mut(), bytes: input.elements() * size }];
        // SAFETY: the output is as long as this rank's share.
        let result = |element: usize| unsafe { place.add((element - mine.start) * size) };
        let folded = self.fold_windows(op, &pieces, share, result, |_| Ok(()));
        let settled = self.settle(dtype, &[Place { data: place, bytes }]);
        folded.and(settled)?;
        allocated?;
        Ok((bytes * (n - 1)) as u64)
    }
}

/// The elements of a share that belong to a window.
fn window_of(share: Range<usize>, window: usize, elements: usize) -> Range<usize> {
    let start = share.end.min(share.start + window * elements);
    start..share.end.min(start + elements)
}
