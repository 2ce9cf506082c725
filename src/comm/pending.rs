//! Operations in the background.
//!
//! Each communicator of each rank has, from the first [`start`](super::Communicator::start) on, one progress thread
//! that runs the started operations in order; so all ranks run them in the same order without communicating about it. A
//! collective that is called directly waits for those in the background. The progress thread sleeps while it waits for
//! peers: the core belongs to the thread that computes.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::Error;
use crate::lock::lock;

thread_local! {
    /// Address of the [`ProgressThread`] that runs on this thread.
    static BACKGROUND: Cell<usize> = const { Cell::new(0) };
    /// Hooks that the thread which waits for the current job runs before it gets the result.
    static WAIT_HOOKS: RefCell<Vec<WaitHook>> = const { RefCell::new(Vec::new()) };
}

type WaitHook = Box<dyn FnOnce() + Send>;

/// Makes the thread that waits for the current background job run `hook` before it gets the result. Does nothing on
/// other threads: there the result is used on the thread that made it.
#[cfg(any(feature = "cuda", test))]
pub(crate) fn on_wait(hook: impl FnOnce() + Send + 'static) {
    if in_background() {
        WAIT_HOOKS.with_borrow_mut(|wait_hooks| wait_hooks.push(Box::new(hook)));
    }
}

/// Whether this thread runs collectives in the background.
pub(crate) fn in_background() -> bool {
    BACKGROUND.get() != 0
}

type Job = Box<dyn FnOnce() + Send>;

/// The operations that a rank has in the background, over all its communicators of a world.
#[derive(Debug, Default)]
pub(crate) struct OutstandingJobs {
    jobs: Mutex<usize>,
    none: Condvar,
}

impl OutstandingJobs {
    /// Waits until there are none, for as long as `limit` at most.
    pub fn wait(&self, limit: Duration) {
        let _ = self.none.wait_timeout_while(lock(&self.jobs), limit, |jobs| *jobs > 0);
    }
}

/// Counts a job as outstanding until this is dropped.
pub(crate) struct OutstandingJob(Arc<OutstandingJobs>);

impl OutstandingJob {
    pub(crate) fn new(outstanding_jobs: &Arc<OutstandingJobs>) -> Self {
        *lock(&outstanding_jobs.jobs) += 1;
        Self(outstanding_jobs.clone())
    }
}

impl Drop for OutstandingJob {
    fn drop(&mut self) {
        let mut jobs = lock(&self.0.jobs);
        *jobs -= 1;
        if *jobs == 0 {
            self.0.none.notify_all();
        }
    }
}

/// The progress thread of a communicator.
#[derive(Debug)]
pub(crate) struct ProgressThread {
    jobs: Mutex<Option<Sender<Job>>>,
    /// Jobs submitted and not yet done.
    in_flight: Arc<AtomicUsize>,
    /// Jobs done so far.
    done: Arc<AtomicU64>,
    outstanding_jobs: Arc<OutstandingJobs>,
}

impl ProgressThread {
    pub fn new(outstanding_jobs: Arc<OutstandingJobs>) -> Self {
        Self { jobs: Mutex::default(), in_flight: Arc::default(), done: Arc::default(), outstanding_jobs }
    }

    pub fn outstanding_jobs(&self) -> &Arc<OutstandingJobs> {
        &self.outstanding_jobs
    }

    /// Runs `job`, which does not panic, after all that was submitted before. `name` is for the thread, if this is its
    /// first job.
    pub fn submit<R: Send + 'static>(
        &self,
        rank: usize,
        name: impl FnOnce() -> String,
        job: impl FnOnce() -> Result<R, Error> + Send + 'static,
    ) -> Pending<R> {
        if BACKGROUND.get() == self.address() {
            // Started by a job on this thread: run at once, for it could not run while that job waits for it.
            let outcome = job();
            return Pending::deferred(move || outcome);
        }
        let (reply, result) = channel();
        let (in_flight, done, outstanding_job) =
            (self.in_flight.clone(), self.done.clone(), OutstandingJob::new(&self.outstanding_jobs));
        let job: Job = Box::new(move || {
            let outcome = job();
            drop(outstanding_job);
            done.fetch_add(1, Ordering::Relaxed);
            in_flight.fetch_sub(1, Ordering::Release);
            // Nobody may be waiting any more: then the result is not wanted.
            let _ = reply.send((outcome, WAIT_HOOKS.take()));
        });
        let mut jobs = lock(&self.jobs);
        if jobs.is_none() {
            match self.spawn(name()) {
                Ok(sender) => *jobs = Some(sender),
                Err(problem) => {
                    return Pending::failed(Error::Launch { rank, size: rank + 1, problem });
                }
            }
        }
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        if let Some(jobs) = &*jobs {
            // The thread ends only when this sender is dropped.
            let _ = jobs.send(job);
        }
        Pending { state: PendingState::Background { result, done: self.done.clone() }, overdue: None }
    }

    /// Waits until all that was submitted is done, unless this is the thread that does it.
    pub fn drain(&self) {
        if self.in_flight.load(Ordering::Acquire) > 0 && BACKGROUND.get() != self.address() {
            let _ = self.submit(0, || unreachable!("the thread runs already"), || Ok(())).wait();
        }
    }

    fn spawn(&self, name: String) -> Result<Sender<Job>, String> {
        let (sender, jobs) = channel::<Job>();
        let address = self.address();
        let run = move || {
            BACKGROUND.set(address);
            // Tensor operations of a job run on this thread; the thread pools belong to the ranks.
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
            if let Err(problem) = &pool {
                log::warn!("background tensor operations will use the global thread pool: {problem}");
            }
            jobs.iter().for_each(|job| job());
        };
        std::thread::Builder::new().name(name).spawn(run).map_err(|problem| problem.to_string())?;
        Ok(sender)
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

/// An operation in the background. Dropping it does not cancel the operation; its result is then discarded.
#[must_use = "the result, or the error, is had by waiting"]
pub struct Pending<R> {
    state: PendingState<R>,
    /// The limit for one job of the progress thread, and what makes the error when one takes longer.
    overdue: Option<(Duration, Overdue)>,
}

type Overdue = Box<dyn FnOnce(Duration) -> Error + Send>;

/// The result of a job, and the hooks to run on the thread that waits for it.
type JobResult<R> = (Result<R, Error>, Vec<WaitHook>);

enum PendingState<R> {
    Background { result: Receiver<JobResult<R>>, done: Arc<AtomicU64> },
    Deferred(Box<dyn FnOnce() -> Result<R, Error> + Send>),
    Failed(Error),
}

impl<R> std::fmt::Debug for Pending<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}

impl<R> Pending<R> {
    /// Waits for the result.
    ///
    /// # Errors
    /// Those of the operation. Every collective ends within the time-out of its communicator; operations that wait for
    /// each other, or that never return, end this with [`Error::Timeout`] when the background thread has been at one of
    /// them for more than twice as long.
    pub fn wait(self) -> Result<R, Error> {
        match self.state {
            PendingState::Background { result, done } => {
                let (outcome, wait_hooks) = await_result(&result, &done, self.overdue)?;
                wait_hooks.into_iter().for_each(|hook| hook());
                outcome
            }
            PendingState::Deferred(operation) => operation(),
            PendingState::Failed(error) => Err(error),
        }
    }

    /// Sets a limit for each job of the background thread, and what makes the error when one takes longer.
    pub(crate) fn within(mut self, limit: Duration, overdue: impl FnOnce(Duration) -> Error + Send + 'static) -> Self {
        self.overdue = Some((limit, Box::new(overdue)));
        self
    }

    /// An operation without a thread: it runs when it is waited for.
    pub(crate) fn deferred(operation: impl FnOnce() -> Result<R, Error> + Send + 'static) -> Self {
        Self { state: PendingState::Deferred(Box::new(operation)), overdue: None }
    }

    fn failed(error: Error) -> Self {
        Self { state: PendingState::Failed(error), overdue: None }
    }
}

/// Waits for a result as long as the progress thread completes jobs.
fn await_result<R>(
    result: &Receiver<JobResult<R>>,
    done: &AtomicU64,
    overdue: Option<(Duration, Overdue)>,
) -> Result<JobResult<R>, Error> {
    let limit = overdue.as_ref().map_or(Duration::MAX, |(limit, _)| *limit);
    let mut seen = done.load(Ordering::Relaxed);
    loop {
        match result.recv_timeout(limit) {
            Ok(hooked) => return Ok(hooked),
            Err(RecvTimeoutError::Disconnected) => {
                let problem = "the background thread ended before it ran the operation";
                return Err(Error::invalid("Pending::wait", problem));
            }
            Err(RecvTimeoutError::Timeout) => {
                let now = done.load(Ordering::Relaxed);
                if now == seen
                    && let Some((limit, overdue)) = overdue
                {
                    return Err(overdue(limit));
                }
                seen = now;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::thread;

    use super::{ProgressThread, on_wait};

    /// Hooks run on the thread that waits and before it has the result, once for each job, also for jobs that another
    /// job starts.
    #[test]
    fn results_are_settled_where_they_are_taken() {
        let progress = ProgressThread::new(Arc::default());
        let hooked = Arc::new(Mutex::new(Vec::new()));
        let job = |number: u32| {
            let hooked = hooked.clone();
            move || {
                on_wait(move || hooked.lock().unwrap().push((number, thread::current().id())));
                Ok(number)
            }
        };
        on_wait(|| panic!("nothing is under way on this thread"));
        let submit = |number| progress.submit(0, || "test".into(), job(number));
        let (first, second, third) = (submit(1), submit(2), submit(3));
        let taken = thread::spawn(move || (second.wait().unwrap(), thread::current().id()));
        let (number, other) = taken.join().unwrap();
        assert_eq!(number, 2);
        assert_eq!(*hooked.lock().unwrap(), [(2, other)]);
        drop(third);
        assert_eq!(first.wait().unwrap(), 1);
        assert_eq!(*hooked.lock().unwrap(), [(2, other), (1, thread::current().id())]);
    }
}
