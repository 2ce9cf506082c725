//! The scheduler of the simulation: threads of ranks as coroutines.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use generator::{Generator, Gn};

use super::message_endpoint::MessageEndpoint;
use super::network::{Conditions, Random, SimulatedNetwork, State, Streams};
use crate::comm::Communicator;
use crate::comm::WorldConfig;
use crate::comm::message_passing::message_store::MessageStore;
use crate::comm::message_passing::{Endpoint, join_world};
use crate::comm::tcp::endpoint::TcpEndpoint;
use crate::lock::lock;

/// Words of a coroutine's stack.
const STACK: usize = 32 << 10;
/// Steps after which a schedule does not end, as it seems.
const STEPS: usize = 20_000_000;

/// Why a thread does not run.
#[derive(Debug)]
pub(super) enum ThreadPause {
    /// Until then.
    Sleep(u64),
    /// Until then, or until one of these streams of its rank is ready.
    Rest(u64, Streams),
}

/// Stops this coroutine until the scheduler resumes it.
#[allow(deprecated, reason = "the scope cannot be had inside the code under test")]
pub(super) fn pause(pause: ThreadPause) {
    generator::yield_with(pause);
}

/// A thread of a rank.
struct SimulatedThread {
    rank: usize,
    coroutine: Generator<'static, (), ThreadPause>,
    pause: ThreadPause,
}

/// Threads that have been started and not run yet.
type StartedThreads = Rc<RefCell<Vec<SimulatedThread>>>;

/// What the script of a rank knows of the simulation.
#[derive(Clone)]
pub(super) struct RankContext {
    pub rank: usize,
    state: Arc<Mutex<State>>,
    started: StartedThreads,
}

impl RankContext {
    /// Nanoseconds since the beginning.
    pub fn now(&self) -> u64 {
        lock(&self.state).now
    }

    /// Computes for so many nanoseconds.
    pub fn compute(&self, nanoseconds: u64) {
        pause(ThreadPause::Sleep(self.now() + nanoseconds));
    }

    /// Another thread of this rank.
    pub fn start(&self, body: impl FnOnce() + 'static) {
        start(&self.started, self.rank, body);
    }
}

/// What a thread runs.
struct ThreadBody<F>(F);

// SAFETY: a simulation and all its coroutines stay on the thread that made them.
unsafe impl<F> Send for ThreadBody<F> {}

impl<F: FnOnce()> ThreadBody<F> {
    fn run(self) {
        (self.0)();
    }
}

fn start(started: &StartedThreads, rank: usize, body: impl FnOnce() + 'static) {
    let body = ThreadBody(body);
    let coroutine = Gn::new_opt(STACK, move || {
        body.run();
        generator::done()
    });
    started.borrow_mut().push(SimulatedThread { rank, coroutine, pause: ThreadPause::Sleep(0) });
}

pub(super) struct SimulatedWorld {
    pub state: Arc<Mutex<State>>,
    began: Instant,
    threads: Vec<SimulatedThread>,
    started: StartedThreads,
    /// The processes that are stopped, each with the time when it goes on.
    stopped: Vec<Option<u64>>,
    /// When the watchdogs ended.
    ends: Rc<RefCell<Vec<(usize, u64)>>>,
    /// What happens when.
    events: Vec<(u64, ProcessEvent)>,
}

/// What happens to a rank's process.
#[derive(Debug, Clone, Copy)]
pub(super) enum ProcessEvent {
    /// It is stopped until then.
    Stop(usize, u64),
    Kill(usize),
}

impl SimulatedWorld {
    pub fn new(size: usize, conditions: Conditions, random: Random) -> Self {
        let state = Arc::new(Mutex::new(State::new(size, conditions, random)));
        let (threads, started) = (Vec::new(), StartedThreads::default());
        Self {
            state,
            began: Instant::now(),
            threads,
            started,
            stopped: vec![None; size],
            ends: Rc::default(),
            events: Vec::new(),
        }
    }

    /// Adds a rank to the world.
    pub fn rank(&self, rank: usize, timeout: Duration, script: impl FnOnce(Communicator, RankContext) + 'static) {
        let network = SimulatedNetwork::new(self.state.clone(), self.began, rank);
        let (streams, copies) = (network.streams(), network.streams());
        self.enter(Box::new(TcpEndpoint::over(network, rank, streams, copies)), timeout, script);
    }

    /// Adds a rank whose endpoint passes on whole messages.
    pub fn rank_of_messages(
        &self,
        store: &Arc<Mutex<MessageStore>>,
        rank: usize,
        timeout: Duration,
        script: impl FnOnce(Communicator, RankContext) + 'static,
    ) {
        let network = SimulatedNetwork::new(self.state.clone(), self.began, rank);
        self.enter(Box::new(MessageEndpoint::new(network, rank, self.stopped.len(), store)), timeout, script);
    }

    fn enter(
        &self,
        endpoint: Box<dyn Endpoint>,
        timeout: Duration,
        script: impl FnOnce(Communicator, RankContext) + 'static,
    ) {
        let rank = endpoint.rank();
        let config = WorldConfig { timeout, name: "world".into() };
        let (comm, world) = join_world(endpoint, config, true);
        let context = RankContext { rank, state: self.state.clone(), started: self.started.clone() };
        start(&self.started, rank, move || script(comm, context));
        let (ends, state) = (self.ends.clone(), self.state.clone());
        start(&self.started, rank, move || {
            world.run_watchdog();
            ends.borrow_mut().push((rank, lock(&state).now));
        });
    }

    /// When each rank was done with the world.
    pub fn ends(&self) -> Vec<(usize, u64)> {
        self.ends.borrow().clone()
    }

    pub fn at(&mut self, time: u64, event: ProcessEvent) {
        self.events.push((time, event));
    }

    /// Runs all threads to their end. Returns whether they have come to it.
    pub fn run(&mut self) -> bool {
        for _ in 0..STEPS {
            self.threads.append(&mut self.started.borrow_mut());
            self.happen();
            if self.threads.iter().all(|thread| self.stopped[thread.rank] == Some(u64::MAX)) {
                return true;
            }
            let Some(next) = self.pick() else { continue };
            let thread = &mut self.threads[next];
            match thread.coroutine.resume() {
                Some(pause) => thread.pause = pause,
                None => drop(self.threads.swap_remove(next)),
            }
        }
        false
    }

    /// What is due happens.
    fn happen(&mut self) {
        let now = lock(&self.state).now;
        if self.events.is_empty() && self.stopped.iter().all(Option::is_none) {
            return;
        }
        for (_, event) in self.events.extract_if(.., |(at, _)| *at <= now) {
            match event {
                ProcessEvent::Stop(rank, until) => self.stopped[rank] = Some(until),
                ProcessEvent::Kill(rank) => {
                    self.stopped[rank] = Some(u64::MAX);
                    // Nothing of it is dropped.
                    for dead in self.threads.extract_if(.., |thread| thread.rank == rank) {
                        std::mem::forget(dead);
                    }
                    lock(&self.state).end(rank);
                }
            }
        }
        for stopped in &mut self.stopped {
            if stopped.is_some_and(|until| until <= now) {
                *stopped = None;
            }
        }
    }

    /// A thread that can run. If there is none, time passes.
    fn pick(&mut self) -> Option<usize> {
        let mut state = lock(&self.state);
        state.arrive();
        // Loops and not iterators: this is most of what an unoptimised simulation does.
        let mut ready = Vec::with_capacity(self.threads.len());
        let mut wakes = u64::MAX;
        for (index, thread) in self.threads.iter().enumerate() {
            if self.stopped[thread.rank].is_some() {
                continue;
            }
            let (until, runs) = match thread.pause {
                ThreadPause::Sleep(until) => (until, until <= state.now),
                ThreadPause::Rest(until, streams) => {
                    (until, until <= state.now || state.woken[thread.rank] || state.is_ready(thread.rank, streams))
                }
            };
            if runs {
                ready.push(index);
            }
            wakes = wakes.min(until);
        }
        if ready.is_empty() {
            let mut next = wakes.min(state.next_arrival());
            for (at, _) in &self.events {
                next = next.min(*at);
            }
            for at in self.stopped.iter().flatten() {
                next = next.min(*at);
            }
            state.now = if next == u64::MAX { state.now + 1_000_000 } else { next };
            return None;
        }
        let next = ready[state.random.below(ready.len())];
        state.now += state.random.below(3000) as u64;
        let thread = &mut self.threads[next];
        if let ThreadPause::Rest(..) = thread.pause {
            state.woken[thread.rank] = false;
        }
        if state.random.one_in(50) {
            // It loses its core.
            thread.pause = ThreadPause::Sleep(state.now + state.random.below(4_000_000) as u64);
            return None;
        }
        Some(next)
    }
}
