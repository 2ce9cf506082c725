//! Operations of a group whose results are known beforehand.

use super::RankContext;
use crate::Error;
use crate::comm::{Communicator, ReduceOp, part};

/// How many kinds of operations there are.
pub(super) const KINDS: usize = 15;

/// One operation of a group, the same on all its ranks.
#[derive(Debug, Clone, Copy)]
pub(super) struct GroupOperation {
    pub(super) kind: usize,
    pub(super) bytes: usize,
    pub(super) root: usize,
    pub(super) seed: u64,
    /// Nanoseconds that one rank computes before.
    pub(super) slow: (usize, u64),
}

/// Places after which a rank's numbers repeat themselves.
const PERIOD: usize = 256;

/// So many bytes with a period: nearly all of them are copied, since a loop over bytes is slow without optimisation.
fn periodic(len: usize, byte: impl Fn(usize) -> u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    for place in 0..len.min(PERIOD) {
        bytes.push(byte(place));
    }
    while bytes.len() < len {
        // Whole periods, until the last copy.
        bytes.extend_from_within(..bytes.len().min(len - bytes.len()));
    }
    bytes
}

fn number(place: usize) -> usize {
    place.wrapping_mul(place + 7)
}

/// What a rank adds to the [`number`] of each place.
fn offset(seed: u64, rank: usize) -> usize {
    (seed as usize).wrapping_add(rank * 101)
}

fn input(seed: u64, rank: usize, len: usize) -> Vec<u8> {
    let offset = offset(seed, rank);
    periodic(len, |place| offset.wrapping_add(number(place)) as u8)
}

fn sum(seed: u64, ranks: usize, len: usize) -> Vec<u8> {
    let offsets = (0..ranks).fold(0, |sum: usize, rank| sum.wrapping_add(offset(seed, rank)));
    periodic(len, |place| offsets.wrapping_add(ranks.wrapping_mul(number(place))) as u8)
}

#[track_caller]
fn same(found: &[u8], expected: &[u8], what: &str) -> Result<(), Error> {
    match found == expected {
        true => Ok(()),
        false => Err(Error::user(format!("{what}: wrong bytes"))),
    }
}

/// One rank's share of an operation, and whether what comes of it is right.
pub(super) fn perform(comm: &Communicator, context: &RankContext, step: &GroupOperation) -> Result<(), Error> {
    let (size, rank) = (comm.size(), comm.rank());
    let GroupOperation { kind, bytes: len, root, seed, slow } = *step;
    if slow.0 == rank {
        context.compute(slow.1);
    }
    let mine = || input(seed, rank, len);
    let all = || (0..size).map(|rank| input(seed, rank, len)).collect::<Vec<_>>().concat();
    let parts =
        || (0..size).map(|from| input(seed, from, len)[part(len, size, rank)].to_vec()).collect::<Vec<_>>().concat();
    match kind {
        0 => comm.barrier(),
        1 => same(&comm.all_reduce(mine(), ReduceOp::Sum)?, &sum(seed, size, len), "all_reduce"),
        2 => same(
            &comm.reduce_scatter(mine(), ReduceOp::Sum)?,
            &sum(seed, size, len)[part(len, size, rank)],
            "reduce_scatter",
        ),
        3 => same(&comm.broadcast(mine(), root)?, &input(seed, root, len), "broadcast"),
        4 => match comm.reduce(mine(), ReduceOp::Sum, root)? {
            Some(result) => same(&result, &sum(seed, size, len), "reduce"),
            None => Ok(()),
        },
        5 => match comm.gather(mine(), root)? {
            Some(result) => same(&result, &all(), "gather"),
            None => Ok(()),
        },
        6 => {
            let result = comm.scatter((rank == root).then(mine), root)?;
            same(&result, &input(seed, root, len)[part(len, size, rank)], "scatter")
        }
        7 => same(&comm.all_to_all(mine())?, &parts(), "all_to_all"),
        8 => {
            // Round the ring, two messages of two tags, received the other way round.
            let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
            comm.send(mine(), next, seed)?;
            comm.send(vec![rank as u64], next, !seed)?;
            if comm.recv::<Vec<u64>>(previous, !seed)? != [previous as u64] {
                return Err(Error::user("the second message: wrong"));
            }
            same(&comm.recv::<Vec<u8>>(previous, seed)?, &input(seed, previous, len), "recv")
        }
        9 => coalesced(comm, step),
        10 => {
            // Each its own length.
            let own = |rank: usize| input(seed, rank, len + rank);
            let expected = (0..size).map(own).collect::<Vec<_>>().concat();
            let mut result = vec![0; expected.len()];
            comm.all_gather_into(&own(rank), &mut result)?;
            same(&result, &expected, "all_gather_into")
        }
        11 => {
            let agreed = seed >> 2;
            same(&comm.all_gather_agreed(mine(), agreed)?, &all(), "all_gather_agreed")?;
            let own = comm.reduce_scatter_in(None, mine(), ReduceOp::Sum, agreed)?;
            same(&own, &sum(seed, size, len)[part(len, size, rank)], "reduce_scatter_in")?;
            same(&comm.all_to_all_agreed(mine(), agreed)?, &parts(), "all_to_all_agreed")
        }
        12 => wide(comm, step),
        _ => same(&comm.all_gather(mine())?, &all(), "all_gather"),
    }
}

/// Several reductions as one collective, some of nothing.
fn coalesced(comm: &Communicator, step: &GroupOperation) -> Result<(), Error> {
    let (size, rank) = (comm.size(), comm.rank());
    let lens = [step.bytes / 3, 0, step.bytes - step.bytes / 3, step.bytes % 5];
    let pieces = lens.iter().zip(step.seed..).map(|(len, seed)| input(seed, rank, *len)).collect();
    let reduced = comm.all_reduce_coalesced(pieces, ReduceOp::Sum)?;
    let mut expected = lens.iter().zip(step.seed..).map(|(len, seed)| sum(seed, size, *len));
    reduced.iter().try_for_each(|found| same(found, &expected.next().unwrap_or_default(), "all_reduce_coalesced"))
}

/// Reductions of numbers of eight bytes: what is split on its way ends in the middle of one.
fn wide(comm: &Communicator, step: &GroupOperation) -> Result<(), Error> {
    let (size, rank, len) = (comm.size(), comm.rank(), step.bytes / 8);
    let of = |rank| input(step.seed, rank, len).into_iter().map(|byte| u64::from(byte) << 50 | 1).collect::<Vec<u64>>();
    let mut expected = vec![0u64; len];
    for of in (0..size).map(of) {
        expected.iter_mut().zip(of).for_each(|(sum, number)| *sum += number);
    }
    let whole = comm.all_reduce(of(rank), ReduceOp::Sum)?;
    same(bytemuck::cast_slice(&whole), bytemuck::cast_slice(&expected), "all_reduce of u64")?;
    let own = comm.reduce_scatter(of(rank), ReduceOp::Sum)?;
    same(bytemuck::cast_slice(&own), bytemuck::cast_slice(&expected[part(len, size, rank)]), "reduce_scatter of u64")
}
