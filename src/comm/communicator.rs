//! The communicator: one rank's member of a group, which runs collectives and sends messages over a transport.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crossbeam_utils::CachePadded;

use super::counters::RunningCounters;
use super::panicked::panic_message;
use super::pending::{OutstandingJobs, ProgressThread};
use super::transport::{Transfer, Transport};
use super::{Call, CallLog, CallShape, Counters, Operation, Pending};
use crate::Error;

/// One rank's member of a group: runs collectives with the other ranks, and exchanges messages with them.
///
/// Cheap to clone; clones are the same member of the same group. The group ends for this rank when the last clone is
/// dropped. Collectives take a [`Payload`](super::Payload) by value and return one; [`start`](Self::start) runs any of
/// them in the background. Operations that divide tensors divide their first dim into [parts](super::part).
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
    /// On cache lines of its own: communicators of several ranks are allocated side by side.
    counters: CachePadded<RunningCounters>,
    progress: Arc<ProgressThread>,
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.inner.transport.panicking();
        }
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Communicator({} {}/{} over {})", self.group(), self.rank(), self.size(), self.transport_name())
    }
}

impl Communicator {
    /// Makes a communicator over a transport, which may be one of your own.
    pub fn new(transport: Arc<dyn Transport>) -> Self {
        Self::with_outstanding_jobs(transport, Arc::default())
    }

    /// The same group over another transport, with the same background operations.
    #[cfg(feature = "cuda")]
    pub(super) fn over(&self, transport: Arc<dyn Transport>) -> Self {
        Self::with_outstanding_jobs(transport, self.inner.progress.outstanding_jobs().clone())
    }

    #[cfg(feature = "cuda")]
    pub(super) fn outstanding_jobs(&self) -> &Arc<OutstandingJobs> {
        self.inner.progress.outstanding_jobs()
    }

    #[cfg(any(feature = "cuda", test))]
    pub(super) fn transport_arc(&self) -> Arc<dyn Transport> {
        self.inner.transport.clone()
    }

    fn with_outstanding_jobs(transport: Arc<dyn Transport>, outstanding_jobs: Arc<OutstandingJobs>) -> Self {
        Self::counting(transport, Arc::new(ProgressThread::new(outstanding_jobs)))
    }

    /// The same member of the same group, whose calls come between those of this one, with counters of its own.
    pub(crate) fn counted_apart(&self) -> Self {
        Self::counting(self.inner.transport.clone(), self.inner.progress.clone())
    }

    fn counting(transport: Arc<dyn Transport>, progress: Arc<ProgressThread>) -> Self {
        let counters = CachePadded::new(RunningCounters::new());
        Self { inner: Arc::new(Inner { transport, counters, progress }) }
    }

    /// Index of this rank in the group.
    pub fn rank(&self) -> usize {
        self.inner.transport.rank()
    }

    /// Index of this rank in the world that the group was split from.
    pub(crate) fn world_rank(&self) -> usize {
        self.inner.transport.world_rank()
    }

    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.inner.transport.size()
    }

    /// Name of the group, as errors and logs call it.
    pub fn group(&self) -> &Arc<str> {
        self.inner.transport.group()
    }

    /// Name of the transport: `local`, or that of a [`Transport`] of your own.
    pub fn transport_name(&self) -> &'static str {
        self.inner.transport.name()
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

    /// Fails the world with this error.
    pub(crate) fn fail(&self, error: Error) {
        self.inner.transport.abort(error);
    }

    /// Leaves the world, with all groups of it that this rank is in, whoever still holds a communicator. Waits first
    /// for the operations that this rank has started in the background.
    pub(crate) fn leave(&self) {
        self.inner.progress.outstanding_jobs().wait(self.inner.transport.timeout().saturating_mul(2));
        self.inner.transport.leave();
    }

    /// Fails the world, and returns the error that it failed with, which may be an earlier one.
    pub(crate) fn fail_with(&self, error: Error) -> Error {
        self.fail(error.clone());
        self.failure().unwrap_or(error)
    }

    /// Splits the group: ranks that pass the same `color` form a group, ordered by `key`, then by rank. Collective.
    ///
    /// Errors call the new group by the name of this one and its color; see [`split_named`](Self::split_named).
    pub fn split(&self, color: u64, key: i64) -> Result<Self, Error> {
        self.split_named("", color, key)
    }

    /// [`split`](Self::split) with a name for what the groups are for, by which errors and logs call them: `world/dp0`.
    /// All ranks give the same name, whatever their color.
    pub fn split_named(&self, name: &str, color: u64, key: i64) -> Result<Self, Error> {
        let call = Call::split(name);
        let mut part = None;
        self.run(&call, |transport| {
            part = Some(transport.split(name, color, key)?);
            Ok(0)
        })?;
        let part = part.ok_or_else(|| Error::invalid("split", "the transport returned no group"))?;
        Ok(Self::with_outstanding_jobs(part, self.inner.progress.outstanding_jobs().clone()))
    }

    /// The longest that a rank waits for the others.
    pub(crate) fn timeout(&self) -> std::time::Duration {
        self.inner.transport.timeout()
    }

    /// Waits until every rank of the group has come.
    pub fn barrier(&self) -> Result<(), Error> {
        let call = Call::new(Operation::Barrier, None, CallShape::flat(0));
        self.run(&call, |transport| transport.collective(&call, Transfer::Nothing))
    }

    /// Runs collectives in the background, in the order of the calls of `start`; the same order is asked of every rank.
    ///
    /// `operation` gets this communicator and runs on a thread of its own, which computes tensor operations without
    /// help. Use [`start_recv`](Self::start_recv) for messages: a receive in here would hold up what is started after
    /// it.
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
                // The world fails now, not when somebody waits for this operation.
                let (rank, message) = (comm.inner.transport.world_rank(), panic_message(&*panic));
                Err(comm.fail_with(Error::RankPanicked { rank, message, log: comm.log() }))
            })
        });
        pending.within(self.inner.transport.timeout().saturating_mul(2), move |waited| {
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

    /// Whether collectives on host memory run on the threads that call them, see [`Transport::works_on_callers`].
    pub fn works_on_callers(&self) -> bool {
        self.inner.transport.works_on_callers()
    }

    pub(super) fn transport(&self) -> &dyn Transport {
        &*self.inner.transport
    }

    /// Runs a collective after those in the background.
    pub(super) fn run(
        &self,
        call: &Call,
        operation: impl FnOnce(&dyn Transport) -> Result<u64, Error>,
    ) -> Result<(), Error> {
        self.inner.progress.drain();
        self.count(call, || operation(&*self.inner.transport))
    }

    pub(super) fn count(&self, call: &Call, operation: impl FnOnce() -> Result<u64, Error>) -> Result<(), Error> {
        let began = self.inner.counters.now();
        let bytes = operation().map_err(|error| match error {
            // All ranks return it, and no buffer has been touched.
            Error::NoSuchRank { .. } | Error::OutOfMemory { .. } => error,
            // An error that only this rank has found must reach the others, which are done with this operation.
            error => self.fail_with(error),
        })?;
        self.inner.counters.add(call, bytes, began);
        Ok(())
    }
}
