//! Signals by which a run is asked to end, as a cluster sends them some time before it kills: all ranks learn of them
//! at one step.

use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use super::StopSignal;
use crate::Error;
use crate::comm::{Communicator, Pending, ReduceOp};

/// Listens for SIGTERM and SIGUSR1, by which Slurm (`--signal=TERM@120`), torchrun, Kubernetes and others announce that
/// a run will be killed, and tells all ranks at the same step: time to save a [checkpoint](crate::checkpoint) and end.
///
/// One for each rank of a world. While there is one in a process, these signals do not end the process; afterwards they
/// do again.
///
/// ```
/// use burn_parallel::prelude::*;
///
/// fn train(world: Rank) -> Result<Option<launch::StopSignal>, Error> {
///     let mut signals = launch::StopSignals::listen(&world)?;
///     for _ in 0..3 {
///         // ... a step ...
///         if let Some(signal) = signals.asked()? {
///             // ... save: all ranks are here ...
///             return Ok(Some(signal)); // and main ends with `signal.exit_code()`
///         }
///     }
///     Ok(None)
/// }
///
/// assert_eq!(launch::threads(2).run(train)?, [None, None]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct StopSignals {
    group: Communicator,
    /// What any rank had heard at the call of [`asked`](Self::asked) before.
    heard: Option<Pending<Vec<i32>>>,
    _listener: SignalListener,
}

impl StopSignals {
    /// Begins to listen. Collective.
    ///
    /// # Errors
    /// [`Error::User`] if the system refuses; the error of the world.
    pub fn listen(world: &Communicator) -> Result<Self, Error> {
        let _listener = SignalListener::new()?;
        let group = world.split_named("signals", 0, world.rank() as i64)?;
        Ok(Self { group, heard: None, _listener })
    }

    /// The signal that any rank has been sent, if one has, the same on all ranks. To be called once a step, by all
    /// ranks.
    ///
    /// It tells what the ranks had heard at the call before: what they exchange for that, one number, travels in the
    /// background of the step in between, so that nobody waits for it.
    ///
    /// # Errors
    /// The error of the world.
    pub fn asked(&mut self) -> Result<Option<StopSignal>, Error> {
        let before = self.heard.take().map(Pending::wait).transpose()?;
        if let Some(number) = before.and_then(|numbers| numbers.first().copied()).filter(|number| *number > 0) {
            return Ok(Some(StopSignal::new(number)));
        }
        let own = vec![HEARD.load(Ordering::Relaxed)];
        self.heard = Some(self.group.start(move |group| group.all_reduce(own, ReduceOp::Max)));
        Ok(None)
    }
}

// Signals are sent to a process, so what is heard belongs to the process as well.
static LISTENERS: AtomicUsize = AtomicUsize::new(0);
static HEARD: AtomicI32 = AtomicI32::new(0);

/// While there is one, signals are heard; else they do what they do by default.
#[derive(Debug)]
struct SignalListener;

impl SignalListener {
    fn new() -> Result<Self, Error> {
        handle()?;
        LISTENERS.fetch_add(1, Ordering::Relaxed);
        Ok(Self)
    }
}

impl Drop for SignalListener {
    fn drop(&mut self) {
        if LISTENERS.fetch_sub(1, Ordering::Relaxed) == 1 {
            HEARD.store(0, Ordering::Relaxed);
        }
    }
}

/// Puts the handlers in, once in a process.
#[cfg(unix)]
fn handle() -> Result<(), Error> {
    static DONE: std::sync::Mutex<bool> = std::sync::Mutex::new(false);
    let mut done = DONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if *done {
        return Ok(());
    }
    for signal in [libc::SIGTERM, libc::SIGUSR1] {
        let hear = move || match LISTENERS.load(Ordering::Relaxed) {
            0 => drop(signal_hook::low_level::emulate_default_handler(signal)),
            _ => HEARD.store(signal, Ordering::Relaxed),
        };
        // SAFETY: the handler makes system calls and writes to an atomic; it takes no lock and no memory.
        unsafe { signal_hook::low_level::register(signal, hear) }.map_err(Error::user)?;
    }
    *done = true;
    Ok(())
}

/// There are no such signals.
#[cfg(not(unix))]
fn handle() -> Result<(), Error> {
    Ok(())
}
