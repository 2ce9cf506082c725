//! The watchdog thread of a rank's NCCL communicators, for all groups of one world.
//!
//! NCCL's kernels wait on the device for those of the peers, and nobody on the host waits with them. So this thread
//!
//! - **watches**: when the world fails (the host transport knows), or NCCL reports an error, or an operation that the
//!   device could have started is not done after the time-out, the world fails and *every* communicator of it is
//!   aborted: kernels that wait for a lost rank return, and with them whoever waits for the device;
//! - **sends**: a message is sent when its receiver has asked for it (see `messages.rs`), whatever the sender does
//!   meanwhile, and even if it has dropped its communicator since;
//! - **holds buffers** that NCCL reads and burn could write to meanwhile, until the device is done with them: burn
//!   writes in place to a buffer with a single handle, and its streams do not wait for those that only read;
//! - **closes communicators**: ending one takes all its ranks, so a rank that drops one hands it over and goes on. One
//!   that its peers keep for longer than the time-out is aborted.
//!
//! It sleeps while there is nothing to do, for at most [`POLL_INTERVAL`] at a time while communicators are open, and
//! polls more often while messages wait for their receivers. It ends with the last of what it watches.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::event::CudaEvent;
use super::gpu::Gpu;
use super::messages::{SendQueue, WaitingMessage};
use super::nccl_comm::NcclComm;
use super::stream::Prepared;
use crate::Error;
use crate::comm::pending::{OutstandingJob, OutstandingJobs};
use crate::comm::sent_messages::OrphanedMessages;
use crate::comm::{Call, DeviceTensor, Transport};
use crate::lock::lock;

/// How often open communicators are checked.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How often it polls for requests of receivers: at first, and when none has arrived for a while.
const SOON: Duration = Duration::from_micros(20);
const LATER: Duration = Duration::from_millis(1);

/// One rank's end of a NCCL communicator, watched by the watchdog.
#[derive(Debug)]
pub(super) struct CommHandle {
    raw: Mutex<NcclComm>,
    watchdog: Arc<Watchdog>,
}

impl CommHandle {
    /// Locks NCCL, which takes one call at a time.
    pub fn lock(&self) -> MutexGuard<'_, NcclComm> {
        lock(&self.raw)
    }
}

impl Drop for CommHandle {
    fn drop(&mut self) {
        // Not with its own group: peers must see that this rank has left that.
        let raw = self.lock().take(&self.watchdog.host);
        if !raw.is_over() {
            self.watchdog.close_in_background(raw);
        }
    }
}

/// A handle that keeps others from writing to the buffer, and, for a message, the buffer at its address.
pub(super) type HeldBuffer = (DeviceTensor, Option<Prepared>);

/// An operation that was enqueued on the device.
struct Enqueued {
    call: Call,
    ready: Arc<CudaEvent>,
    done: Arc<CudaEvent>,
    link: Weak<CommHandle>,
    /// Buffers that nobody may write to until then.
    held: Vec<HeldBuffer>,
    /// Since when the device could have been running it.
    since: Option<Instant>,
}

/// A communicator that is being closed.
struct Closing {
    raw: NcclComm,
    since: Instant,
    /// The rank does not leave the world before.
    _outstanding_job: OutstandingJob,
}

#[derive(Default)]
struct Watched {
    links: Vec<Weak<CommHandle>>,
    send_queues: Vec<Weak<SendQueue>>,
    enqueued: VecDeque<Enqueued>,
    closing: Vec<Closing>,
    /// Messages whose sender has dropped its communicator, and the queue that sends them.
    orphaned: Vec<(Arc<SendQueue>, OrphanedMessages<WaitingMessage>)>,
    running: bool,
    /// Whether something changed since the thread looked last.
    news: bool,
}

/// Watches the NCCL communicators of a rank.
pub(super) struct Watchdog {
    host: Arc<dyn Transport>,
    outstanding_jobs: Arc<OutstandingJobs>,
    gpu: Gpu,
    watched: Mutex<Watched>,
    condvar: Condvar,
}

impl std::fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watchdog").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Watchdog {
    pub fn new(host: Arc<dyn Transport>, outstanding_jobs: Arc<OutstandingJobs>, gpu: Gpu) -> Arc<Self> {
        Arc::new(Self { host, outstanding_jobs, gpu, watched: Mutex::default(), condvar: Condvar::new() })
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Watches a communicator.
    pub fn link(self: &Arc<Self>, raw: NcclComm) -> Arc<CommHandle> {
        let link = Arc::new(CommHandle { raw: Mutex::new(raw), watchdog: self.clone() });
        self.tell(|watched| watched.links.push(Arc::downgrade(&link)));
        link
    }

    /// Watches messages that wait for their receivers.
    pub fn send_queue(self: &Arc<Self>, send_queue: &Arc<SendQueue>) {
        self.tell(|watched| watched.send_queues.push(Arc::downgrade(send_queue)));
    }

    /// The group that exists for the watchdog: it ends with it.
    pub fn host(&self) -> &Arc<dyn Transport> {
        &self.host
    }

    /// Keeps messages that wait for their receiver after their sender has gone.
    pub fn hold(self: &Arc<Self>, send_queue: &Arc<SendQueue>) {
        if let Some(orphaned) = OrphanedMessages::new(&send_queue.messages, &self.outstanding_jobs) {
            self.tell(|watched| {
                watched.orphaned.push((send_queue.clone(), orphaned));
                watched.news = true;
            });
        }
    }

    /// Watches an operation between two events, and holds its buffers until then.
    pub fn watch(
        self: &Arc<Self>,
        call: Call,
        link: &Arc<CommHandle>,
        (ready, done): (Arc<CudaEvent>, Arc<CudaEvent>),
        held: Vec<HeldBuffer>,
    ) {
        let link = Arc::downgrade(link);
        self.tell(|watched| watched.enqueued.push_back(Enqueued { call, ready, done, link, held, since: None }));
    }

    /// Polls at once.
    pub fn wake(self: &Arc<Self>) {
        self.tell(|watched| watched.news = true);
    }

    fn close_in_background(self: &Arc<Self>, raw: NcclComm) {
        let closing =
            Closing { raw, since: Instant::now(), _outstanding_job: OutstandingJob::new(&self.outstanding_jobs) };
        // Nobody could react to an error of this call; the communicator is aborted later.
        let _ = closing.raw.finalize();
        self.tell(|watched| {
            watched.closing.push(closing);
            watched.news = true;
        });
    }

    fn tell(self: &Arc<Self>, what: impl FnOnce(&mut Watched)) {
        let mut watched = lock(&self.watched);
        what(&mut watched);
        if !watched.running {
            let watchdog = self.clone();
            let name = format!("nccl {} of {}", self.host.rank(), self.host.group());
            let started = std::thread::Builder::new().name(name).spawn(move || watchdog.run());
            match started {
                Ok(_) => watched.running = true,
                Err(problem) => {
                    drop(watched);
                    self.host.abort(Error::Gpu {
                        problem: format!("the watchdog thread of NCCL could not be started: {problem}"),
                    });
                    return;
                }
            }
        }
        if watched.news {
            self.condvar.notify_one();
        }
    }

    fn run(self: Arc<Self>) {
        // Without it the queries below fail, and say so.
        let _ = self.gpu.enter();
        let mut pause = SOON;
        let mut watched = lock(&self.watched);
        loop {
            watched.news = false;
            watched.links.retain(|link| link.strong_count() > 0);
            watched.send_queues.retain(|send_queue| send_queue.strong_count() > 0);
            let links: Vec<_> = watched.links.iter().filter_map(Weak::upgrade).collect();
            let send_queues: Vec<_> = watched.send_queues.iter().filter_map(Weak::upgrade).collect();
            let mut enqueued = std::mem::take(&mut watched.enqueued);
            let mut closing = std::mem::take(&mut watched.closing);
            let mut left = std::mem::take(&mut watched.orphaned);
            drop(watched);

            // Not locked here: others may call NCCL, drop a handle, or add more.
            let mut waiting = false;
            let mut moved = false;
            for send_queue in &send_queues {
                match send_queue.deliver(&self) {
                    Ok(delivered) => moved |= delivered,
                    Err(error) => self.host.abort(error),
                }
                waiting |= !send_queue.messages.is_empty();
            }
            enqueued.retain_mut(|operation| self.is_running(operation));
            self.check_async_errors(&links);
            if self.host.failure().is_some() {
                links.iter().for_each(|link| link.lock().abort());
                closing.iter_mut().for_each(|closing| closing.raw.abort());
                // Messages that wait for their receiver are dropped.
                send_queues.iter().for_each(|send_queue| send_queue.messages.clear());
                waiting = false;
            }
            let limit = self.host.timeout();
            closing.retain_mut(|closing| closing.is_alive(limit));
            left.retain(|(_, orphaned)| orphaned.is_wanted(limit, |sent| sent.tag));
            drop((links, send_queues));

            watched = lock(&self.watched);
            watched.orphaned.append(&mut left);
            enqueued.append(&mut watched.enqueued);
            watched.enqueued = enqueued;
            watched.closing.append(&mut closing);
            let idle = watched.links.is_empty() && watched.closing.is_empty() && watched.enqueued.is_empty();
            if idle && watched.orphaned.is_empty() {
                watched.running = false;
                return;
            }
            pause = if moved || !waiting { SOON } else { (pause * 2).min(LATER) };
            let pause =
                match (waiting, watched.closing.is_empty() && watched.enqueued.iter().all(|one| one.held.is_empty())) {
                    (true, _) => pause,
                    (false, false) => LATER,
                    (false, true) => POLL_INTERVAL,
                };
            if !watched.news {
                watched = self.condvar.wait_timeout(watched, pause).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Fails the world with what NCCL reports of communicators that nobody is calling just now.
    fn check_async_errors(&self, links: &[Arc<CommHandle>]) {
        for link in links {
            let Ok(raw) = link.raw.try_lock() else { continue };
            if !raw.is_over()
                && let Err(error) = raw.is_idle("the background")
            {
                self.host.abort(error);
            }
        }
    }

    /// Whether the device is still running it. Fails the world when that takes too long.
    fn is_running(&self, operation: &mut Enqueued) -> bool {
        match operation.done.is_over() {
            Ok(true) => return false,
            Ok(false) => {}
            Err(error) => {
                // The GPU is lost; memory that it may still write to is not given back.
                self.host.abort(error);
                std::mem::forget(std::mem::take(&mut operation.held));
                return false;
            }
        }
        let since = match operation.since {
            Some(since) => since,
            None if operation.ready.is_over().unwrap_or(true) => *operation.since.insert(Instant::now()),
            None => return true,
        };
        if since.elapsed() <= self.host.timeout() {
            return true;
        }
        let error = operation.link.upgrade().map(|link| {
            let problem = format!("the device has not come to its end in {:.1?}", since.elapsed());
            link.lock().refused(&operation.call.to_string(), problem)
        });
        if let Some(error) = error.filter(|_| self.host.failure().is_none()) {
            self.host.abort(error);
            return true;
        }
        // The world has failed, and the device does not finish all the same.
        std::mem::forget(std::mem::take(&mut operation.held));
        false
    }
}

impl Closing {
    /// Whether it is still being closed.
    fn is_alive(&mut self, limit: Duration) -> bool {
        match self.raw.is_idle("leaving the group") {
            Ok(false) if self.since.elapsed() < limit => return true,
            Ok(true) => self.raw.destroy(),
            Ok(false) | Err(_) => self.raw.abort(),
        }
        false
    }
}
