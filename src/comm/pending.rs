//! Collectives in the background.
//!
//! Each communicator of each rank has, from the first [`start`](super::Communicator::start) on, one thread that runs what
//! was started, in the order in which it was started; so all ranks see the same order without talking about it. A
//! collective that is called directly while others are under way waits until they are done. The thread sleeps while it
//! waits for peers: the core belongs to the thread that computes.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::Error;

thread_local! {
    /// Address of the [`Progress`] whose thread this is.
    static BACKGROUND: Cell<usize> = const { Cell::new(0) };
    /// What the thread that takes the result of the job under way here must do first.
    static SETTLEMENTS: RefCell<Vec<Settlement>> = const { RefCell::new(Vec::new()) };
}

type Settlement = Box<dyn FnOnce() + Send>;

/// Makes the thread that takes the result of the background job under way on this one run `settle` before it has it. Does
/// nothing on other threads: there the result is where it was made.
#[cfg(any(feature = "cuda", test))]
pub(crate) fn when_taken(settle: impl FnOnce() + Send + 'static) {
    if in_background() {
        SETTLEMENTS.with_borrow_mut(|settlements| settlements.push(Box::new(settle)));
    }
}

/// Whether this thread runs collectives in the background.
pub(crate) fn in_background() -> bool {
    BACKGROUND.get() != 0
}

type Job = Box<dyn FnOnce() + Send>;

/// What a rank has under way in the background, over all its communicators of a world.
#[derive(Debug, Default)]
pub(crate) struct Underway {
    jobs: Mutex<usize>,
    none: Condvar,
}

impl Underway {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.jobs.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits until nothing is under way, for as long as `limit` at most.
    pub fn wait(&self, limit: Duration) {
        let _ = self.none.wait_timeout_while(self.lock(), limit, |jobs| *jobs > 0);
    }
}

/// A job counted as under way until this is dropped.
pub(crate) struct Counted(Arc<Underway>);

impl Counted {
    pub(crate) fn new(underway: &Arc<Underway>) -> Self {
        *underway.lock() += 1;
        Self(underway.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut jobs = self.0.lock();
        *jobs -= 1;
        if *jobs == 0 {
            self.0.none.notify_all();
        }
    }
}

/// The background thread of a communicator.
#[derive(Debug)]
pub(crate) struct Progress {
    jobs: Mutex<Option<Sender<Job>>>,
    /// Jobs submitted and not yet done.
    in_flight: Arc<AtomicUsize>,
    /// Jobs done so far.
    done: Arc<AtomicU64>,
    underway: Arc<Underway>,
}

impl Progress {
    pub fn new(underway: Arc<Underway>) -> Self {
        Self { jobs: Mutex::default(), in_flight: Arc::default(), done: Arc::default(), underway }
    }

    pub fn underway(&self) -> &Arc<Underway> {
        &self.underway
    }

    /// Runs `job`, which does not panic, after all that was submitted before. `name` is for the thread, if this is its first job.
    pub fn submit<R: Send + 'static>(
        &self,
        rank: usize,
        name: impl FnOnce() -> String,
        job: impl FnOnce() -> Result<R, Error> + Send + 'static,
    ) -> Pending<R> {
        if BACKGROUND.get() == self.address() {
            // Started by a job of this very thread: done at once, for it cannot be done while that job waits for it.
            let outcome = job();
            return Pending::deferred(move || outcome);
        }
        let (reply, result) = channel();
        let (in_flight, done, counted) = (self.in_flight.clone(), self.done.clone(), Counted::new(&self.underway));
        let job: Job = Box::new(move || {
            let outcome = job();
            drop(counted);
            done.fetch_add(1, Ordering::Relaxed);
            in_flight.fetch_sub(1, Ordering::Release);
            // Nobody may be waiting any more: then the result is not wanted.
            let _ = reply.send((outcome, SETTLEMENTS.take()));
        });
        let mut jobs = self.jobs.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
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
        Pending { state: State::Background { result, done: self.done.clone() }, overdue: None }
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
            // Tensor operations of a job stay on this thread; the pools belong to the ranks.
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

/// A panic's message, as far as it is text.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("(no message)").to_owned()
}

/// An operation under way. Dropping it does not cancel the operation; its result is then thrown away.
#[must_use = "the result, or the error, is had by waiting"]
pub struct Pending<R> {
    state: State<R>,
    /// How long the background thread may take over one job, and what to do when it takes longer.
    overdue: Option<(Duration, Overdue)>,
}

type Overdue = Box<dyn FnOnce(Duration) -> Error + Send>;

/// What a job gives, and what must be done on the thread that takes it.
type Settled<R> = (Result<R, Error>, Vec<Settlement>);

enum State<R> {
    Background { result: Receiver<Settled<R>>, done: Arc<AtomicU64> },
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
            State::Background { result, done } => {
                let (outcome, settlements) = await_result(&result, &done, self.overdue)?;
                settlements.into_iter().for_each(|settle| settle());
                outcome
            }
            State::Deferred(operation) => operation(),
            State::Failed(error) => Err(error),
        }
    }

    /// Sets a limit for each job of the background thread, and what makes the error when one takes longer.
    pub(crate) fn within(mut self, limit: Duration, overdue: impl FnOnce(Duration) -> Error + Send + 'static) -> Self {
        self.overdue = Some((limit, Box::new(overdue)));
        self
    }

    /// An operation that needs no thread: others make its progress, and it is finished by waiting.
    pub(crate) fn deferred(operation: impl FnOnce() -> Result<R, Error> + Send + 'static) -> Self {
        Self { state: State::Deferred(Box::new(operation)), overdue: None }
    }

    fn failed(error: Error) -> Self {
        Self { state: State::Failed(error), overdue: None }
    }
}

/// Waits for a result as long as the thread that brings it gets on with its jobs.
fn await_result<R>(
    result: &Receiver<Settled<R>>,
    done: &AtomicU64,
    overdue: Option<(Duration, Overdue)>,
) -> Result<Settled<R>, Error> {
    let limit = overdue.as_ref().map_or(Duration::MAX, |(limit, _)| *limit);
    let mut seen = done.load(Ordering::Relaxed);
    loop {
        match result.recv_timeout(limit) {
            Ok(settled) => return Ok(settled),
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

    use super::{Progress, when_taken};

    /// On the thread that waits and before it has the result, once for each job, also for jobs that another job starts.
    #[test]
    fn results_are_settled_where_they_are_taken() {
        let progress = Progress::new(Arc::default());
        let settled = Arc::new(Mutex::new(Vec::new()));
        let job = |number: u32| {
            let settled = settled.clone();
            move || {
                when_taken(move || settled.lock().unwrap().push((number, thread::current().id())));
                Ok(number)
            }
        };
        when_taken(|| panic!("nothing is under way on this thread"));
        let submit = |number| progress.submit(0, || "test".into(), job(number));
        let (first, second, third) = (submit(1), submit(2), submit(3));
        let taken = thread::spawn(move || (second.wait().unwrap(), thread::current().id()));
        let (number, other) = taken.join().unwrap();
        assert_eq!(number, 2);
        assert_eq!(*settled.lock().unwrap(), [(2, other)]);
        drop(third);
        assert_eq!(first.wait().unwrap(), 1);
        assert_eq!(*settled.lock().unwrap(), [(2, other), (1, thread::current().id())]);
    }
}
