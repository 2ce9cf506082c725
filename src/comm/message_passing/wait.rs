//! Waits for peers with backoff: spins at first, then yields, then parks.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::world::World;
use crate::comm::backoff::{Backoff, Pause};

/// Polls that spin, when every rank has a core.
const SPINS: u32 = 5000;
/// Polls of shared memory that take as long as one of the endpoint.
const CHEAP_POLL_FACTOR: u32 = 4;
/// Polls that yield the core.
const YIELDS: u32 = 2000;
/// The same where a poll is a system call, and an arrival ends a park.
const COSTLY_SPINS: u32 = 200;
const COSTLY_YIELDS: u32 = 10;
/// Polls of shared memory between two polls of the endpoint.
const ENDPOINT_POLLS: u32 = 64;
/// Yields between two polls of the control messages.
const CONTROL_POLLS: u32 = 256;
/// How long a thread parks between polls, at first and when the wait is long.
const SHORT_PARK: Duration = Duration::from_micros(50);
const LONG_PARK: Duration = Duration::from_millis(1);

/// Most such absences that are discounted in one wait.
const ABSENCES: u32 = 4;

/// A wait for peers. Reading the clock costs as much as a small message, so it is read when a wait turns out long.
pub(super) struct Wait<'a> {
    world: &'a World,
    polls: u32,
    backoff: Backoff,
    since: Option<Instant>,
    /// Time of the last pause.
    last: Option<Instant>,
    /// Absences so far.
    absences: u32,
    /// Whether the world counts this wait.
    counted: bool,
    /// Whether a poll makes the endpoint progress.
    polls_endpoint: bool,
}

impl<'a> Wait<'a> {
    /// `hot` waits are for peers that are known to work on the same thing.
    pub fn new(world: &'a World, hot: bool) -> Self {
        let (most, yields) =
            if world.endpoint.info().wakes_on_arrival { (COSTLY_SPINS, COSTLY_YIELDS) } else { (SPINS, YIELDS) };
        let spins = match (world.oversubscribed, crate::comm::pending::in_background(), hot) {
            (true, _, _) => 0,
            // The core belongs to the thread that computes.
            (_, true, false) => 0,
            (_, true, true) => most / 10,
            _ => most,
        };
        Self {
            world,
            polls: 0,
            backoff: Backoff { spins, yields },
            since: None,
            last: None,
            absences: 0,
            counted: false,
            polls_endpoint: true,
        }
    }

    /// A wait for what others publish in shared memory: a poll is no more than a load.
    pub fn on_shared_memory(world: &'a World, hot: bool) -> Self {
        let wait = Self::new(world, hot);
        let backoff = Backoff { spins: wait.backoff.spins * CHEAP_POLL_FACTOR, ..wait.backoff };
        Self { backoff, polls_endpoint: false, ..wait }
    }

    /// To be called after a poll without success. Returns how long the wait has lasted, once that is worth reading the
    /// clock.
    pub fn pause(&mut self) -> Option<Duration> {
        self.polls = self.polls.saturating_add(1);
        if !self.polls_endpoint && self.polls.is_multiple_of(ENDPOINT_POLLS) {
            self.world.release_sent();
        }
        let pause = self.backoff.pause(self.polls - 1);
        if pause == Pause::Spin {
            std::hint::spin_loop();
            return None;
        }
        if !self.counted {
            self.counted = true;
            self.world.waiting.fetch_add(1, Ordering::Relaxed);
        }
        self.discount_absence();
        let past_spins = self.polls - self.backoff.spins;
        if past_spins.is_multiple_of(CONTROL_POLLS) || pause == Pause::Sleep {
            let failed = self.world.failure().is_some();
            match self.polls_endpoint {
                // The poll itself has made the endpoint progress.
                true => self.world.handle_control(),
                false => self.world.poll_control(),
            }
            if !failed && self.world.failure().is_some() {
                return self.since.map(|since| self.world.elapsed(since));
            }
        }
        match pause {
            Pause::Sleep if past_spins > 2 * self.backoff.yields => self.world.endpoint.park(LONG_PARK),
            Pause::Sleep => self.world.endpoint.park(SHORT_PARK),
            _ => self.world.endpoint.clock().yield_now(),
        }
        self.discount_absence();
        self.since.map(|since| self.world.elapsed(since))
    }

    /// Discounts the time in which this process was stopped: it must not blame the others. A thread that hardly runs at
    /// all is not excused for ever.
    fn discount_absence(&mut self) {
        let now = self.world.endpoint.now();
        let since = self.since.get_or_insert(now);
        let absence = self.last.replace(now).map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        if self.world.was_absent(absence) && self.absences < ABSENCES {
            self.absences += 1;
            *since += absence;
        }
    }

    /// There was progress: restarts the wait.
    pub fn restart(&mut self) {
        (self.polls, self.since, self.last) = (0, None, None);
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if self.counted {
            self.world.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Whether this machine runs more ranks than it has cores, as far as the launcher says.
pub(super) fn oversubscribed() -> bool {
    const VARIABLES: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE"];
    let ranks = VARIABLES.iter().find_map(|variable| std::env::var(variable).ok()?.parse::<usize>().ok());
    let cores = || cores_to_share().or_else(|| thread::available_parallelism().ok().map(Into::into)).unwrap_or(1);
    ranks.is_some_and(|ranks| ranks > cores())
}

/// The cores that the launcher has divided among the ranks, if it has bound this one to some of its own.
fn cores_to_share() -> Option<usize> {
    #[cfg(target_os = "linux")]
    {
        let cores_of = |process: libc::pid_t| {
            // SAFETY: a set of bits, for which zeros are a value; as large as is said.
            unsafe {
                let mut cores: libc::cpu_set_t = std::mem::zeroed();
                (libc::sched_getaffinity(process, size_of_val(&cores), &mut cores) == 0).then_some(cores)
            }
        };
        // SAFETY: always succeeds.
        let (own, launcher) = (cores_of(0)?, cores_of(unsafe { libc::getppid() })?);
        // SAFETY: counts bits.
        unsafe { (!libc::CPU_EQUAL(&own, &launcher)).then(|| libc::CPU_COUNT(&launcher) as usize) }
    }
    #[cfg(not(target_os = "linux"))]
    None
}
