//! Reduces by messages: every rank reduces its share of all contributions, window by window.

use std::ops::Range;

use super::{CollectiveRun, NumberExchange, PendingTransfers, Segment, destination, grow, segments_of};
use crate::Error;
use crate::comm::message_passing::group::MessageKind;
use crate::comm::reduce::{Contribution, fold};
use crate::comm::transport::BufferRef;
use crate::comm::{Call, OutputAllocator, ReduceOp, part};

impl CollectiveRun<'_> {
    /// Reduces this rank's share of all contributions, window by window. `share` gives the elements of each rank,
    /// `result` the address of this rank's results, and `folded` is called for each reduced window.
    fn reduce_windows(
        &self,
        op: ReduceOp,
        pieces: &[Segment],
        share: impl Fn(usize) -> Range<usize>,
        result: impl Fn(usize) -> *mut u8,
        mut folded: impl FnMut(usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(dtype) = self.call.dtype else { return Ok(()) };
        let (size, rank, window) = (dtype.size(), self.group.rank, self.world.endpoint.info().thresholds.window);
        let window_of = |share: Range<usize>, number: usize| window_of(share, number, window / size);
        let windows = self.windows(&share, size);
        let mine = share(rank);
        let bytes = (mine.len() * size).min(window);
        // Contributions of the others to two windows: one is reduced while the other is received.
        let words = 2 * (self.group.size() - 1) * bytes.div_ceil(8);
        let mut scratch = self.scratch.borrow_mut();
        if !grow(&mut scratch, words) {
            return Err(self.fail_out_of_memory(8 * words));
        }
        let temporary = scratch.as_mut_ptr().cast::<u8>();
        let temporary = |window: usize, other: usize| {
            let number = (window % 2) * (self.group.size() - 1) + if other < rank { other } else { other - 1 };
            // SAFETY: there is memory for so many.
            unsafe { temporary.add(number * bytes.next_multiple_of(8)) }
        };
        // Declared after the buffers, so that these requests are dropped before them.
        let mut travelling = [self.transfers(), self.transfers()];
        let start = |window: usize, transfers: &mut PendingTransfers<'_>| {
            for other in self.others() {
                for segment in segments_of(pieces, window_of(share(other), window), size) {
                    self.post_send(other, MessageKind::Contributions, segment, transfers)?;
                }
                let mut to = temporary(window, other);
                for segment in segments_of(pieces, window_of(mine.clone(), window), size) {
                    self.post_receive(
                        other,
                        MessageKind::Contributions,
                        Segment { data: to, bytes: segment.bytes },
                        transfers,
                    )?;
                    // SAFETY: the window is no longer than its buffer.
                    to = unsafe { to.add(segment.bytes) };
                }
            }
            Ok::<_, Error>(())
        };
        start(0, &mut travelling[0])?;
        for window in 0..windows {
            if window + 1 < windows {
                start(window + 1, &mut travelling[(window + 1) % 2])?;
            }
            self.finish(&mut travelling[window % 2])?;
            let range = window_of(mine.clone(), window);
            let (mut passed, start) = (0, range.start);
            for own in segments_of(pieces, range, size) {
                let sources: Vec<Contribution> = (0..self.group.size())
                    .map(|other| Contribution {
                        // SAFETY: the contributions to this window are contiguous.
                        data: if other == rank { own.data } else { unsafe { temporary(window, other).add(passed) } },
                        factor: self.factor(other),
                    })
                    .collect();
                let output = result(start + passed / size);
                // SAFETY: all are as long as this segment, and the output is this rank's own or its contribution
                // itself.
                unsafe { fold(dtype, op, &sources, &[output], own.bytes / size) };
                passed += own.bytes;
            }
            folded(window)?;
        }
        Ok(())
    }

    fn windows(&self, share: &impl Fn(usize) -> Range<usize>, size: usize) -> usize {
        let longest = (0..self.group.size()).map(|rank| share(rank).len()).max().unwrap_or(0);
        (longest * size).div_ceil(self.world.endpoint.info().thresholds.window)
    }

    pub(super) fn all_reduce(&self, op: ReduceOp, pieces: &[Segment], root: Option<usize>) -> Result<u64, Error> {
        let (n, rank) = (self.group.size(), self.group.rank);
        let Some(dtype) = self.call.dtype else { return Ok(0) };
        let size = dtype.size();
        let total = pieces.iter().map(|piece| piece.bytes).sum::<usize>() / size;
        if n == 1 && !matches!(op, ReduceOp::PreMulSum(_)) {
            return Ok(0);
        }
        let share = |rank: usize| part(total, n, rank);
        let own = |element: usize| {
            segments_of(pieces, element..element + 1, size).next().map_or(std::ptr::null_mut(), |p| p.data)
        };
        let window_elements = self.world.endpoint.info().thresholds.window / size;
        let window_of = |share: Range<usize>, number: usize| window_of(share, number, window_elements);
        let mut results = self.transfers();
        self.reduce_windows(op, pieces, share, own, |window| {
            for other in self.others() {
                if root.is_none_or(|root| root == other) {
                    for segment in segments_of(pieces, window_of(share(rank), window), size) {
                        self.post_send(other, MessageKind::Results, segment, &mut results)?;
                    }
                }
                if root.is_none_or(|root| root == rank) {
                    for segment in segments_of(pieces, window_of(share(other), window), size) {
                        self.post_receive(other, MessageKind::Results, segment, &mut results)?;
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
        output: &mut dyn OutputAllocator,
        exchange: NumberExchange<'_>,
    ) -> Result<u64, Error> {
        let Call { dtype: Some(dtype), shape, .. } = *self.call else { return Ok(0) };
        let (n, rank, size, width) = (self.group.size(), self.group.rank, dtype.size(), shape.width());
        let share = |rank: usize| {
            let rows = part(shape.rows(), n, rank);
            rows.start * width..rows.end * width
        };
        let mine = share(rank);
        let rows = part(shape.rows(), n, rank).len();
        let (mut allocated, mut scratch) = (output.allocate(&shape.with_rows(rows), dtype), Vec::new());
        let bytes = mine.len() * size;
        let target = destination(&mut allocated, &mut scratch, bytes);
        // The first ranks have the largest shares.
        self.check_memory(target.is_none().then_some(bytes), share(0).len() * size, exchange)?;
        let Some(target) = target else { return Err(self.out_of_memory(rank, bytes)) };
        // Inputs are only read: they are sent to others and reduced from.
        let pieces = [Segment { data: input.as_ptr().cast_mut(), bytes: input.elements() * size }];
        // SAFETY: the output is as long as this rank's share.
        let result = |element: usize| unsafe { target.add((element - mine.start) * size) };
        let folded = self.reduce_windows(op, &pieces, share, result, |_| Ok(()));
        let bools = self.check_bools(dtype, &[Segment { data: target, bytes }]);
        folded.and(bools)?;
        allocated?;
        Ok((bytes * (n - 1)) as u64)
    }
}

/// The elements of a share that belong to a window.
fn window_of(share: Range<usize>, window: usize, elements: usize) -> Range<usize> {
    let start = share.end.min(share.start + window * elements);
    start..share.end.min(start + elements)
}
