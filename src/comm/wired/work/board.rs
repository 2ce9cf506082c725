//! Data on the board: what is short goes through the sides of the ranks instead of in messages.
//!
//! What a rank brings it lays out before the meeting; once that has taken place, the others read it. What does not fit on a
//! side is reduced or broadcast in several rounds. Two ranks reduce in one part: each folds all of it, reading the other's
//! side. More ranks do it in two, each folding its share and showing the result, which is read by the others.

use std::ops::Range;

use super::{Place, Work, cut, destination, places};
use crate::Error;
use crate::comm::reduce::{Source, fold};
use crate::comm::transport::BufferRef;
use crate::comm::wired::board::{Board, Rounds, copy_out};
use crate::comm::{Call, Operation, Output, ReduceOp, Transfer, part};

/// Bytes up to which a tensor is reduced on the board.
const LONGEST_REDUCED: usize = 512 << 10;
/// Bytes up to which a tensor is broadcast on the board.
const LONGEST_BROADCAST: usize = 256 << 10;
/// Bytes up to which what a rank brings is laid out for all others to take as it is.
const LONGEST_LAID: usize = 64 << 10;
/// Bytes of a round, where there are several.
const ROUND: usize = 128 << 10;

fn bytes(call: &Call) -> usize {
    call.extent.elements() * call.dtype.map_or(0, |dtype| dtype.size())
}

/// Whether what one rank brings to a collective goes over the board, as far as this rank is concerned.
fn suits(board: &Board, call: &Call) -> bool {
    let most = match call.operation {
        Operation::AllReduce(_) | Operation::Reduce { .. } => LONGEST_REDUCED,
        Operation::Broadcast { .. } => LONGEST_BROADCAST,
        Operation::ReduceScatter(_) | Operation::AllToAll => board.room(),
        _ => LONGEST_LAID.min(board.room()),
    };
    bytes(call) <= most
}

/// Whether a collective goes over the board.
pub(in crate::comm::wired) fn all_suit(board: &Board, calls: &[Call]) -> bool {
    calls.iter().all(|call| suits(board, call))
}

/// A stretch of a tensor, as long as there is room for on a side.
struct Stretch<'a> {
    pieces: &'a [Place],
    /// Elements.
    range: Range<usize>,
    /// Bytes of one.
    element: usize,
}

impl Stretch<'_> {
    /// Elements of a stretch at most: all ranks get equal shares of whole ones.
    fn most(board: &Board, element: usize) -> usize {
        board.room().min(ROUND) / element / board.size() * board.size()
    }

    /// What a rank folds of it.
    fn share(&self, size: usize, rank: usize) -> Range<usize> {
        let share = part(self.range.len(), size, rank);
        self.range.start + share.start..self.range.start + share.end
    }

    /// The runs of memory of a part of it, each with its place on a side.
    fn runs(&self, part: Range<usize>) -> impl Iterator<Item = (Place, usize)> {
        let mut place = part.start.saturating_sub(self.range.start) * self.element;
        cut(self.pieces, part, self.element).map(move |run| {
            place += run.bytes;
            (run, place - run.bytes)
        })
    }

    /// Lays it out on this rank's side, but for a part that nobody else reads.
    fn lay(&self, board: &Board, rounds: &Rounds, own: Range<usize>) {
        let side = board.side(rounds.rank(), rounds);
        for part in [self.range.start..own.start, own.end..self.range.end] {
            for (run, place) in self.runs(part) {
                // SAFETY: within the side, which is this rank's to write on. The board is nobody's tensor.
                unsafe { copy_out(run.data, side.add(place), run.bytes) };
            }
        }
    }

    /// Takes a part from a rank's side. Returns its bytes.
    fn read(&self, board: &Board, rounds: &Rounds, from: usize, part: Range<usize>) -> usize {
        let side = board.side(from, rounds);
        let bytes = part.len() * self.element;
        for (run, place) in self.runs(part) {
            // SAFETY: within the side; this rank's tensor is its own.
            unsafe { run.data.copy_from_nonoverlapping(side.add(place), run.bytes) };
        }
        bytes
    }

    /// The part that need not be laid out for a collective in place, if any need be.
    fn own(&self, operation: Operation, size: usize, rank: usize) -> Option<Range<usize>> {
        match operation {
            Operation::Broadcast { root } if root != rank => None,
            Operation::AllReduce(_) if size > 2 => Some(self.share(size, rank)),
            Operation::Reduce { .. } => Some(self.share(size, rank)),
            _ => Some(self.range.start..self.range.start),
        }
    }
}

/// Lays out what this rank brings to a collective, before the others have come.
pub(in crate::comm::wired) fn lay_out(board: &Board, rounds: &Rounds, call: &Call, transfer: &Transfer<'_, '_>) {
    if !suits(board, call) {
        return;
    }
    let (size, rank) = (board.size(), rounds.rank());
    match transfer {
        Transfer::Nothing => {}
        Transfer::InPlace(buffers) => {
            let (pieces, element) = places(buffers);
            let total = elements(&pieces, element);
            let stretch = Stretch { pieces: &pieces, range: 0..total.min(Stretch::most(board, element)), element };
            if let Some(own) = stretch.own(call.operation, size, rank) {
                stretch.lay(board, rounds, own);
            }
        }
        Transfer::Through { input, .. } => {
            let (rows, width) = (part(call.extent.rows(), size, rank), call.extent.width());
            let own = match call.operation {
                Operation::Scatter { root } if root != rank => return,
                Operation::Gather { root } if root == rank => return,
                Operation::AllGather | Operation::Gather { .. } => 0..0,
                _ => rows.start * width..rows.end * width,
            };
            let (element, range) = (input.dtype().size(), 0..input.elements());
            let pieces = [Place { data: input.as_ptr().cast_mut(), bytes: range.end * element }];
            Stretch { pieces: &pieces, range, element }.lay(board, rounds, own);
        }
    }
}

fn elements(pieces: &[Place], element: usize) -> usize {
    pieces.iter().map(|piece| piece.bytes).sum::<usize>() / element
}

impl Work<'_> {
    /// The share of a collective whose results go where the contributions were.
    pub(super) fn in_place_on_board(
        &self,
        board: &Board,
        rounds: &mut Rounds,
        pieces: &[Place],
        element: usize,
    ) -> Result<u64, Error> {
        let (size, rank, operation) = (self.group.size(), self.group.rank, self.call.operation);
        let (total, most) = (elements(pieces, element), Stretch::most(board, element));
        let mut moved = 0;
        for start in (0..total).step_by(most) {
            let stretch = Stretch { pieces, range: start..total.min(start + most), element };
            if start > 0 {
                rounds.turn_over();
                if let Some(own) = stretch.own(operation, size, rank) {
                    stretch.lay(board, rounds, own);
                }
                board.show(rounds);
                self.await_all(board, rounds)?;
            }
            moved += match operation {
                Operation::Broadcast { root } if root == rank => 0,
                Operation::Broadcast { root } => stretch.read(board, rounds, root, stretch.range.clone()),
                Operation::AllReduce(op) if size == 2 => {
                    self.fold_stretch(board, rounds, op, &stretch, stretch.range.clone(), false);
                    stretch.range.len() * element
                }
                Operation::AllReduce(op) => self.fold_share(board, rounds, op, None, &stretch)?,
                Operation::Reduce { op, root } => self.fold_share(board, rounds, op, Some(root), &stretch)?,
                operation => unreachable!("{operation:?} is not done in place"),
            };
        }
        Ok(moved as u64)
    }

    /// Folds a part of all contributions, of which the others' are on their sides. The result goes where this rank's was,
    /// and on its side if it is to be shown.
    fn fold_stretch(
        &self,
        board: &Board,
        rounds: &Rounds,
        op: ReduceOp,
        stretch: &Stretch<'_>,
        part: Range<usize>,
        shown: bool,
    ) {
        let Some(dtype) = self.call.dtype else { return };
        let rank = self.group.rank;
        for (run, place) in stretch.runs(part) {
            // SAFETY: within the sides.
            let side = |other: usize| unsafe { board.side(other, rounds).add(place) };
            let contribution = |other: usize| if other == rank { run.data } else { side(other) };
            let sources: Vec<Source> = (0..self.group.size())
                .map(|other| Source { data: contribution(other), factor: self.factor(other) })
                .collect();
            // SAFETY: all are as long as this run. The output is this rank's own contribution; nobody reads this place on its side
            // before it is shown.
            unsafe {
                fold(dtype, op, &sources, &[run.data], run.bytes / stretch.element);
                if shown {
                    copy_out(run.data, side(rank), run.bytes);
                }
            }
        }
    }

    /// Each rank folds its share and shows it; those who are to have the results read them. Returns the bytes moved.
    fn fold_share(
        &self,
        board: &Board,
        rounds: &mut Rounds,
        op: ReduceOp,
        root: Option<usize>,
        stretch: &Stretch<'_>,
    ) -> Result<usize, Error> {
        let (size, rank) = (self.group.size(), self.group.rank);
        let own = stretch.share(size, rank);
        self.fold_stretch(board, rounds, op, stretch, own.clone(), true);
        board.show(rounds);
        if root.is_none_or(|root| root == rank) {
            self.await_all(board, rounds)?;
            for other in self.others() {
                stretch.read(board, rounds, other, stretch.share(size, other));
            }
        }
        let readers = root.map_or(size - 1, |root| usize::from(root != rank));
        Ok(own.len() * stretch.element * (size - 1 + readers))
    }

    pub(super) fn reduce_scatter_on_board(
        &self,
        board: &Board,
        rounds: &Rounds,
        op: ReduceOp,
        input: BufferRef<'_>,
        output: &mut dyn Output,
    ) -> Result<u64, Error> {
        let Call { dtype: Some(dtype), extent, .. } = *self.call else { return Ok(0) };
        let (size, rank) = (self.group.size(), self.group.rank);
        let rows = part(extent.rows(), size, rank);
        let (start, elements) = (rows.start * extent.width() * dtype.size(), rows.len() * extent.width());
        let (mut allocated, mut scratch) = (output.allocate(&extent.with_rows(rows.len()), dtype), Vec::new());
        let bytes = elements * dtype.size();
        let Some(place) = destination(&mut allocated, &mut scratch, bytes) else {
            return Err(self.fails_short(bytes));
        };
        let sources: Vec<Source> = (0..size)
            .map(|other| {
                let all = if other == rank { input.as_ptr() } else { board.side(other, rounds) };
                // SAFETY: all inputs are alike, and no longer than a side.
                Source { data: unsafe { all.add(start) }, factor: self.factor(other) }
            })
            .collect();
        // SAFETY: all are as long as this rank's share; the output is new.
        unsafe { fold(dtype, op, &sources, &[place], elements) };
        self.settle(dtype, &[Place { data: place, bytes }])?;
        allocated.map(|_| (bytes * (size - 1)) as u64)
    }
}
