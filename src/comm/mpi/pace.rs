//! How a rank waits: hot at first, then giving way, then asleep.

use std::thread;
use std::time::{Duration, Instant};

use super::world::World;

/// Polls without giving way, when every rank has a core.
const SPINS: u32 = 5000;
/// Polls that give way to whoever wants the core.
const YIELDS: u32 = 2000;
/// A wait this long is worth looking for news of the world.
const NEWS: u32 = 256;
/// Sleeps between polls once a wait is long.
const NAP: Duration = Duration::from_micros(50);
const LONG_NAP: Duration = Duration::from_millis(1);

/// A wait for peers. Reading the clock costs as much as a small message, so it is read when a wait turns out long.
pub(super) struct Pace<'a> {
    world: &'a World,
    polls: u32,
    spins: u32,
    since: Option<Instant>,
}

impl<'a> Pace<'a> {
    /// `hot` waits are for peers that are known to be at work on the same thing.
    pub fn new(world: &'a World, hot: bool) -> Self {
        let spins = match (world.crowded, crate::comm::pending::in_background(), hot) {
            (true, _, _) => 0,
            // The core belongs to the thread that computes.
            (_, true, false) => 0,
            (_, true, true) => SPINS / 10,
            _ => SPINS,
        };
        Self { world, polls: 0, spins, since: None }
    }

    /// To be called after a poll in vain. Returns how long the wait has lasted, once that is worth a look.
    pub fn pause(&mut self) -> Option<Duration> {
        self.polls = self.polls.saturating_add(1);
        if self.polls <= self.spins {
            std::hint::spin_loop();
            return None;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        let past = self.polls - self.spins;
        if past <= YIELDS {
            thread::yield_now();
        } else {
            thread::sleep(if past > 2 * YIELDS { LONG_NAP } else { NAP });
        }
        if past.is_multiple_of(NEWS) || past > YIELDS {
            self.world.attend();
        }
        Some(since.elapsed())
    }

    /// Something has happened: the wait begins anew.
    pub fn again(&mut self) {
        (self.polls, self.since) = (0, None);
    }
}
