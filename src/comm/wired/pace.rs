//! How a rank waits: hot at first, then giving way, then asleep.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::world::World;

/// Polls without giving way, when every rank has a core.
const SPINS: u32 = 5000;
/// Looks at a board that take as long as a poll of the wire.
const LOOKS: u32 = 4;
/// Polls that give way to whoever wants the core.
const YIELDS: u32 = 2000;
/// The same where a poll is a system call, and a rest ends as soon as there is news.
const COSTLY_SPINS: u32 = 200;
const COSTLY_YIELDS: u32 = 10;
/// Polls of a board, which leave the wire alone, after which it is to be looked after.
const WIRE: u32 = 64;
/// A wait this long is worth looking for news of the world.
const NEWS: u32 = 256;
/// Sleeps between polls once a wait is long.
const NAP: Duration = Duration::from_micros(50);
const LONG_NAP: Duration = Duration::from_millis(1);

/// A thread that has not run for so long was stopped.
const ABSENCE: Duration = Duration::from_secs(1);
/// So many times at most in one wait.
const ABSENCES: u32 = 4;

/// A wait for peers. Reading the clock costs as much as a small message, so it is read when a wait turns out long.
pub(super) struct Pace<'a> {
    world: &'a World,
    polls: u32,
    spins: u32,
    yields: u32,
    since: Option<Instant>,
    /// When it was paused last.
    last: Option<Instant>,
    /// Times that this thread has not run for long.
    absences: u32,
    /// Whether the world knows of this wait.
    counted: bool,
    /// Whether the polls let the wire work.
    drives: bool,
}

impl<'a> Pace<'a> {
    /// `hot` waits are for peers that are known to be at work on the same thing.
    pub fn new(world: &'a World, hot: bool) -> Self {
        let (most, yields) = if world.wire.wakes() { (COSTLY_SPINS, COSTLY_YIELDS) } else { (SPINS, YIELDS) };
        let spins = match (world.crowded, crate::comm::pending::in_background(), hot) {
            (true, _, _) => 0,
            // The core belongs to the thread that computes.
            (_, true, false) => 0,
            (_, true, true) => most / 10,
            _ => most,
        };
        Self { world, polls: 0, spins, yields, since: None, last: None, absences: 0, counted: false, drives: true }
    }

    /// A wait for what others show on a board: a poll is no more than a look.
    pub fn at_board(world: &'a World, hot: bool) -> Self {
        let pace = Self::new(world, hot);
        Self { spins: pace.spins * LOOKS, drives: false, ..pace }
    }

    /// To be called after a poll in vain. Returns how long the wait has lasted, once that is worth a look.
    pub fn pause(&mut self) -> Option<Duration> {
        self.polls = self.polls.saturating_add(1);
        if !self.drives && self.polls.is_multiple_of(WIRE) {
            self.world.clear();
        }
        if self.polls <= self.spins {
            std::hint::spin_loop();
            return None;
        }
        if !self.counted {
            self.counted = true;
            self.world.waiting.fetch_add(1, Ordering::Relaxed);
        }
        self.excuse();
        let past = self.polls - self.spins;
        if past <= self.yields {
            self.world.wire.give_way();
        } else {
            self.world.wire.rest(if past > 2 * self.yields { LONG_NAP } else { NAP });
        }
        if past.is_multiple_of(NEWS) || past > self.yields {
            self.world.attend();
        }
        self.since.map(|since| self.world.elapsed(since))
    }

    /// A process that was stopped has not waited meanwhile: it must not blame the others. A thread that hardly runs at all
    /// is not excused for ever.
    fn excuse(&mut self) {
        let now = self.world.wire.now();
        let since = self.since.get_or_insert(now);
        let absence = self.last.replace(now).map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        if absence > self.world.within(ABSENCE) && self.absences < ABSENCES {
            self.absences += 1;
            *since += absence;
        }
    }

    /// Something has happened: the wait begins anew.
    pub fn again(&mut self) {
        (self.polls, self.since, self.last) = (0, None, None);
    }
}

impl Drop for Pace<'_> {
    fn drop(&mut self) {
        if self.counted {
            self.world.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Whether this machine runs more ranks than it has cores, as far as the launcher says.
pub(super) fn crowded() -> bool {
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
