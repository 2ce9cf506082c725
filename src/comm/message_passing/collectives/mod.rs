//! Moves the data of a committed collective.
//!
//! Everything is made of messages from each rank to each other:
//!
//! - *all-gather, gather, scatter, all-to-all*: a rank receives its result straight from the owners;
//! - *reduce-scatter*: every rank receives its part of all contributions and reduces them in rank order;
//! - *all-reduce, reduce*: a reduce-scatter, then the results go to all, or to the root. `2 (n - 1) / n` of the bytes
//!   come to each rank, the lower bound, and the sums are bit for bit those of [`local`](crate::comm::local);
//! - *broadcast*: small ones go from the root to all; larger ones in parts, which the ranks then exchange.
//!
//! Reductions go in windows that stay in the cache: while one is reduced the next one is received. Short data goes
//! through shared memory instead, if the group has some, see `shared_memory.rs`.
//!
//! A rank turns back only when a rank of the group is lost, or data does not arrive for longer than the time-out: its
//! buffers then hold whatever has arrived so far. A transport that cannot reclaim the buffers ends the process instead.

mod data_movement;
mod receive_counts;
mod reduce;
mod shared_memory;

use std::cell::RefCell;
use std::ops::Range;
use std::time::Duration;

use burn::tensor::DType;

pub(super) use self::shared_memory::{all_fit, write_slot};
use super::endpoint::Request;
use super::group::{Group, MessageKind};
use super::shared_memory::{Rounds, SharedMemory};
use super::wait::Wait;
use super::world::{Proposal, World};
use crate::Error;
use crate::comm::transport::{BufferMut, BufferRef};
use crate::comm::{Call, CallLog, Operation, OutputAllocator, ReduceOp, host_buffer};

/// How long a rank waits for data once the world has failed: the others may be about to finish.
const DATA_GRACE: Duration = Duration::from_secs(2);
/// Where a rank receives more bytes than this, all check first that every rank has the memory: compared with the data
/// that takes next to no time.
const LARGE: usize = 16 << 20;
/// The same where a rank that has begun to receive cannot turn back.
const LARGE_UNRECLAIMABLE: usize = 64 << 10;

/// Gives a number to all ranks of a group, and returns theirs.
type NumberExchange<'a> = &'a mut dyn FnMut(u64) -> Result<Vec<u64>, Error>;

/// A committed collective on one rank.
pub(super) struct CollectiveRun<'a> {
    pub world: &'a World,
    pub group: &'a Group,
    pub call: &'a Call,
    /// What all ranks called.
    pub calls: &'a [Call],
    /// Memory for received contributions, kept from one collective to the next.
    pub scratch: RefCell<Vec<u64>>,
}

/// A segment of memory.
#[derive(Clone, Copy)]
struct Segment {
    data: *mut u8,
    bytes: usize,
}

/// Pending sends and receives of buffers that belong to the caller. Dropping this reclaims the buffers.
struct PendingTransfers<'a> {
    world: &'a World,
    requests: Vec<Request>,
    /// The other side of each request, by its number: the last entry counts.
    remotes: Vec<(u64, Remote)>,
}

/// The other side of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Remote {
    /// This rank of the group sends it.
    From(usize),
    /// This rank of the group receives it.
    To(usize),
}

impl<'a> PendingTransfers<'a> {
    fn new(world: &'a World) -> Self {
        Self { world, requests: Vec::new(), remotes: Vec::new() }
    }

    /// Records the other side of the requests since `first`.
    fn note(&mut self, first: usize, remote: Remote) {
        self.remotes.extend(self.requests.iter().skip(first).map(|request| (request.0, remote)));
    }

    /// What has not been received or not been sent, in words.
    fn missing(&self) -> String {
        let remote = |request: &Request| {
            self.remotes.iter().rfind(|(number, _)| *number == request.0).map(|(_, remote)| *remote)
        };
        let mut remotes: Vec<Remote> = self.requests.iter().filter_map(remote).collect();
        remotes.sort_unstable();
        remotes.dedup();
        let ranks_of = |take: fn(&Remote) -> Option<usize>| -> Vec<String> {
            remotes.iter().filter_map(take).map(|rank| rank.to_string()).collect()
        };
        let from = ranks_of(|remote| if let Remote::From(rank) = remote { Some(*rank) } else { None });
        let to = ranks_of(|remote| if let Remote::To(rank) = remote { Some(*rank) } else { None });
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

impl Drop for PendingTransfers<'_> {
    fn drop(&mut self) {
        self.world.reclaim(&mut self.requests, || {
            let problem = "a collective was left while the transport held its buffers".into();
            Error::Transport { transport: self.world.endpoint.name(), problem }
        });
    }
}

impl<'a> CollectiveRun<'a> {
    fn others(&self) -> impl Iterator<Item = usize> {
        let (size, rank) = (self.group.size(), self.group.rank);
        // Every rank begins with its neighbour, so that not all talk to rank 0 first.
        (1..size).map(move |step| (rank + step) % size)
    }

    fn transfers(&self) -> PendingTransfers<'a> {
        PendingTransfers::new(self.world)
    }

    fn post_send(
        &self,
        to: usize,
        kind: MessageKind,
        segment: Segment,
        transfers: &mut PendingTransfers<'_>,
    ) -> Result<(), Error> {
        let (member, tag) = (self.group.members[to], self.group.tag(kind));
        // SAFETY: the buffers of a collective are borrowed until it is over, and it is over when all requests are done
        // or reclaimed.
        let first = transfers.requests.len();
        let begun =
            unsafe { self.world.endpoint.send(member, tag, segment.data, segment.bytes, &mut transfers.requests) };
        transfers.note(first, Remote::To(to));
        begun.map_err(|error| self.abandon(transfers, error))
    }

    fn post_receive(
        &self,
        from: usize,
        kind: MessageKind,
        segment: Segment,
        transfers: &mut PendingTransfers<'_>,
    ) -> Result<(), Error> {
        let (member, tag) = (self.group.members[from], self.group.tag(kind));
        // SAFETY: as above; no two messages go into the same segment.
        let first = transfers.requests.len();
        let begun =
            unsafe { self.world.endpoint.receive(member, tag, segment.data, segment.bytes, &mut transfers.requests) };
        transfers.note(first, Remote::From(from));
        begun.map_err(|error| self.abandon(transfers, error))
    }

    /// Reclaims the buffers. A transport that cannot do that leaves no way to go on.
    fn abandon(&self, transfers: &mut PendingTransfers<'_>, error: Error) -> Error {
        self.world.reclaim(&mut transfers.requests, || error.clone());
        error
    }

    /// Waits until all requests are done. All ranks are in this very collective, so it takes as long as the data takes.
    fn finish(&self, transfers: &mut PendingTransfers<'_>) -> Result<(), Error> {
        let mut wait = Wait::new(self.world, true);
        let mut left = transfers.requests.len();
        loop {
            match self.world.endpoint.progress(&mut transfers.requests) {
                Ok(true) => {
                    transfers.remotes.clear();
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => return Err(self.abandon(transfers, error)),
            }
            if transfers.requests.len() < left {
                left = transfers.requests.len();
                wait.restart();
            }
            let Some(waited) = wait.pause() else { continue };
            if waited > self.world.timeout {
                let timeout_error = self.timeout_error(waited, transfers.missing());
                let error = self.abandon(transfers, timeout_error);
                return Err(self.world.fail(self.proposal(error)));
            }
            if let Some(error) = self.failure_in_wait(waited).filter(|_| self.world.endpoint.info().can_reclaim) {
                return Err(self.abandon(transfers, error.clone()));
            }
        }
    }

    /// Waits until all ranks have published what this rank reads next.
    fn wait_published(&self, shared_memory: &SharedMemory, rounds: &Rounds) -> Result<(), Error> {
        let mut wait = Wait::on_shared_memory(self.world, true);
        while !shared_memory.all_published(rounds) {
            let Some(waited) = wait.pause() else { continue };
            if waited > self.world.timeout {
                let missing = "what the others publish; all ranks had come, so one is stopped or very slow".into();
                return Err(self.world.fail(self.proposal(self.timeout_error(waited, missing))));
            }
            if let Some(error) = self.failure_in_wait(waited) {
                return Err(error.clone());
            }
        }
        Ok(())
    }

    /// The failure because of which the awaited data will not arrive, if there is one.
    fn failure_in_wait(&self, waited: Duration) -> Option<&Error> {
        let lost = || self.group.members.iter().any(|member| self.world.is_lost(*member));
        self.world.failure().filter(|_| waited > self.world.phase_limit(DATA_GRACE) || lost())
    }

    fn proposal(&self, error: Error) -> Proposal {
        Proposal::new(self.group, error, None)
    }

    fn timeout_error(&self, waited: Duration, missing: String) -> Error {
        Error::Timeout {
            group: self.group.name.clone(),
            rank: self.group.rank,
            operation: self.call.to_string(),
            waited,
            missing,
            log: CallLog::new(std::iter::once(self.group.history.line(self.group.rank))),
        }
    }

    /// The share of a collective that works in place. Returns the bytes moved.
    pub fn in_place(
        &self,
        buffers: &mut [BufferMut<'_>],
        shared_memory: Option<(&SharedMemory, &mut Rounds)>,
    ) -> Result<u64, Error> {
        let (pieces, size) = segments(buffers);
        let moved = match (self.call.operation, shared_memory) {
            (_, Some((shared_memory, rounds))) => self.in_place_in_shared_memory(shared_memory, rounds, &pieces, size),
            (Operation::AllReduce(op), None) => self.all_reduce(op, &pieces, None),
            (Operation::Reduce { op, root }, None) => self.all_reduce(op, &pieces, Some(root)),
            (Operation::Broadcast { root }, None) => self.broadcast(root, &pieces, size),
            (operation, None) => unreachable!("{operation:?} is not done in place"),
        };
        let bools = self.call.dtype.map_or(Ok(()), |dtype| self.check_bools(dtype, &pieces));
        moved.and_then(|moved| bools.map(|()| moved))
    }

    /// The share of a collective from an input into an output. Returns the bytes moved. `exchange` is for
    /// [`check_memory`](Self::check_memory).
    pub fn out_of_place(
        &self,
        input: BufferRef<'_>,
        output: &mut dyn OutputAllocator,
        shared_memory: Option<(&SharedMemory, &Rounds)>,
        exchange: NumberExchange<'_>,
    ) -> Result<u64, Error> {
        match (self.call.operation, shared_memory) {
            (Operation::ReduceScatter(op), None) => self.reduce_scatter(op, input, output, exchange),
            (Operation::ReduceScatter(op), Some((shared_memory, rounds))) => {
                self.reduce_scatter_in_shared_memory(shared_memory, rounds, op, input, output)
            }
            _ => self.collect(input, output, shared_memory, exchange),
        }
    }

    /// Checks received bools: Rust and burn know two values of them. Invalid ones are made valid in any case, for the
    /// caller gets the buffers back.
    fn check_bools(&self, dtype: DType, segments: &[Segment]) -> Result<(), Error> {
        if !dtype.is_bool() {
            return Ok(());
        }
        // SAFETY: the segments are borrowed for this collective and hold elements.
        let good = |segment: &Segment| unsafe { host_buffer::normalize_bools(segment.data, segment.bytes) };
        // All of them, whatever was found in the first.
        match segments.iter().filter(|segment| !good(segment)).count() {
            0 => Ok(()),
            _ => {
                let (transport, call, group) = (self.world.endpoint.name(), self.call, &self.group.name);
                let problem = format!(
                    "a rank of group `{group}` has contributed bytes to {call} that are no bools: do all ranks run this program?"
                );
                Err(Error::Transport { transport, problem })
            }
        }
    }

    /// Makes sure that all ranks have the memory for what they receive, `most` bytes at most, where `lacks` is what
    /// this rank has none for. From some size on all say so before data moves, and the group goes on; below it the
    /// world fails.
    fn check_memory(&self, lacks: Option<usize>, most: usize, exchange: NumberExchange<'_>) -> Result<(), Error> {
        let large = if self.world.endpoint.info().can_reclaim { LARGE } else { LARGE_UNRECLAIMABLE };
        if most < large {
            return lacks.map_or(Ok(()), |bytes| Err(self.fail_out_of_memory(bytes)));
        }
        let reported = exchange(lacks.unwrap_or_default() as u64)?;
        match reported.iter().enumerate().find(|(_, bytes)| **bytes > 0) {
            Some((rank, bytes)) => Err(self.out_of_memory(rank, usize::try_from(*bytes).unwrap_or(usize::MAX))),
            None => Ok(()),
        }
    }

    /// The error of a rank that has no memory for so many bytes.
    fn out_of_memory(&self, rank: usize, bytes: usize) -> Error {
        let (largest, contributed) = receive_counts::ReceiveCounts(self.calls).largest();
        let operation = format!("{}, to which rank {largest} brings {contributed} bytes,", self.calls[rank]);
        Error::OutOfMemory { group: self.group.name.clone(), rank, operation, bytes }
    }

    /// Fails the world with that error of this rank: the others move data already.
    fn fail_out_of_memory(&self, bytes: usize) -> Error {
        self.world.fail(self.proposal(self.out_of_memory(self.group.rank, bytes)))
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

/// The segments of buffers of one dtype, and the bytes of an element.
fn segments(buffers: &[BufferMut<'_>]) -> (Vec<Segment>, usize) {
    let size = buffers.first().map_or(1, |buffer| buffer.dtype().size());
    let segment = |buffer: &BufferMut<'_>| Segment { data: buffer.data, bytes: buffer.elements() * size };
    (buffers.iter().map(segment).collect(), size)
}

/// The memory segments of a range of elements of the concatenated pieces.
fn segments_of(pieces: &[Segment], range: Range<usize>, size: usize) -> impl Iterator<Item = Segment> {
    let mut passed = 0;
    pieces.iter().filter_map(move |piece| {
        let all = passed..passed + piece.bytes;
        passed = all.end;
        let overlap = (range.start * size).clamp(all.start, all.end)..(range.end * size).clamp(all.start, all.end);
        // SAFETY: within the piece.
        let data = unsafe { piece.data.add(overlap.start - all.start) };
        (!overlap.is_empty()).then_some(Segment { data, bytes: overlap.len() })
    })
}

/// Where the result goes: into the output or, when that refuses it, into scratch memory. The others move data already,
/// and learn of this rank's error later. `None` if there is no memory.
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
        match host_buffer::zeroed(words) {
            Some(longer) => *scratch = longer,
            None => return false,
        }
    }
    true
}
