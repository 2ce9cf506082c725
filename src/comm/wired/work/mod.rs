//! A rank's share of a collective that all ranks have come to.
//!
//! Everything is made of messages from each rank to each other:
//!
//! - *all-gather, gather, scatter, all-to-all*: what a rank is to have comes straight from its owner;
//! - *reduce-scatter*: every rank gets its part of all contributions and folds them in rank order;
//! - *all-reduce, reduce*: a reduce-scatter, then the results go to all, or to the root. `2 (n - 1) / n` of the bytes come
//!   to each rank, the lower bound, and the sums are bit for bit those of [`local`](crate::comm::local);
//! - *broadcast*: small ones go from the root to all; larger ones in parts, which the ranks then give each other.
//!
//! Reductions go in windows that stay in the cache: while one is folded the next one travels. What is short goes over a
//! board instead, if the group has one, see `board.rs`.
//!
//! A rank turns back only when a rank of the group is lost, or data does not come for longer than the time-out: its buffers
//! then hold whatever has come so far. An engine that cannot give the buffers back ends the process instead.

mod board;
mod reduce;
mod shares;
mod spread;

use std::cell::RefCell;
use std::ops::Range;
use std::time::Duration;

use burn::tensor::DType;

pub(super) use self::board::{all_suit, lay_out};
use super::board::{Board, Rounds};
use super::group::{Group, Kind};
use super::pace::Pace;
use super::wire::Ticket;
use super::world::{Proposal, World};
use crate::Error;
use crate::comm::transport::{BufferMut, BufferRef};
use crate::comm::{Call, CallLog, Operation, Output, ReduceOp, host};

/// How long a rank waits for data once the world has failed: the others may be about to finish.
const LAST_DATA: Duration = Duration::from_secs(2);

/// A collective at work.
pub(super) struct Work<'a> {
    pub world: &'a World,
    pub group: &'a Group,
    pub call: &'a Call,
    /// What all ranks called.
    pub calls: &'a [Call],
    /// Memory for contributions on their way, kept from one collective to the next.
    pub scratch: RefCell<Vec<u64>>,
}

/// A run of memory.
#[derive(Clone, Copy)]
struct Place {
    data: *mut u8,
    bytes: usize,
}

/// Messages from and into places that are lent to a collective. What is dropped is taken back before the places are
/// their owner's again.
struct Lent<'a> {
    world: &'a World,
    tickets: Vec<Ticket>,
    /// Whom each ticket was for, by its number: the last entry counts.
    owners: Vec<(u64, Owner)>,
}

/// The other side of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    /// It is to come from this rank of the group.
    From(usize),
    /// This rank of the group is to take it.
    To(usize),
}

impl<'a> Lent<'a> {
    fn new(world: &'a World) -> Self {
        Self { world, tickets: Vec::new(), owners: Vec::new() }
    }

    /// Notes whom the tickets since `first` are for.
    fn note(&mut self, first: usize, owner: Owner) {
        self.owners.extend(self.tickets.iter().skip(first).map(|ticket| (ticket.0, owner)));
    }

    /// What has not come or not been taken, in words.
    fn missing(&self) -> String {
        let owner =
            |ticket: &Ticket| self.owners.iter().rfind(|(number, _)| *number == ticket.0).map(|(_, owner)| *owner);
        let mut owners: Vec<Owner> = self.tickets.iter().filter_map(owner).collect();
        owners.sort_unstable();
        owners.dedup();
        let side = |take: fn(&Owner) -> Option<usize>| -> Vec<String> {
            owners.iter().filter_map(take).map(|rank| rank.to_string()).collect()
        };
        let from = side(|owner| if let Owner::From(rank) = owner { Some(*rank) } else { None });
        let to = side(|owner| if let Owner::To(rank) = owner { Some(*rank) } else { None });
        let words = |ranks: &[String], before: &str| match ranks {
            [] => None,
            [one] => Some(format!("{before} rank {one}")),
            _ => Some(format!("{before} ranks {}", ranks.join(", "))),
        };
        let both: Vec<String> =
            [words(&from, "data from"), words(&to, "data to be taken by")].into_iter().flatten().collect();
        format!("{}; all ranks had come, so one is stopped, cut off or very slow", both.join(" and "))
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.world.take_back(&mut self.tickets, || {
            let problem = "a collective was left while the engine held its buffers".into();
            Error::Engine { engine: self.world.wire.engine(), problem }
        });
    }
}

impl<'a> Work<'a> {
    fn others(&self) -> impl Iterator<Item = usize> {
        let (size, rank) = (self.group.size(), self.group.rank);
        // Every rank begins with its neighbour, so that not all talk to rank 0 first.
        (1..size).map(move |step| (rank + step) % size)
    }

    fn lent(&self) -> Lent<'a> {
        Lent::new(self.world)
    }

    fn give(&self, to: usize, kind: Kind, place: Place, lent: &mut Lent<'_>) -> Result<(), Error> {
        let (member, tag) = (self.group.members[to], self.group.tag(kind));
        // SAFETY: the places of a collective are lent until it is over, and it is over when all tickets are done or back.
        let first = lent.tickets.len();
        let begun = unsafe { self.world.wire.send(member, tag, place.data, place.bytes, &mut lent.tickets) };
        lent.note(first, Owner::To(to));
        begun.map_err(|error| self.turn_back(lent, error))
    }

    fn get(&self, from: usize, kind: Kind, place: Place, lent: &mut Lent<'_>) -> Result<(), Error> {
        let (member, tag) = (self.group.members[from], self.group.tag(kind));
        // SAFETY: as above; no two messages go to the same place.
        let first = lent.tickets.len();
        let begun = unsafe { self.world.wire.receive(member, tag, place.data, place.bytes, &mut lent.tickets) };
        lent.note(first, Owner::From(from));
        begun.map_err(|error| self.turn_back(lent, error))
    }

    /// Takes back the places. An engine that can't give them back leaves no way to go on.
    fn turn_back(&self, lent: &mut Lent<'_>, error: Error) -> Error {
        self.world.take_back(&mut lent.tickets, || error.clone());
        error
    }

    /// Waits until all tickets are done. All ranks are at this very collective, so it takes as long as the data takes.
    fn finish(&self, lent: &mut Lent<'_>) -> Result<(), Error> {
        let mut pace = Pace::new(self.world, true);
        let mut left = lent.tickets.len();
        loop {
            match self.world.wire.progress(&mut lent.tickets) {
                Ok(true) => {
                    lent.owners.clear();
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => return Err(self.turn_back(lent, error)),
            }
            if lent.tickets.len() < left {
                left = lent.tickets.len();
                pace.again();
            }
            let Some(waited) = pace.pause() else { continue };
            if waited > self.world.timeout {
                let overdue = self.overdue(waited, lent.missing());
                let error = self.turn_back(lent, overdue);
                return Err(self.world.fail(self.proposal(error)));
            }
            if let Some(error) = self.in_vain(waited).filter(|_| self.world.wire.gives_back()) {
                return Err(self.turn_back(lent, error.clone()));
            }
        }
    }

    /// Waits until all ranks have shown what this rank wants to read next.
    fn await_all(&self, board: &Board, rounds: &Rounds) -> Result<(), Error> {
        let mut pace = Pace::at_board(self.world, true);
        while !board.all_shown(rounds) {
            let Some(waited) = pace.pause() else { continue };
            if waited > self.world.timeout {
                let missing = "what the others show; all ranks had come, so one is stopped or very slow".into();
                return Err(self.world.fail(self.proposal(self.overdue(waited, missing))));
            }
            if let Some(error) = self.in_vain(waited) {
                return Err(error.clone());
            }
        }
        Ok(())
    }

    /// Why what this rank waits for will not come any more.
    fn in_vain(&self, waited: Duration) -> Option<&Error> {
        let lost = || self.group.members.iter().any(|member| self.world.is_lost(*member));
        self.world.fate().filter(|_| waited > self.world.within(LAST_DATA) || lost())
    }

    fn proposal(&self, error: Error) -> Proposal {
        let (group, members) = (self.group.name.clone(), self.group.members.clone());
        Proposal { error, group, members, call: None }
    }

    fn overdue(&self, waited: Duration, missing: String) -> Error {
        Error::Timeout {
            group: self.group.name.clone(),
            rank: self.group.rank,
            operation: self.call.to_string(),
            waited,
            missing,
            log: CallLog::new(std::iter::once(self.group.watch.line(self.group.rank))),
        }
    }

    /// The share of a collective whose results go where the contributions were. Returns the bytes moved.
    pub fn in_place(&self, buffers: &mut [BufferMut<'_>], board: Option<(&Board, &mut Rounds)>) -> Result<u64, Error> {
        let (pieces, size) = places(buffers);
        let moved = match (self.call.operation, board) {
            (_, Some((board, rounds))) => self.in_place_on_board(board, rounds, &pieces, size),
            (Operation::AllReduce(op), None) => self.all_reduce(op, &pieces, None),
            (Operation::Reduce { op, root }, None) => self.all_reduce(op, &pieces, Some(root)),
            (Operation::Broadcast { root }, None) => self.broadcast(root, &pieces, size),
            (operation, None) => unreachable!("{operation:?} is not done in place"),
        };
        let settled = self.call.dtype.map_or(Ok(()), |dtype| self.settle(dtype, &pieces));
        moved.and_then(|moved| settled.map(|()| moved))
    }

    /// The share of a collective that reads an input and fills an output. Returns the bytes moved. `tell` is as of
    /// [`collect`](Self::collect).
    pub fn through(
        &self,
        input: BufferRef<'_>,
        output: &mut dyn Output,
        board: Option<(&Board, &Rounds)>,
        tell: &mut dyn FnMut(u64) -> Result<Vec<u64>, Error>,
    ) -> Result<u64, Error> {
        match (self.call.operation, board) {
            (Operation::ReduceScatter(op), None) => self.reduce_scatter(op, input, output),
            (Operation::ReduceScatter(op), Some((board, rounds))) => {
                self.reduce_scatter_on_board(board, rounds, op, input, output)
            }
            _ => self.collect(input, output, board, tell),
        }
    }

    /// Looks at bools that came from others: Rust and burn know two of them. What is none becomes one in any case, for the
    /// places are their owner's again.
    fn settle(&self, dtype: DType, places: &[Place]) -> Result<(), Error> {
        if !dtype.is_bool() {
            return Ok(());
        }
        // SAFETY: the places are lent to this collective and hold elements.
        let good = |place: &Place| unsafe { host::settle_bools(place.data, place.bytes) };
        // All of them, whatever was found in the first.
        match places.iter().filter(|place| !good(place)).count() {
            0 => Ok(()),
            _ => {
                let (engine, call, group) = (self.world.wire.engine(), self.call, &self.group.name);
                let problem = format!(
                    "a rank of group `{group}` has brought bytes to {call} that are no bools: do all ranks run this program?"
                );
                Err(Error::Engine { engine, problem })
            }
        }
    }

    /// The error of a rank that has no memory for so many bytes.
    fn short(&self, rank: usize, bytes: usize) -> Error {
        let (largest, brought) = shares::Shares(self.calls).largest();
        let operation = format!("{}, to which rank {largest} brings {brought} bytes,", self.calls[rank]);
        Error::OutOfMemory { group: self.group.name.clone(), rank, operation, bytes }
    }

    /// The same of this rank, when the others are at work already.
    fn fails_short(&self, bytes: usize) -> Error {
        self.world.fail(self.proposal(self.short(self.group.rank, bytes)))
    }

    fn factor(&self, rank: usize) -> f64 {
        match self.calls[rank].operation {
            Operation::AllReduce(ReduceOp::PreMulSum(factor))
            | Operation::ReduceScatter(ReduceOp::PreMulSum(factor))
            | Operation::Reduce { op: ReduceOp::PreMulSum(factor), .. } => factor,
            _ => 1.0,
        }
    }
}

/// The places of buffers of one dtype, and the bytes of an element.
fn places(buffers: &[BufferMut<'_>]) -> (Vec<Place>, usize) {
    let size = buffers.first().map_or(1, |buffer| buffer.dtype().size());
    let place = |buffer: &BufferMut<'_>| Place { data: buffer.data, bytes: buffer.elements() * size };
    (buffers.iter().map(place).collect(), size)
}

/// The runs of memory of a range of elements, as if the pieces were one behind the other.
fn cut(pieces: &[Place], range: Range<usize>, size: usize) -> impl Iterator<Item = Place> {
    let mut passed = 0;
    pieces.iter().filter_map(move |piece| {
        let all = passed..passed + piece.bytes;
        passed = all.end;
        let here = (range.start * size).clamp(all.start, all.end)..(range.end * size).clamp(all.start, all.end);
        // SAFETY: within the piece.
        let data = unsafe { piece.data.add(here.start - all.start) };
        (!here.is_empty()).then_some(Place { data, bytes: here.len() })
    })
}

/// Where what comes goes: into the output or, when that does not take it, where nobody sees it. The others are at work
/// already, and this rank's error is for them to hear of later. `None` if there is no memory.
fn destination(allocated: &mut Result<BufferMut<'_>, Error>, scratch: &mut Vec<u64>, bytes: usize) -> Option<*mut u8> {
    match allocated {
        Ok(buffer) => Some(buffer.as_mut_ptr()),
        Err(Error::OutOfMemory { .. }) => None,
        Err(_) => grow(scratch, bytes.div_ceil(8)).then(|| scratch.as_mut_ptr().cast()),
    }
}

/// Makes a vector at least as long as this, if there is memory for it.
fn grow(scratch: &mut Vec<u64>, words: usize) -> bool {
    if scratch.len() < words {
        match host::zeroed(words) {
            Some(longer) => *scratch = longer,
            None => return false,
        }
    }
    true
}
