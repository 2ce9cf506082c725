//! A tensor in pieces: which runs of its bytes are written at once, and which parts of parameters these are made of.

use std::ops::Range;

use super::plan::{HeldParam, PlannedTensor};
use crate::hf::relation::{Block, swapped};

/// A part of a tensor that is one run of bytes in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) ranges: Vec<Range<usize>>,
    /// Its first element.
    pub(super) first: usize,
}

impl Piece {
    pub(super) fn lens(&self) -> Vec<usize> {
        self.ranges.iter().map(ExactSizeIterator::len).collect()
    }

    pub(super) fn elements(&self) -> usize {
        self.lens().iter().product()
    }
}

/// The pieces of a tensor in order, each of at most so many elements, and at least one.
pub(super) fn pieces(dims: &[usize], most: usize) -> Vec<Piece> {
    let mut found = Vec::new();
    if !dims.contains(&0) {
        divide(dims, most, &mut Vec::new(), 0, &mut found);
    }
    found
}

fn divide(dims: &[usize], most: usize, before: &mut Vec<Range<usize>>, first: usize, found: &mut Vec<Piece>) {
    let at = before.len();
    let Some(size) = dims.get(at) else {
        found.push(Piece { ranges: before.clone(), first });
        return;
    };
    let behind: usize = dims[at + 1..].iter().product();
    let rows = (most / behind).min(*size);
    if rows == 0 {
        // A row is too much, and is divided itself.
        for row in 0..*size {
            before.push(row..row + 1);
            divide(dims, most, before, first + row * behind, found);
            before.pop();
        }
        return;
    }
    for start in (0..*size).step_by(rows) {
        let mut ranges = before.clone();
        ranges.push(start..(start + rows).min(*size));
        ranges.extend(dims[at + 1..].iter().map(|size| 0..*size));
        found.push(Piece { ranges, first: first + start * behind });
    }
}

/// What one rank gives to a piece: a block within one of its parts of a parameter.
#[derive(Debug, Clone)]
pub(super) struct Given {
    pub(super) from: usize,
    pub(super) param: usize,
    pub(super) block: Block,
}

/// What a piece of a tensor is made of, in an order that all ranks know: a block, the number of its parameter, and the
/// ranks that hold it.
pub(super) fn sources<'a>(
    tensor: &PlannedTensor,
    piece: &Piece,
    params: &'a [HeldParam],
) -> Vec<(Block, usize, &'a [usize])> {
    let mut sources = Vec::new();
    for block in tensor.relation.blocks.iter().filter(|block| block.file == tensor.place) {
        let param = tensor.params[block.model];
        for (ranges, holders) in &params[param].parts {
            let block = block.within(&piece.ranges, &swapped(ranges, tensor.relation.transposed));
            sources.extend(block.map(|block| (block, param, holders.as_slice())));
        }
    }
    sources
}

/// Who gives what to a piece. Of ranks that hold the same the writer gives it, or else one that depends on the tensor.
pub(super) fn given(
    tensor: &PlannedTensor,
    (number, piece, writer): (usize, &Piece, usize),
    params: &[HeldParam],
) -> Vec<Given> {
    let give = |(block, param, holders): (Block, usize, &[usize])| {
        let from = if holders.contains(&writer) { writer } else { holders[number % holders.len()] };
        Given { from, param, block }
    };
    sources(tensor, piece, params).into_iter().map(give).collect()
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn runs_of_all_elements() {
        for (dims, most, number) in [
            (vec![4, 6], 12, 2),
            (vec![4, 6], 13, 2),
            (vec![4, 6], 100, 1),
            (vec![4, 6], 5, 8),
            (vec![2, 3, 4], 4, 6),
            (vec![2, 3, 4], 1, 24),
            (vec![], 1, 1),
            (vec![7], 3, 3),
            (vec![0, usize::MAX], 3, 0),
        ] {
            let found = pieces(&dims, most);
            assert_eq!(found.len(), number, "{dims:?} {most}");
            let mut next = 0;
            for piece in found {
                assert_eq!(piece.first, next);
                assert!(piece.elements() <= most);
                next += piece.elements();
            }
            let all: usize = if dims.contains(&0) { 0 } else { dims.iter().product() };
            assert_eq!(next, all);
        }
    }
}
