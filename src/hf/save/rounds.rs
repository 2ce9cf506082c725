//! Who puts together which piece when, which all ranks work out alike.

use std::collections::VecDeque;

use super::pieces::{Piece, SentBlock, cuts, pieces, sent_blocks, sources};
use super::plan::{HeldParam, SavePlan};

/// A piece that is written in a round.
#[derive(Debug)]
pub(super) struct ScheduledPiece {
    /// The number of its tensor.
    pub(super) tensor: usize,
    pub(super) piece: Piece,
    /// The rank that puts it together.
    pub(super) writer: usize,
    pub(super) given: Vec<SentBlock>,
}

/// The pieces of all ranks, round by round.
pub(super) struct WriteRounds<'a> {
    plan: &'a SavePlan,
    params: &'a [HeldParam],
    piece_bytes: usize,
    /// For each rank the pieces that it is still to write.
    pieces: Vec<VecDeque<(usize, Piece)>>,
    /// The rank that comes first in the next round.
    first: usize,
}

impl<'a> WriteRounds<'a> {
    /// Gives each piece to the rank that holds most of it and has least to write.
    pub(super) fn new(plan: &'a SavePlan, params: &'a [HeldParam], piece_bytes: usize, ranks: usize) -> Self {
        let (mut work, mut load) = (vec![VecDeque::new(); ranks], vec![0u64; ranks]);
        for (number, tensor) in plan.tensors.iter().enumerate() {
            let most = (piece_bytes / tensor.dtype.size()).max(1);
            for piece in pieces(&tensor.dims, most, &cuts(tensor, params)) {
                let mut held = vec![0; ranks];
                for (block, _, holders) in sources(tensor, &piece, params) {
                    holders.iter().for_each(|rank| held[*rank] += block.elements());
                }
                let most = held.iter().copied().max().unwrap_or(0);
                let writer = (0..ranks).filter(|rank| held[*rank] == most).min_by_key(|rank| load[*rank]).unwrap_or(0);
                load[writer] += (piece.elements() * tensor.dtype.size()) as u64;
                work[writer].push_back((number, piece));
            }
        }
        Self { plan, params, piece_bytes, pieces: work, first: 0 }
    }
}

/// Of each writer one piece at most. No rank sends more than one piece, or what one needs.
impl Iterator for WriteRounds<'_> {
    type Item = Vec<ScheduledPiece>;

    fn next(&mut self) -> Option<Vec<ScheduledPiece>> {
        let (ranks, first) = (self.pieces.len(), self.first);
        let mut sends = vec![0; ranks];
        let mut round = Vec::new();
        for writer in (0..ranks).map(|place| (first + place) % ranks) {
            let (plan, params) = (self.plan, self.params);
            let Some((number, piece)) = self.pieces[writer].front() else { continue };
            let tensor = &plan.tensors[*number];
            let given = sent_blocks(tensor, (*number, piece, writer), params);
            let turn = ScheduledPiece { tensor: *number, piece: piece.clone(), writer, given };
            let mut more = vec![0; ranks];
            for given in turn.given.iter().filter(|given| given.from != writer) {
                more[given.from] += given.block.elements() * tensor.dtype.size();
            }
            let fits = |(sends, more): (&usize, &usize)| *sends == 0 || *more == 0 || sends + more <= self.piece_bytes;
            if sends.iter().zip(&more).all(fits) {
                sends.iter_mut().zip(more).for_each(|(sends, more)| *sends += more);
                self.pieces[writer].pop_front();
                round.push(turn);
            }
        }
        self.first = (first + 1) % ranks;
        (!round.is_empty()).then_some(round)
    }
}
