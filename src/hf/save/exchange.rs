//! Pieces are put together by their writers, round by round.
//!
//! In a round a writer has one piece at most. Every rank sends what the others' pieces need of its parts, in the layout
//! and dtype of the tensor, and puts its own piece together. It sends ahead, so that no rank waits for another that has
//! more to do in a round; all meet before a round with which a rank would have sent, or been sent, more than a piece
//! since they last met: what is on its way never is more. Of the pieces that would have one rank send more than one
//! piece, the later wait for another round.
//!
//! A rank that fails, as its disk or its device may, goes on without writing, and sends zeros for what it lacks: the
//! others need not wait for it, and hear of it at the end.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::path::Path;

use super::held::HeldPart;
use super::pieces::{Piece, SentBlock};
use super::plan::{HeldParam, PlannedTensor, SavePlan};
use super::problem::{attempt, wrong};
use super::rounds::{ScheduledPiece, WriteRounds};
use super::traffic::Traffic;
use crate::Error;
use crate::comm::Communicator;
use crate::hf::relation::{Block, swapped};
use crate::tensor_file::{Loop, PieceWriter, Side, copy_strided, fault, row_major};

/// The messages of a save; its group has no others.
const TAG: u64 = 0;

/// So many rounds may be sent and not yet written: what is known of them takes memory too.
const AHEAD: usize = 64;

/// What this rank did.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Exchanged {
    pub(super) written: u64,
    pub(super) sent: u64,
    /// The most that this rank held at once beside its parts.
    pub(super) held: usize,
}

/// Writes this rank's tensors into the files under `dir`, which are there. The outer error is that of the world, the
/// inner one that of this rank's disk or device.
pub(super) fn exchange(
    plan: &SavePlan,
    params: &[HeldParam],
    own: &BTreeMap<usize, HeldPart>,
    dir: &Path,
    (piece_bytes, group): (usize, &Communicator),
) -> Result<(Exchanged, Result<(), Error>), Error> {
    let mut files = Files { plan, dir, open: BTreeMap::new(), outcome: Ok(()) };
    let (mut done, mut buffers) = (Exchanged::default(), Buffers::default());
    let mut rounds = WriteRounds::new(plan, params, piece_bytes, group.size());
    let (mut sent, mut next) = (VecDeque::new(), rounds.next());
    let mut on_the_way = Traffic::none(group.size());
    loop {
        while let Some(round) = next.take() {
            let more = Traffic::of_round(&round, plan, group.size());
            if sent.len() == AHEAD || !on_the_way.has_room_for(&more, piece_bytes) {
                if !sent.is_empty() {
                    next = Some(round);
                    break;
                }
                group.barrier()?;
                on_the_way = Traffic::none(group.size());
            }
            on_the_way.add(&more);
            done.sent += send(plan, &round, own, (&mut buffers, &mut files.outcome, group))?;
            sent.push_back(round);
            next = rounds.next();
        }
        let Some(round) = sent.pop_front() else { break };
        let mut held = on_the_way.held_by(group.rank());
        if let Some(turn) = round.iter().find(|turn| turn.writer == group.rank()) {
            let tensor = &plan.tensors[turn.tensor];
            put_together(tensor, turn, own, (&mut buffers, &mut files.outcome, group))?;
            held += buffers.piece.len();
            done.written += buffers.piece.len() as u64;
            files.write(tensor, &turn.piece, &buffers.piece);
        }
        done.held = done.held.max(held);
        fault::point("half written");
    }
    Ok((done, files.finish(group.rank())))
}

/// Sends what the pieces of other ranks need of this rank's parts, or zeros, once one of them fails. Returns how many
/// bytes that is.
fn send(
    plan: &SavePlan,
    round: &[ScheduledPiece],
    own: &BTreeMap<usize, HeldPart>,
    (buffers, outcome, group): (&mut Buffers, &mut Result<(), Error>, &Communicator),
) -> Result<u64, Error> {
    let mut sent = 0;
    for turn in round.iter().filter(|turn| turn.writer != group.rank()) {
        let mine: Vec<&SentBlock> = turn.given.iter().filter(|given| given.from == group.rank()).collect();
        if !mine.is_empty() {
            let (tensor, mut message) = (&plan.tensors[turn.tensor], buffers.spare());
            let elements: usize = mine.iter().map(|given| given.block.elements()).sum();
            message.resize(elements * tensor.dtype.size(), 0);
            remember(outcome, || pack(tensor, &mine, own, &mut message));
            sent += message.len() as u64;
            group.send(message, turn.writer, TAG)?;
        }
    }
    Ok(sent)
}

/// Does something, unless this rank has failed before; keeps its error.
fn remember(outcome: &mut Result<(), Error>, run: impl FnOnce() -> Result<(), Error>) {
    if outcome.is_ok() {
        *outcome = attempt(run);
    }
}

/// Memory that is used again: a large allocation costs as much as what is done with it.
#[derive(Default)]
struct Buffers {
    piece: Vec<u8>,
    /// Messages that have come, to be sent on with other contents.
    spare: Vec<Vec<u8>>,
}

impl Buffers {
    fn spare(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// Keeps one for the next round.
    fn give_back(&mut self, message: Vec<u8>) {
        if self.spare.is_empty() {
            self.spare.push(message);
        }
    }
}

/// What this rank gives to another's piece, block by block.
fn pack(
    tensor: &PlannedTensor,
    mine: &[&SentBlock],
    own: &BTreeMap<usize, HeldPart>,
    message: &mut [u8],
) -> Result<(), Error> {
    let mut start = 0;
    for given in mine {
        let block = &given.block;
        copy_part(tensor, given, own, message, start, &row_major(&block.lens))?;
        start += block.elements();
    }
    Ok(())
}

/// Puts a piece of this rank's together in the buffers. All messages for it are taken, also when this rank has failed.
fn put_together(
    tensor: &PlannedTensor,
    ScheduledPiece { piece, given, .. }: &ScheduledPiece,
    own: &BTreeMap<usize, HeldPart>,
    (buffers, outcome, group): (&mut Buffers, &mut Result<(), Error>, &Communicator),
) -> Result<(), Error> {
    let strides = row_major(&piece.lens());
    // The blocks of a piece are all of it.
    buffers.piece.resize(piece.elements() * tensor.dtype.size(), 0);
    let place = |block: &Block| -> usize {
        let starts = block.in_file.iter().zip(&piece.ranges).zip(&strides);
        starts.map(|((line, range), stride)| (line.start - range.start) * *stride as usize).sum()
    };
    let to_strides = |block: &Block| -> Vec<isize> {
        block.in_file.iter().zip(&strides).map(|(line, stride)| line.step as isize * stride).collect()
    };
    for from in 0..group.size() {
        let theirs: Vec<&SentBlock> = given.iter().filter(|given| given.from == from).collect();
        if theirs.is_empty() {
            continue;
        }
        if from == group.rank() {
            remember(outcome, || {
                theirs.into_iter().try_for_each(|given| {
                    let (place, strides) = (place(&given.block), to_strides(&given.block));
                    copy_part(tensor, given, own, &mut buffers.piece, place, &strides)
                })
            });
            continue;
        }
        let message: Vec<u8> = group.recv(from, TAG)?;
        remember(outcome, || {
            let mut start = 0;
            for given in theirs {
                let block = &given.block;
                let sides = row_major(&block.lens).into_iter().zip(to_strides(block));
                let loops: Vec<Loop> =
                    block.lens.iter().zip(sides).map(|(len, (from, to))| Loop { len: *len, from, to }).collect();
                let side = |start| Side { start, dtype: tensor.dtype };
                copy_strided((&message, side(start)), (&mut buffers.piece, side(place(block))), &loops)?;
                start += block.elements();
            }
            Ok(())
        });
        buffers.give_back(message);
    }
    Ok(())
}

/// Copies a block out of this rank's part of a parameter.
fn copy_part(
    tensor: &PlannedTensor,
    given: &SentBlock,
    own: &BTreeMap<usize, HeldPart>,
    to: &mut [u8],
    start: usize,
    strides: &[isize],
) -> Result<(), Error> {
    let Some(part) = own.get(&given.param) else {
        return Err(wrong(format!("a part of `{}` is missing on the rank that is to give it", tensor.name)));
    };
    let (block, transposed) = (&given.block, tensor.relation.transposed);
    let lines = swapped(&block.in_model, transposed);
    let lens = swapped(&block.lens, transposed);
    // Of a device no more than the block comes to the host.
    let mut value = part.value.clone();
    let spans: Vec<Range<usize>> =
        lines.iter().zip(&lens).map(|(line, len)| line.start..line.start + (len - 1) * line.step + 1).collect();
    for (dim, span) in spans.iter().enumerate() {
        let first = part.ranges[dim].start;
        let range = span.start - first..span.end - first;
        if range != (0..value.shape()[dim]) {
            value = value.narrow(dim, range);
        }
    }
    if let (Some(adapter), [rows, columns]) = (&part.adapter, spans.as_slice()) {
        value = adapter.added(value, rows.clone(), columns.clone())?;
    }
    let value = value.into_flex()?;
    let layout = value.layout();
    let from: Vec<isize> =
        layout.strides().iter().zip(&lines).map(|(stride, line)| stride * line.step as isize).collect();
    let sides = swapped(&from, transposed).into_iter().zip(strides);
    let loops: Vec<Loop> =
        block.lens.iter().zip(sides).map(|(len, (from, to))| Loop { len: *len, from, to: *to }).collect();
    let at = Side { start: layout.start_offset(), dtype: value.dtype() };
    copy_strided((value.bytes(), at), (to, Side { start, dtype: tensor.dtype }), &loops)
}

/// The files that this rank writes to, opened when they are first needed.
struct Files<'a> {
    plan: &'a SavePlan,
    dir: &'a Path,
    open: BTreeMap<usize, PieceWriter>,
    outcome: Result<(), Error>,
}

impl Files<'_> {
    /// Remembers the first error, after which nothing is written any more.
    fn write(&mut self, tensor: &PlannedTensor, piece: &Piece, bytes: &[u8]) {
        if self.outcome.is_ok() {
            self.outcome = self.try_write(tensor, piece, bytes);
        }
    }

    fn try_write(&mut self, tensor: &PlannedTensor, piece: &Piece, bytes: &[u8]) -> Result<(), Error> {
        let writer = match self.open.entry(tensor.file) {
            std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::btree_map::Entry::Vacant(none) => {
                let path = self.dir.join(&self.plan.files[tensor.file].0);
                none.insert(PieceWriter::open(&path)?)
            }
        };
        writer.write_at(tensor.start + (piece.first * tensor.dtype.size()) as u64, bytes)
    }

    fn finish(self, rank: usize) -> Result<(), Error> {
        // Rank 0 has made all files, and their headers are to be on the disk as well.
        let missing = (0..self.plan.files.len()).filter(|file| rank == 0 && !self.open.contains_key(file));
        let missing: Vec<usize> = missing.collect();
        self.outcome?;
        for file in missing {
            PieceWriter::open(&self.dir.join(&self.plan.files[file].0))?.sync()?;
        }
        self.open.values().try_for_each(PieceWriter::sync)
    }
}
