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
//! Reductions go in windows that stay in the cache: while one is folded the next one travels.
//!
//! A rank turns back only when a rank of the group is lost, or data does not come for longer than the time-out: its buffers
//! then hold whatever has come so far. An engine that cannot give the buffers back ends the process instead.

use std::ops::Range;
use std::time::Duration;

use super::group::{Group, Kind};
use super::pace::Pace;
use super::wire::Ticket;
use super::world::{Proposal, World};
use crate::Error;
use crate::comm::reduce::{Source, fold};
use crate::comm::transport::{BufferMut, BufferRef};
use crate::comm::{Call, CallLog, Operation, Output, ReduceOp, part};

/// Bytes of a rank's share that are folded at a time.
const WINDOW: usize = 256 << 10;
/// Broadcasts up to so many bytes go from the root to everybody.
const SMALL: usize = 64 << 10;
/// How long a rank waits for data once the world has failed: the others may be about to finish.
const LAST_DATA: Duration = Duration::from_secs(2);

/// A collective at work.
pub(super) struct Work<'a> {
    pub world: &'a World,
    pub group: &'a Group,
    pub call: &'a Call,
    /// What all ranks called.
    pub calls: &'a [Call],
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
}

impl<'a> Lent<'a> {
    fn new(world: &'a World) -> Self {
        Self { world, tickets: Vec::new() }
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
        let (to, tag) = (self.group.members[to], self.group.tag(kind));
        // SAFETY: the places of a collective are lent until it is over, and it is over when all tickets are done or back.
        let begun = unsafe { self.world.wire.send(to, tag, place.data, place.bytes, &mut lent.tickets) };
        begun.map_err(|error| self.turn_back(lent, error))
    }

    fn get(&self, from: usize, kind: Kind, place: Place, lent: &mut Lent<'_>) -> Result<(), Error> {
        let (from, tag) = (self.group.members[from], self.group.tag(kind));
        // SAFETY: as above; no two messages go to the same place.
        let begun = unsafe { self.world.wire.receive(from, tag, place.data, place.bytes, &mut lent.tickets) };
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
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => return Err(self.turn_back(lent, error)),
            }
            if lent.tickets.len() < left {
                left = lent.tickets.len();
                pace.again();
            }
            let Some(waited) = pace.pause() else { continue };
            if waited > self.world.timeout {
                let error = self.turn_back(lent, self.overdue(waited));
                return Err(self.world.fail(self.proposal(error)));
            }
            if let Some(error) = self.world.fate()
                && self.world.wire.gives_back()
                && (waited > LAST_DATA || self.group.members.iter().any(|member| self.world.is_lost(*member)))
            {
                return Err(self.turn_back(lent, error.clone()));
            }
        }
    }

    fn proposal(&self, error: Error) -> Proposal {
        let (group, members) = (self.group.name.clone(), self.group.members.clone());
        Proposal { error, group, members, call: None }
    }

    fn overdue(&self, waited: Duration) -> Error {
        Error::Timeout {
            group: self.group.name.clone(),
            rank: self.group.rank,
            operation: self.call.to_string(),
            waited,
            missing: "the data of ranks that had all come: one of them has died or is cut off".into(),
            log: CallLog::new(std::iter::once(self.group.watch.line(self.group.rank))),
        }
    }

    /// The share of a collective whose results go where the contributions were. Returns the bytes moved.
    pub fn in_place(&self, buffers: &mut [BufferMut<'_>]) -> Result<u64, Error> {
        let size = buffers.first().map_or(1, |buffer| buffer.dtype().size());
        let pieces: Vec<Place> = buffers
            .iter_mut()
            .map(|buffer| Place { data: buffer.as_mut_ptr(), bytes: buffer.elements() * size })
            .collect();
        match self.call.operation {
            Operation::AllReduce(op) => self.all_reduce(op, &pieces, None),
            Operation::Reduce { op, root } => self.all_reduce(op, &pieces, Some(root)),
            Operation::Broadcast { root } => self.broadcast(root, &pieces, size),
            operation => unreachable!("{operation:?} is not done in place"),
        }
    }

    /// The share of a collective that reads an input and fills an output. Returns the bytes moved.
    pub fn through(&self, input: BufferRef<'_>, output: &mut dyn Output) -> Result<u64, Error> {
        match self.call.operation {
            Operation::ReduceScatter(op) => self.reduce_scatter(op, input, output),
            _ => self.collect(input, output),
        }
    }

    fn factor(&self, rank: usize) -> f64 {
        match self.calls[rank].operation {
            Operation::AllReduce(ReduceOp::PreMulSum(factor))
            | Operation::ReduceScatter(ReduceOp::PreMulSum(factor))
            | Operation::Reduce { op: ReduceOp::PreMulSum(factor), .. } => factor,
            _ => 1.0,
        }
    }

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
        let (size, rank) = (dtype.size(), self.group.rank);
        let windows = self.windows(&share, size);
        let mine = share(rank);
        let room = (mine.len() * size).min(WINDOW);
        // Contributions of the others to two windows: one that is folded, one that travels.
        let mut temporary = vec![0u64; (2 * (self.group.size() - 1) * room.next_multiple_of(8)) / 8];
        let temporary = temporary.as_mut_ptr().cast::<u8>();
        let temporary = |window: usize, other: usize| {
            let place = (window % 2) * (self.group.size() - 1) + if other < rank { other } else { other - 1 };
            // SAFETY: there is room for so many.
            unsafe { temporary.add(place * room.next_multiple_of(8)) }
        };
        // After the places, so that these are dropped before them.
        let mut travelling = [self.lent(), self.lent()];
        let post = |window: usize, lent: &mut Lent<'_>| {
            for other in self.others() {
                for place in cut(pieces, window_of(share(other), window, size), size) {
                    self.give(other, Kind::Parts, place, lent)?;
                }
                let mut to = temporary(window, other);
                for place in cut(pieces, window_of(mine.clone(), window, size), size) {
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
            let range = window_of(mine.clone(), window, size);
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
        (longest * size).div_ceil(WINDOW)
    }

    fn all_reduce(&self, op: ReduceOp, pieces: &[Place], root: Option<usize>) -> Result<u64, Error> {
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
        let mut results = self.lent();
        self.fold_windows(op, pieces, share, own, |window| {
            for other in self.others() {
                if root.is_none_or(|root| root == other) {
                    for place in cut(pieces, window_of(share(rank), window, size), size) {
                        self.give(other, Kind::Results, place, &mut results)?;
                    }
                }
                if root.is_none_or(|root| root == rank) {
                    for place in cut(pieces, window_of(share(other), window, size), size) {
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

    fn reduce_scatter(&self, op: ReduceOp, input: BufferRef<'_>, output: &mut dyn Output) -> Result<u64, Error> {
        let Call { dtype: Some(dtype), extent, .. } = *self.call else { return Ok(0) };
        let (n, rank, size, width) = (self.group.size(), self.group.rank, dtype.size(), extent.width());
        let share = |rank: usize| {
            let rows = part(extent.rows(), n, rank);
            rows.start * width..rows.end * width
        };
        let mine = share(rank);
        let rows = part(extent.rows(), n, rank).len();
        let (mut allocated, mut scratch) = (output.allocate(&extent.with_rows(rows), dtype), Vec::new());
        let place = destination(&mut allocated, &mut scratch, mine.len() * size);
        // Inputs are only read: they are given to others and folded from.
        let pieces = [Place { data: input.as_ptr().cast_mut(), bytes: input.elements() * size }];
        // SAFETY: the output is as long as this rank's share.
        let result = |element: usize| unsafe { place.add((element - mine.start) * size) };
        self.fold_windows(op, &pieces, share, result, |_| Ok(()))?;
        allocated?;
        Ok((mine.len() * size * (n - 1)) as u64)
    }

    fn broadcast(&self, root: usize, pieces: &[Place], size: usize) -> Result<u64, Error> {
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
        if n == 2 || bytes <= SMALL {
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

    /// Gathers some rows of every rank's input, in rank order, in the output.
    fn collect(&self, input: BufferRef<'_>, output: &mut dyn Output) -> Result<u64, Error> {
        let (n, rank) = (self.group.size(), self.group.rank);
        let rows = |from: usize, to: usize| {
            let rows = self.calls[from].extent.rows();
            match self.call.operation {
                Operation::AllGather => 0..rows,
                Operation::Gather { root } if root == to => 0..rows,
                Operation::Scatter { root } if root == from => part(rows, n, to),
                Operation::AllToAll => part(rows, n, to),
                _ => 0..0,
            }
        };
        let source = match self.call.operation {
            Operation::Scatter { root } => root,
            _ => rank,
        };
        let Call { dtype: Some(dtype), extent, .. } = self.calls[source] else { return Ok(0) };
        let row = extent.width() * dtype.size();
        let mut scratch = Vec::new();
        let mut allocated = Ok(None);
        // After the places, so that it is dropped before them.
        let mut lent = self.lent();
        let given = |to: usize| {
            let rows = rows(rank, to);
            // SAFETY: the rows lie within the input.
            Place { data: unsafe { input.as_ptr().add(rows.start * row).cast_mut() }, bytes: rows.len() * row }
        };
        for other in self.others() {
            self.give(other, Kind::Parts, given(other), &mut lent)?;
        }
        let total: usize = (0..n).map(|from| rows(from, rank).len()).sum();
        let takes = !matches!(self.call.operation, Operation::Gather { root } if root != rank);
        let mut moved = 0;
        if takes {
            allocated = output.allocate(&extent.with_rows(total), dtype).map(Some);
            let mut place = match &mut allocated {
                Ok(Some(buffer)) => buffer.as_mut_ptr(),
                _ => destination(&mut Err(Error::User(String::new())), &mut scratch, total * row),
            };
            for from in 0..n {
                let bytes = rows(from, rank).len() * row;
                if from == rank {
                    // SAFETY: as long as that, and not the same memory.
                    unsafe { given(rank).data.cast_const().copy_to_nonoverlapping(place, bytes) };
                } else {
                    self.get(from, Kind::Parts, Place { data: place, bytes }, &mut lent)?;
                    moved += bytes as u64;
                }
                // SAFETY: the output has room for all.
                place = unsafe { place.add(bytes) };
            }
        }
        self.finish(&mut lent)?;
        drop(lent);
        allocated.map(|_| moved)
    }
}

/// Where what comes goes: into the output, or, when there is none to be had, where nobody sees it. The others are at work
/// already, and this rank's error is for them to hear of later.
fn destination(allocated: &mut Result<BufferMut<'_>, Error>, scratch: &mut Vec<u64>, bytes: usize) -> *mut u8 {
    match allocated {
        Ok(buffer) => buffer.as_mut_ptr(),
        Err(_) => {
            scratch.resize(bytes.div_ceil(8), 0);
            scratch.as_mut_ptr().cast()
        }
    }
}

/// The elements of a share that belong to a window.
fn window_of(share: Range<usize>, window: usize, size: usize) -> Range<usize> {
    let elements = WINDOW / size;
    let start = share.end.min(share.start + window * elements);
    start..share.end.min(start + elements)
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
