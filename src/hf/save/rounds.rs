//! Who puts together which piece when, which all ranks work out alike.

use std::collections::VecDeque;

use super::pieces::{Given, Piece, given, pieces};
use super::plan::{HeldParam, SavePlan};

/// A piece that is written in a round.
#[derive(Debug)]
pub(super) struct Turn {
    /// The number of its tensor.
    pub(super) tensor: usize,
    pub(super) piece: Piece,
    pub(super) given: Vec<Given>,
}

/// The pieces of all ranks, round by round.
pub(super) struct Rounds<'a> {
    plan: &'a SavePlan,
    params: &'a [HeldParam],
    piece_bytes: usize,
    /// For each rank the tensors that it has not begun, and the pieces of the one that it has.
    tensors: Vec<VecDeque<usize>>,
    pieces: Vec<VecDeque<(usize, Piece)>>,
    /// The rank that comes first in the next round.
    first: usize,
}

impl<'a> Rounds<'a> {
    pub(super) fn new(plan: &'a SavePlan, params: &'a [HeldParam], piece_bytes: usize, ranks: usize) -> Self {
        let mut tensors = vec![VecDeque::new(); ranks];
        for (number, tensor) in plan.tensors.iter().enumerate() {
            tensors[tensor.writer].push_back(number);
        }
        Self { plan, params, piece_bytes, tensors, pieces: vec![VecDeque::new(); ranks], first: 0 }
    }

    /// The next piece of a rank.
    fn peek(&mut self, writer: usize) -> Option<&(usize, Piece)> {
        while self.pieces[writer].is_empty() {
            let number = self.tensors[writer].pop_front()?;
            let tensor = &self.plan.tensors[number];
            let most = (self.piece_bytes / tensor.dtype.size()).max(1);
            self.pieces[writer] = pieces(&tensor.dims, most).into_iter().map(|piece| (number, piece)).collect();
        }
        self.pieces[writer].front()
    }
}

/// Of each writer one piece at most. No rank sends more than one piece, or what one needs.
impl Iterator for Rounds<'_> {
    type Item = Vec<Turn>;

    fn next(&mut self) -> Option<Vec<Turn>> {
        let (ranks, first) = (self.pieces.len(), self.first);
        let mut sends = vec![0; ranks];
        let mut round = Vec::new();
        for writer in (0..ranks).map(|place| (first + place) % ranks) {
            let (plan, params) = (self.plan, self.params);
            let Some((number, piece)) = self.peek(writer) else { continue };
            let tensor = &plan.tensors[*number];
            let turn = Turn { tensor: *number, given: given(tensor, *number, piece, params), piece: piece.clone() };
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
