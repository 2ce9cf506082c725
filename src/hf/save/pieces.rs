//! A tensor in pieces: which runs of its bytes are written at once, and which parts of parameters these are made of.

use std::collections::BTreeMap;
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

/// The pieces of a tensor in order, each of at most so many elements, and at least one. None goes beyond one of the
/// `cuts`, rows of dim 0 in order.
pub(super) fn pieces(dims: &[usize], most: usize, cuts: &[usize]) -> Vec<Piece> {
    let mut found = Vec::new();
    if !dims.contains(&0) {
        divide(dims, most, cuts, (&mut Vec::new(), 0), &mut found);
    }
    found
}

fn divide(
    dims: &[usize],
    most: usize,
    cuts: &[usize],
    (before, first): (&mut Vec<Range<usize>>, usize),
    found: &mut Vec<Piece>,
) {
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
            divide(dims, most, &[], (before, first + row * behind), found);
            before.pop();
        }
        return;
    }
    let mut start = 0;
    for end in cuts.iter().copied().chain([*size]) {
        while start < end {
            let next = (start + rows).min(end);
            let mut ranges = before.clone();
            ranges.push(start..next);
            ranges.extend(dims[at + 1..].iter().map(|size| 0..*size));
            found.push(Piece { ranges, first: first + start * behind });
            start = next;
        }
    }
}

/// The rows of dim 0 of a tensor between which other parts of parameters begin: what is cut there is held by fewer
/// ranks, or by one.
pub(super) fn cuts(tensor: &PlannedTensor, params: &[HeldParam]) -> Vec<usize> {
    let all: Vec<Range<usize>> = tensor.dims.iter().map(|size| 0..*size).collect();
    // Of each row the parts that begin there, and those that end.
    let mut changes: BTreeMap<usize, Vec<(bool, usize, usize)>> = BTreeMap::new();
    for block in tensor.relation.blocks.iter().filter(|block| block.file == tensor.place) {
        let param = tensor.params[block.model];
        for (number, (ranges, _)) in params[param].parts.iter().enumerate() {
            let block = block.within(&all, &swapped(ranges, tensor.relation.transposed));
            let Some((block, line)) = block.as_ref().and_then(|block| Some((block, block.in_file.first()?))) else {
                continue;
            };
            let end = line.start + (block.lens[0] - 1) * line.step + 1;
            changes.entry(line.start).or_default().push((true, param, number));
            changes.entry(end).or_default().push((false, param, number));
        }
    }
    let (mut there, mut found) = (BTreeMap::<(usize, usize), usize>::new(), Vec::new());
    for (row, changes) in changes {
        let before: Vec<(usize, usize)> = there.keys().copied().collect();
        for (_, param, number) in changes.iter().filter(|(begins, ..)| *begins) {
            *there.entry((*param, *number)).or_default() += 1;
        }
        for (_, param, number) in changes.into_iter().filter(|(begins, ..)| !*begins) {
            let left = there.get(&(param, number)).copied().unwrap_or(0).saturating_sub(1);
            match left {
                0 => drop(there.remove(&(param, number))),
                _ => drop(there.insert((param, number), left)),
            }
        }
        if row > 0 && !before.is_empty() && !there.is_empty() && !there.keys().eq(before.iter()) {
            found.push(row);
        }
    }
    found
}

/// What one rank gives to a piece: a block within one of its parts of a parameter.
#[derive(Debug, Clone)]
pub(super) struct SentBlock {
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
pub(super) fn sent_blocks(
    tensor: &PlannedTensor,
    (number, piece, writer): (usize, &Piece, usize),
    params: &[HeldParam],
) -> Vec<SentBlock> {
    let give = |(block, param, holders): (Block, usize, &[usize])| {
        let from = if holders.contains(&writer) { writer } else { holders[number % holders.len()] };
        SentBlock { from, param, block }
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
            let found = pieces(&dims, most, &[]);
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

    #[test]
    fn no_piece_goes_beyond_a_cut() {
        let rows = |most| pieces(&[10, 2], most, &[3, 8]).into_iter().map(|piece| piece.ranges[0].clone());
        assert_eq!(rows(100).collect::<Vec<_>>(), [0..3, 3..8, 8..10]);
        assert_eq!(rows(4).collect::<Vec<_>>(), [0..2, 2..3, 3..5, 5..7, 7..8, 8..10]);
        assert_eq!(rows(1).count(), 20);
    }
}
