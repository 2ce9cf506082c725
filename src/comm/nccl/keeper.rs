//! The thread that looks after what a rank has in NCCL's hands, for all groups of one world.
//!
//! NCCL's kernels wait on the device for those of the peers, and nobody on the host waits with them. So this thread
//!
//! - **watches**: when the world fails (the engine under NCCL knows), or NCCL reports an error, or something that the device
//!   could have begun is not done after the time-out, the world fails and *every* communicator of it is aborted: kernels that
//!   wait for a lost rank return, and with them whoever waits for the device;
//! - **sends**: a message leaves when its receiver has asked for it (see `messages.rs`), whatever the sender does meanwhile, and
//!   even if it has dropped its communicator since;
//! - **holds** what NCCL reads and burn could write to meanwhile, until the device is done with it: burn writes in place to
//!   a buffer of which nobody else has a handle, and its streams do not wait for those who only read;
//! - **buries**: ending a communicator takes all its ranks, so whoever drops one hands it over and goes on. One that its
//!   peers keep for longer than the time-out is aborted.
//!
//! It sleeps while there is nothing to do, for at most [`TURN`] at a time while communicators are open, and looks more often
//! while messages wait for their receivers. It ends with the last of what it looks after.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::event::Event;
use super::gpu::Gpu;
use super::lane::Prepared;
use super::messages::Outbox;
use super::raw::Raw;
use crate::Error;
use crate::comm::pending::{Counted, Underway};
use crate::comm::{Call, DeviceTensor, Transport};

/// How often open communicators are looked at.
const TURN: Duration = Duration::from_millis(50);
/// How often it is looked whether a receiver has asked: at first, and when nobody has for a while.
const SOON: Duration = Duration::from_micros(20);
const LATER: Duration = Duration::from_millis(1);

/// One rank's end of a NCCL communicator, in the keeper's care.
#[derive(Debug)]
pub(super) struct Link {
    raw: Mutex<Raw>,
    keeper: Arc<Keeper>,
}

impl Link {
    /// Who holds this calls NCCL; it takes one call at a time.
    pub fn lock(&self) -> MutexGuard<'_, Raw> {
        lock(&self.raw)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Not with its own group: peers shall see at once that this rank has left that.
        let raw = self.lock().take(&self.keeper.host);
        if !raw.is_over() {
            self.keeper.bury(raw);
        }
    }
}

/// A handle that keeps others from writing to the buffer, and, for a message, the buffer where it is.
pub(super) type Held = (DeviceTensor, Option<Prepared>);

/// Something that the device has been given to do.
struct Flight {
    call: Call,
    ready: Arc<Event>,
    done: Arc<Event>,
    link: Weak<Link>,
    /// What nobody may write to until then.
    held: Vec<Held>,
    /// Since when the device could have been at it.
    since: Option<Instant>,
}

/// A communicator on its way out.
struct Retired {
    raw: Raw,
    since: Instant,
    /// The rank does not leave the world before.
    _underway: Counted,
}

/// Messages whose sender has dropped its communicator.
struct Left {
    outbox: Arc<Outbox>,
    since: Instant,
    /// The rank does not leave the world before.
    _underway: Counted,
}

#[derive(Default)]
struct Care {
    links: Vec<Weak<Link>>,
    outboxes: Vec<Weak<Outbox>>,
    flights: VecDeque<Flight>,
    retired: Vec<Retired>,
    left: Vec<Left>,
    running: bool,
    /// Whether something came since the thread looked last.
    news: bool,
}

/// What a rank has in NCCL's hands.
pub(super) struct Keeper {
    host: Arc<dyn Transport>,
    underway: Arc<Underway>,
    gpu: Gpu,
    care: Mutex<Care>,
    bell: Condvar,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Keeper {
    pub fn new(host: Arc<dyn Transport>, underway: Arc<Underway>, gpu: Gpu) -> Arc<Self> {
        Arc::new(Self { host, underway, gpu, care: Mutex::default(), bell: Condvar::new() })
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Takes a communicator into care.
    pub fn link(self: &Arc<Self>, raw: Raw) -> Arc<Link> {
        let link = Arc::new(Link { raw: Mutex::new(raw), keeper: self.clone() });
        self.tell(|care| care.links.push(Arc::downgrade(&link)));
        link
    }

    /// Takes messages into care that wait for their receivers.
    pub fn outbox(self: &Arc<Self>, outbox: &Arc<Outbox>) {
        self.tell(|care| care.outboxes.push(Arc::downgrade(outbox)));
    }

    /// The group that is kept for the keeper: it ends with it.
    pub fn host(&self) -> &Arc<dyn Transport> {
        &self.host
    }

    /// Holds messages that wait for their receiver and whose sender goes.
    pub fn hold(self: &Arc<Self>, outbox: &Arc<Outbox>) {
        if !outbox.is_empty() {
            let (outbox, since) = (outbox.clone(), Instant::now());
            let left = Left { outbox, since, _underway: Counted::new(&self.underway) };
            self.tell(|care| {
                care.left.push(left);
                care.news = true;
            });
        }
    }

    /// Watches what the device does between two points, and holds buffers until then.
    pub fn watch(
        self: &Arc<Self>,
        call: Call,
        link: &Arc<Link>,
        (ready, done): (Arc<Event>, Arc<Event>),
        held: Vec<Held>,
    ) {
        let link = Arc::downgrade(link);
        self.tell(|care| care.flights.push_back(Flight { call, ready, done, link, held, since: None }));
    }

    /// Looks at once.
    pub fn wake(self: &Arc<Self>) {
        self.tell(|care| care.news = true);
    }

    fn bury(self: &Arc<Self>, raw: Raw) {
        let retired = Retired { raw, since: Instant::now(), _underway: Counted::new(&self.underway) };
        // A failed call says so to nobody who could still do something; it is aborted in its turn.
        let _ = retired.raw.finalize();
        self.tell(|care| {
            care.retired.push(retired);
            care.news = true;
        });
    }

    fn tell(self: &Arc<Self>, what: impl FnOnce(&mut Care)) {
        let mut care = lock(&self.care);
        what(&mut care);
        if !care.running {
            let keeper = self.clone();
            let name = format!("nccl {} of {}", self.host.rank(), self.host.group());
            let started = std::thread::Builder::new().name(name).spawn(move || keeper.run());
            match started {
                Ok(_) => care.running = true,
                Err(problem) => {
                    drop(care);
                    self.host.abort(Error::Gpu {
                        problem: format!("the thread that looks after NCCL could not be started: {problem}"),
                    });
                    return;
                }
            }
        }
        if care.news {
            self.bell.notify_one();
        }
    }

    fn run(self: Arc<Self>) {
        // Without it the queries below fail, and say so.
        let _ = self.gpu.enter();
        let mut pause = SOON;
        let mut care = lock(&self.care);
        loop {
            care.news = false;
            care.links.retain(|link| link.strong_count() > 0);
            care.outboxes.retain(|outbox| outbox.strong_count() > 0);
            let links: Vec<_> = care.links.iter().filter_map(Weak::upgrade).collect();
            let outboxes: Vec<_> = care.outboxes.iter().filter_map(Weak::upgrade).collect();
            let mut flights = std::mem::take(&mut care.flights);
            let mut retired = std::mem::take(&mut care.retired);
            let mut left = std::mem::take(&mut care.left);
            drop(care);

            // Nothing is held by the lock here: others may call NCCL, drop a link, or put in more.
            let mut waiting = false;
            let mut moved = false;
            for outbox in &outboxes {
                match outbox.deliver(&self) {
                    Ok(delivered) => moved |= delivered,
                    Err(error) => self.host.abort(error),
                }
                waiting |= !outbox.is_empty();
            }
            flights.retain_mut(|flight| self.is_in_flight(flight));
            self.look_at(&links);
            if self.host.failure().is_some() {
                links.iter().for_each(|link| link.lock().abort());
                retired.iter_mut().for_each(|retired| retired.raw.abort());
                // What waits for its receiver waits no longer.
                outboxes.iter().for_each(|outbox| outbox.clear());
                waiting = false;
            }
            let limit = self.host.timeout();
            retired.retain_mut(|retired| retired.is_alive(limit));
            left.retain(|left| left.is_wanted(limit));
            drop((links, outboxes));

            care = lock(&self.care);
            care.left.append(&mut left);
            flights.append(&mut care.flights);
            care.flights = flights;
            care.retired.append(&mut retired);
            let idle = care.links.is_empty() && care.retired.is_empty() && care.flights.is_empty();
            if idle && care.left.is_empty() {
                care.running = false;
                return;
            }
            pause = if moved || !waiting { SOON } else { (pause * 2).min(LATER) };
            let pause = match (waiting, care.retired.is_empty() && care.flights.iter().all(|one| one.held.is_empty())) {
                (true, _) => pause,
                (false, false) => LATER,
                (false, true) => TURN,
            };
            if !care.news {
                care = self.bell.wait_timeout(care, pause).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Fails the world with what NCCL reports of communicators that nobody is calling just now.
    fn look_at(&self, links: &[Arc<Link>]) {
        for link in links {
            let Ok(raw) = link.raw.try_lock() else { continue };
            if !raw.is_over()
                && let Err(error) = raw.is_idle("the background")
            {
                self.host.abort(error);
            }
        }
    }

    /// Whether the device is still at it. Fails the world when that takes too long.
    fn is_in_flight(&self, flight: &mut Flight) -> bool {
        match flight.done.is_over() {
            Ok(true) => return false,
            Ok(false) => {}
            Err(error) => {
                // The GPU is lost; memory that it may still write to is not given back.
                self.host.abort(error);
                std::mem::forget(std::mem::take(&mut flight.held));
                return false;
            }
        }
        let since = match flight.since {
            Some(since) => since,
            None if flight.ready.is_over().unwrap_or(true) => *flight.since.insert(Instant::now()),
            None => return true,
        };
        if since.elapsed() <= self.host.timeout() {
            return true;
        }
        let error = flight.link.upgrade().map(|link| {
            let problem = format!("the device has not come to its end in {:.1?}", since.elapsed());
            link.lock().refused(&flight.call.to_string(), problem)
        });
        if let Some(error) = error.filter(|_| self.host.failure().is_none()) {
            self.host.abort(error);
            return true;
        }
        // The world has failed, and the device does not come to its end all the same.
        std::mem::forget(std::mem::take(&mut flight.held));
        false
    }
}

impl Retired {
    /// Whether it is still on its way out.
    fn is_alive(&mut self, limit: Duration) -> bool {
        match self.raw.is_idle("leaving the group") {
            Ok(false) if self.since.elapsed() < limit => return true,
            Ok(true) => self.raw.destroy(),
            Ok(false) | Err(_) => self.raw.abort(),
        }
        false
    }
}

impl Left {
    /// Whether a receiver may still ask for something.
    fn is_wanted(&self, limit: Duration) -> bool {
        if self.outbox.is_empty() {
            return false;
        }
        let wanted = self.since.elapsed() < limit;
        if !wanted {
            log::warn!(
                "{}, which dropped its communicator {limit:.1?} ago, are dropped: nobody has received them",
                self.outbox.describe()
            );
            self.outbox.clear();
        }
        wanted
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
