//! The ranks of one group, seen from one of them.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::backend::flex::FlexTensor;
use burn::tensor::DType;

use super::counters::CounterBoard;
use super::host::{self, SliceOutput, TensorOutput};
use super::pending::{Progress, Underway, panic_message};
use super::transport::{BufferMut, BufferRef, Transfer, Transport};
use super::{Call, CallLog, Counters, Element, Extent, Message, Operation, Payload, Pending, ReduceOp, reduce};
use crate::Error;

/// The ranks of one group, seen from one of them: what they do together.
///
/// Cheap to clone; clones are the same member of the same group. The group ends for this rank when the last clone is
/// dropped. Collectives take a [`Payload`] by value and return one; [`start`](Self::start) runs any of them in the
/// background. Operations that divide tensors divide their first dim into [parts](super::part).
///
/// # Errors
///
/// Every method may return the error with which the world has failed: [`Error::Timeout`], [`Error::Mismatch`],
/// [`Error::RankLost`], [`Error::RankPanicked`], [`Error::RankFailed`] or [`Error::Aborted`], the same on all ranks.
/// Further errors are named with the method.
#[derive(Clone)]
pub struct Communicator {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Arc<dyn Transport>,
    counters: CounterBoard,
    progress: Progress,
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Communicator({} {}/{} over {})", self.group(), self.rank(), self.size(), self.engine())
    }
}

impl Communicator {
    /// Puts a communicator on an engine of one's own.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self::with_underway(transport, Arc::default())
    }

    fn with_underway(transport: Arc<dyn Transport>, underway: Arc<Underway>) -> Self {
        let (counters, progress) = (CounterBoard::default(), Progress::new(underway));
        Self { inner: Arc::new(Inner { transport, counters, progress }) }
    }

    /// Index of this rank in the group.
    pub fn rank(&self) -> usize {
        self.inner.transport.rank()
    }

    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.inner.transport.size()
    }

    /// Name of the group, as errors and logs call it.
    pub fn group(&self) -> &Arc<str> {
        self.inner.transport.group()
    }

    /// Name of the engine: `local`, `nccl`, `mpi`, or that of a [`Transport`] of your own.
    pub fn engine(&self) -> &'static str {
        self.inner.transport.engine()
    }

    /// What this communicator has done so far.
    pub fn counters(&self) -> Counters {
        self.inner.counters.snapshot()
    }

    /// The last collectives of every rank of the group.
    pub fn log(&self) -> CallLog {
        self.inner.transport.log()
    }

    /// The error with which the world has failed, if it has.
    pub fn failure(&self) -> Option<Error> {
        self.inner.transport.failure()
    }

    /// Fails the world: every rank that waits or comes to wait returns [`Error::Aborted`] with this reason.
    pub fn abort(&self, reason: impl fmt::Display) {
        let (group, rank, log) = (self.group().clone(), self.rank(), self.log());
        self.fail(Error::Aborted { group, rank, reason: reason.to_string(), log });
    }

    /// Fails the world with an error of the crate's own.
    pub(crate) fn fail(&self, error: Error) {
        self.inner.transport.abort(error);
    }

    /// Leaves the world, with all groups of it that this rank is in, whoever still holds a communicator. What this rank
    /// has started in the background is finished before.
    pub(crate) fn leave(&self) {
        self.inner.progress.underway().wait(2 * self.inner.transport.timeout());
        self.inner.transport.leave();
    }

    /// Fails the world, and returns the error that it failed with, which may be an earlier one.
    fn fail_with(&self, error: Error) -> Error {
        self.fail(error.clone());
        self.failure().unwrap_or(error)
    }

    /// Divides the group: ranks that bring the same `color` form a group, ordered by `key`, then by rank. Collective.
    ///
    /// Errors call the new group by the name of this one and its color; see [`split_named`](Self::split_named).
    pub fn split(&self, color: u64, key: i64) -> Result<Self, Error> {
        self.split_named("", color, key)
    }

    /// [`split`](Self::split) with a name for what the groups are for, by which errors and logs call them: `world/dp0`.
    pub fn split_named(&self, name: &str, color: u64, key: i64) -> Result<Self, Error> {
        let call = Call::new(Operation::Split, None, Extent::flat(0));
        let mut half = None;
        self.run(&call, |transport| {
            half = Some(transport.split(name, color, key)?);
            Ok(0)
        })?;
        let half = half.ok_or_else(|| Error::invalid("split", "the engine returned no group"))?;
        Ok(Self::with_underway(half, self.inner.progress.underway().clone()))
    }

    /// Waits until every rank of the group has come.
    pub fn barrier(&self) -> Result<(), Error> {
        let call = Call::new(Operation::Barrier, None, Extent::flat(0));
        self.run(&call, |transport| transport.collective(&call, Transfer::Nothing))
    }

    /// Runs collectives in the background, in the order of the calls of `start`; the same order is asked of every rank.
    ///
    /// `operation` gets this communicator and runs on a thread of its own, which computes tensor operations without help.
    /// Use [`start_recv`](Self::start_recv) for messages: a receive in here would hold up what is started after it.
    ///
    /// ```
    /// # use burn_parallel::prelude::*;
    /// # launch::threads(2).run(|rank| {
    /// let pending = rank.start(|comm| comm.all_reduce(vec![1.0f32; 8], ReduceOp::Sum));
    /// // ... compute something else meanwhile ...
    /// assert_eq!(pending.wait()?, [2.0; 8]);
    /// # Ok(()) }).unwrap();
    /// ```
    pub fn start<R: Send + 'static>(
        &self,
        operation: impl FnOnce(&Communicator) -> Result<R, Error> + Send + 'static,
    ) -> Pending<R> {
        let (comm, watched) = (self.clone(), self.clone());
        let name = || format!("{} of {}", self.rank(), self.group());
        let pending = self.inner.progress.submit(self.rank(), name, move || {
            catch_unwind(AssertUnwindSafe(|| operation(&comm))).unwrap_or_else(|panic| {
                // The world hears of it now, not when somebody waits for this operation.
                let (rank, message) = (comm.inner.transport.world_rank(), panic_message(&*panic));
                Err(comm.fail_with(Error::RankPanicked { rank, message, log: comm.log() }))
            })
        });
        pending.within(2 * self.inner.transport.timeout(), move |waited| {
            watched.fail_with(Error::Timeout {
                group: watched.group().clone(),
                rank: watched.rank(),
                operation: "an operation in the background".into(),
                waited,
                missing: "its end: does it wait for another, or compute for longer than the time-out?".into(),
                log: watched.log(),
            })
        })
    }

    /// Every rank gets the reduction over all ranks, bit-identical everywhere. All bring the same shape and dtype.
    ///
    /// # Errors
    /// [`Error::UnsupportedReduction`].
    pub fn all_reduce<P: Payload>(&self, payload: P, op: ReduceOp) -> Result<P, Error> {
        let (data, home) = payload.into_host()?;
        P::from_host(self.all_reduce_host(data, op)?, &home)
    }

    /// Reduces several payloads as one collective, without copying them together: one call, one wait.
    ///
    /// # Errors
    /// [`Error::UnsupportedReduction`]; [`Error::InvalidArgument`] if their dtypes differ.
    pub fn all_reduce_coalesced<P: Payload>(&self, payloads: Vec<P>, op: ReduceOp) -> Result<Vec<P>, Error> {
        let hosts = payloads.into_iter().map(P::into_host).collect::<Result<Vec<_>, _>>()?;
        let (tensors, homes): (Vec<_>, Vec<_>) = hosts.into_iter().unzip();
        let reduced = self.all_reduce_many(tensors, op)?;
        reduced.into_iter().zip(&homes).map(|(data, home)| P::from_host(data, home)).collect()
    }

    /// [`all_reduce`](Self::all_reduce) on a slice, in place.
    pub fn all_reduce_in_place<E: Element>(&self, slice: &mut [E], op: ReduceOp) -> Result<(), Error> {
        reduce::check(op, E::DTYPE)?;
        let call = Call::new(Operation::AllReduce(op), Some(E::DTYPE), Extent::flat(slice.len()));
        self.in_place(&call, &mut [BufferMut::new(slice)])
    }

    /// Every rank gets its [part](super::part) of the first dim of the reduction over all ranks. All bring the same shape
    /// and dtype; ranks that get no row get an empty payload.
    ///
    /// # Errors
    /// [`Error::UnsupportedReduction`].
    pub fn reduce_scatter<P: Payload>(&self, payload: P, op: ReduceOp) -> Result<P, Error> {
        let (data, home) = payload.into_host()?;
        reduce::check(op, data.dtype())?;
        self.through(Operation::ReduceScatter(op), Some(data), None).and_then(|data| P::from_host(data, &home))
    }

    /// Every rank gets the payloads of all, one behind the other along the first dim in rank order. First dims may differ;
    /// the other dims and the dtype may not.
    pub fn all_gather<P: Payload>(&self, payload: P) -> Result<P, Error> {
        let (data, home) = payload.into_host()?;
        self.through(Operation::AllGather, Some(data), None).and_then(|data| P::from_host(data, &home))
    }

    /// [`all_gather`](Self::all_gather) from a slice into a slice, whose length is the sum over the ranks.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on a rank whose output has another length; the world fails with it.
    pub fn all_gather_into<E: Element>(&self, input: &[E], output: &mut [E]) -> Result<(), Error> {
        let call = Call::new(Operation::AllGather, Some(E::DTYPE), Extent::flat(input.len()));
        let (input, output) = (BufferRef::new(input), &mut SliceOutput(output));
        self.run(&call, |transport| transport.collective(&call, Transfer::Through { input, output }))
    }

    /// Every rank gets the payload of `root`. All bring the same shape and dtype; what the others bring is overwritten.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`].
    pub fn broadcast<P: Payload>(&self, payload: P, root: usize) -> Result<P, Error> {
        self.check_root(root, "broadcast")?;
        let (data, home) = payload.into_host()?;
        P::from_host(self.host_in_place(Operation::Broadcast { root }, data)?, &home)
    }

    /// [`broadcast`](Self::broadcast) on a slice, in place.
    pub fn broadcast_in_place<E: Element>(&self, slice: &mut [E], root: usize) -> Result<(), Error> {
        self.check_root(root, "broadcast")?;
        let call = Call::new(Operation::Broadcast { root }, Some(E::DTYPE), Extent::flat(slice.len()));
        self.in_place(&call, &mut [BufferMut::new(slice)])
    }

    /// `root` gets the reduction over all ranks, the others `None`. All bring the same shape and dtype.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`], [`Error::UnsupportedReduction`].
    pub fn reduce<P: Payload>(&self, payload: P, op: ReduceOp, root: usize) -> Result<Option<P>, Error> {
        self.check_root(root, "reduce")?;
        let (data, home) = payload.into_host()?;
        reduce::check(op, data.dtype())?;
        let data = self.host_in_place(Operation::Reduce { op, root }, data)?;
        (root == self.rank()).then(|| P::from_host(data, &home)).transpose()
    }

    /// `root` gets the payloads of all as in [`all_gather`](Self::all_gather), the others `None`.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`].
    pub fn gather<P: Payload>(&self, payload: P, root: usize) -> Result<Option<P>, Error> {
        self.check_root(root, "gather")?;
        let (data, home) = payload.into_host()?;
        let gathered = self.through(Operation::Gather { root }, Some(data), None)?;
        (root == self.rank()).then(|| P::from_host(gathered, &home)).transpose()
    }

    /// Every rank gets its [part](super::part) of the first dim of what `root` brings; the others bring `None`. Tensors
    /// arrive on the CPU device [`Device::flex`](burn::tensor::Device::flex) of ranks that bring none.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`]; [`Error::InvalidArgument`] if the root brings nothing, or what a receiver does not take; the
    /// world fails with it.
    pub fn scatter<P: Payload>(&self, payload: Option<P>, root: usize) -> Result<P, Error> {
        self.check_root(root, "scatter")?;
        if root == self.rank() && payload.is_none() {
            let problem = format!("rank {root} is the root and brings nothing to scatter");
            return Err(self.fail_with(Error::invalid("scatter", problem)));
        }
        let (data, home) = match payload.filter(|_| root == self.rank()).map(P::into_host).transpose()? {
            Some((data, home)) => (Some(data), home),
            None => (None, P::Home::default()),
        };
        let data = self.through(Operation::Scatter { root }, data, P::fixed_dtype())?;
        // Only here can a receiver be surprised: it brought nothing for the others to compare with.
        P::from_host(data, &home).map_err(|error| self.fail_with(error))
    }

    /// Part `j` of this rank's first dim goes to rank `j`; the rank gets its part of every rank, in rank order.
    pub fn all_to_all<P: Payload>(&self, payload: P) -> Result<P, Error> {
        let (data, home) = payload.into_host()?;
        self.through(Operation::AllToAll, Some(data), None).and_then(|data| P::from_host(data, &home))
    }

    /// Sends a payload to rank `to`. Does not wait for it to be received; within a process the memory itself moves.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`].
    pub fn send<P: Payload>(&self, payload: P, to: usize, tag: u64) -> Result<(), Error> {
        let (data, _) = payload.into_host()?;
        host::check_dtype("send", data.dtype())?;
        let bytes = data.layout().num_elements() * data.dtype().size();
        let call = Call::new(Operation::Send { to, tag }, Some(data.dtype()), host::extent(&data));
        self.count(&call, || self.inner.transport.send(to, tag, Message(data)).map(|()| bytes as u64))
    }

    /// Receives the oldest message of rank `from` that bears `tag`. Tensors arrive on the CPU device
    /// [`Device::flex`](burn::tensor::Device::flex).
    ///
    /// # Errors
    /// [`Error::NoSuchRank`]; [`Error::UnexpectedMessage`], on every rank, if the message is not a `P`.
    pub fn recv<P: Payload>(&self, from: usize, tag: u64) -> Result<P, Error> {
        let call = Call::new(Operation::Receive { from, tag }, None, Extent::flat(0));
        let mut received = None;
        self.count(&call, || {
            let Message(data) = self.inner.transport.receive(from, tag)?;
            let bytes = data.layout().num_elements() * data.dtype().size();
            received = Some(data);
            Ok(bytes as u64)
        })?;
        let data = received.ok_or_else(|| Error::invalid("recv", "the engine returned no message"))?;
        let found = format!("{:?} {:?}", data.dtype(), host::extent(&data).dims());
        P::from_host(data, &P::Home::default()).map_err(|_| {
            let (group, to, expected) = (self.group().clone(), self.rank(), std::any::type_name::<P>().to_owned());
            let error = Error::UnexpectedMessage { group, from, to, tag, expected, found, log: self.log() };
            self.fail_with(error)
        })
    }

    /// [`recv`](Self::recv) as a handle: the message travels while the rank computes, and is taken by waiting.
    pub fn start_recv<P: Payload>(&self, from: usize, tag: u64) -> Pending<P> {
        let comm = self.clone();
        Pending::deferred(move || comm.recv(from, tag))
    }

    pub(crate) fn all_reduce_host(&self, data: FlexTensor, op: ReduceOp) -> Result<FlexTensor, Error> {
        reduce::check(op, data.dtype())?;
        self.host_in_place(Operation::AllReduce(op), data)
    }

    pub(crate) fn all_reduce_many(&self, data: Vec<FlexTensor>, op: ReduceOp) -> Result<Vec<FlexTensor>, Error> {
        // A rank that brings nothing meets the others all the same: they may have brought something.
        let dtype = data.first().map(FlexTensor::dtype);
        for tensor in &data {
            let first = dtype.unwrap_or(tensor.dtype());
            if tensor.dtype() != first {
                let problem = format!("tensors of {first:?} and {:?} cannot be reduced together", tensor.dtype());
                return Err(Error::invalid("all_reduce_coalesced", problem));
            }
            reduce::check(op, first)?;
        }
        let mut data: Vec<FlexTensor> = data.into_iter().map(host::exclusive).collect();
        let lens = data.iter().map(|tensor| tensor.layout().num_elements());
        let mut call = Call::new(Operation::AllReduce(op), dtype, Extent::flat(lens.clone().sum()));
        call.pieces = data.len();
        call.cut = fingerprint(lens);
        let mut buffers: Vec<BufferMut<'_>> = data.iter_mut().map(host::lend_mut).collect();
        self.in_place(&call, &mut buffers)?;
        drop(buffers);
        Ok(data)
    }

    pub(crate) fn host_in_place(&self, operation: Operation, data: FlexTensor) -> Result<FlexTensor, Error> {
        host::check_dtype(operation.name(), data.dtype())?;
        let mut data = host::exclusive(data);
        let call = Call::new(operation, Some(data.dtype()), host::extent(&data));
        self.in_place(&call, &mut [host::lend_mut(&mut data)])?;
        Ok(data)
    }

    /// A collective from an input into a new tensor.
    pub(crate) fn through(
        &self,
        operation: Operation,
        data: Option<FlexTensor>,
        expected: Option<DType>,
    ) -> Result<FlexTensor, Error> {
        self.through_agreed(operation, data, expected, 0)
    }

    /// [`through`](Self::through) with a number that must be the same on all ranks, where the shapes do not tell.
    pub(crate) fn through_agreed(
        &self,
        operation: Operation,
        data: Option<FlexTensor>,
        expected: Option<DType>,
        agreed: u64,
    ) -> Result<FlexTensor, Error> {
        let data = data.map(host::packed);
        let dtype = data.as_ref().map(FlexTensor::dtype).or(expected);
        if let Some(dtype) = dtype {
            host::check_dtype(operation.name(), dtype)?;
        }
        let mut call = Call::new(operation, dtype, data.as_ref().map_or(Extent::flat(0), host::extent));
        call.cut = agreed;
        // SAFETY: nothing is read through a null place of length 0.
        let nothing = unsafe { BufferRef::from_raw(std::ptr::null(), 0, dtype.unwrap_or(DType::F32)) };
        let input = data.as_ref().map_or(nothing, host::lend);
        let mut output = TensorOutput::new(dtype);
        self.run(&call, |transport| transport.collective(&call, Transfer::Through { input, output: &mut output }))?;
        // A rank that receives nothing gets back a tensor of no use to anybody: its own input, or an empty one.
        Ok(output.into_tensor().or(data).unwrap_or_else(|| FlexTensor::zeros([0].into(), dtype.unwrap_or(DType::F32))))
    }

    fn in_place(&self, call: &Call, buffers: &mut [BufferMut<'_>]) -> Result<(), Error> {
        self.run(call, |transport| transport.collective(call, Transfer::InPlace(buffers)))
    }

    /// Runs a collective after those in the background.
    fn run(&self, call: &Call, operation: impl FnOnce(&dyn Transport) -> Result<u64, Error>) -> Result<(), Error> {
        self.inner.progress.drain();
        self.count(call, || operation(&*self.inner.transport))
    }

    fn count(&self, call: &Call, operation: impl FnOnce() -> Result<u64, Error>) -> Result<(), Error> {
        let began = Instant::now();
        let bytes = operation().map_err(|error| match error {
            Error::NoSuchRank { .. } => error,
            // An error that only this rank has found, with the others already done, must not leave them guessing later.
            error => self.fail_with(error),
        })?;
        self.inner.counters.add(&call.operation, bytes, Duration::max(began.elapsed(), Duration::from_nanos(1)));
        Ok(())
    }

    fn check_root(&self, root: usize, operation: &'static str) -> Result<(), Error> {
        match root < self.size() {
            true => Ok(()),
            false => Err(Error::NoSuchRank { group: self.group().clone(), rank: root, size: self.size(), operation }),
        }
    }
}

/// FNV-1a over the lengths of coalesced buffers.
fn fingerprint(lens: impl Iterator<Item = usize>) -> u64 {
    lens.fold(0xcbf2_9ce4_8422_2325, |hash, len| (hash ^ len as u64).wrapping_mul(0x100_0000_01b3))
}
