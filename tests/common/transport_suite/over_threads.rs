//! Worlds of threads of this process, without a launcher.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use burn_parallel::comm::Communicator;
use burn_parallel::comm::{WorldConfig, local};

use super::WorldFactory;

/// Worlds by their number; each rank takes its place in each.
type Worlds = Arc<Mutex<HashMap<usize, Vec<Option<Communicator>>>>>;

/// Makes a world of so many ranks with this time-out: a communicator for each.
type Make = fn(usize, Duration) -> Vec<Communicator>;

/// One rank's way to them.
pub struct OverThreads {
    pub rank: usize,
    pub size: usize,
    make: Make,
    made: Mutex<usize>,
    worlds: Worlds,
}

impl WorldFactory for OverThreads {
    fn world(&self, timeout: Duration) -> Communicator {
        let mut made = self.made.lock().unwrap();
        *made += 1;
        let new = || (self.make)(self.size, timeout).into_iter().map(Some).collect();
        self.worlds.lock().unwrap().entry(*made).or_insert_with(new)[self.rank].take().unwrap()
    }
}

/// Runs `body` on `size` ranks, over the transport between threads. `None` for those that panicked.
pub fn run<R: Send>(size: usize, body: impl Fn(OverThreads) -> R + Sync) -> Vec<Option<R>> {
    let make = |size, timeout| local::world(size, WorldConfig::from_env().unwrap().with_timeout(timeout)).unwrap();
    run_with(size, make, body)
}

/// [`run`] over another transport between threads, whose worlds `make` makes.
pub fn run_with<R: Send>(size: usize, make: Make, body: impl Fn(OverThreads) -> R + Sync) -> Vec<Option<R>> {
    let (worlds, body) = (Worlds::default(), &body);
    thread::scope(|scope| {
        let rank = |rank| {
            let factory = OverThreads { rank, size, make, made: Mutex::new(0), worlds: worlds.clone() };
            scope.spawn(move || body(factory))
        };
        let ranks: Vec<_> = (0..size).map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().ok()).collect()
    })
}
