//! Collectives in the background.
//!
//! Each communicator of each rank has, from the first [`start`](super::Communicator::start) on, one thread that runs what
//! was started, in the order in which it was started; so all ranks see the same order without talking about it. A
//! collective that is called directly while others are under way waits until they are done. The thread sleeps while it
//! waits for peers: the core belongs to the thread that computes.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use crate::Error;

thread_local! {
    /// Address of the [`Progress`] whose thread this is.
    static BACKGROUND: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread runs collectives in the background.
pub(crate) fn in_background() -> bool {
    BACKGROUND.get() != 0
}

type Job = Box<dyn FnOnce() + Send>;

/// The background thread of a communicator.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    jobs: Mutex<Option<Sender<Job>>>,
    /// Jobs submitted and not yet done.
    in_flight: Arc<AtomicUsize>,
}

impl Progress {
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
        let in_flight = self.in_flight.clone();
        let job: Job = Box::new(move || {
            let outcome = job();
            in_flight.fetch_sub(1, Ordering::Release);
            // Nobody may be waiting any more: then the result is not wanted.
            let _ = reply.send(outcome);
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
        Pending { state: State::Background(result) }
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
}

enum State<R> {
    Background(Receiver<Result<R, Error>>),
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
    /// Those of the operation. Every operation ends within the time-out of its communicator, and so does this.
    pub fn wait(self) -> Result<R, Error> {
        match self.state {
            State::Background(result) => result.recv().unwrap_or_else(|_| {
                Err(Error::invalid("Pending::wait", "the background thread ended before it ran the operation"))
            }),
            State::Deferred(operation) => operation(),
            State::Failed(error) => Err(error),
        }
    }

    /// An operation that needs no thread: others make its progress, and it is finished by waiting.
    pub(crate) fn deferred(operation: impl FnOnce() -> Result<R, Error> + Send + 'static) -> Self {
        Self { state: State::Deferred(Box::new(operation)) }
    }

    fn failed(error: Error) -> Self {
        Self { state: State::Failed(error) }
    }
}
