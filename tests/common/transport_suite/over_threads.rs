//! Worlds of threads of this process, without a launcher.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use burn_parallel::comm::Communicator;
use burn_parallel::comm::local::{self, WorldConfig};

use super::Engine;

/// Worlds by their number; each rank takes its place in each.
type Worlds = Arc<Mutex<HashMap<usize, Vec<Option<Communicator>>>>>;

/// One rank's way to them.
pub struct OverThreads {
    pub rank: usize,
    pub size: usize,
    made: Mutex<usize>,
    worlds: Worlds,
}

impl Engine for OverThreads {
    fn world(&self, timeout: Duration) -> Communicator {
        let mut made = self.made.lock().unwrap();
        *made += 1;
        let config = || WorldConfig::from_env().unwrap().with_timeout(timeout);
        let new = || local::world(self.size, config()).unwrap().into_iter().map(Some).collect();
        self.worlds.lock().unwrap().entry(*made).or_insert_with(new)[self.rank].take().unwrap()
    }
}

/// Runs `body` on `size` ranks. `None` for those that panicked.
pub fn run<R: Send>(size: usize, body: impl Fn(OverThreads) -> R + Sync) -> Vec<Option<R>> {
    let (worlds, body) = (Worlds::default(), &body);
    thread::scope(|scope| {
        let rank = |rank| {
            let engine = OverThreads { rank, size, made: Mutex::new(0), worlds: worlds.clone() };
            scope.spawn(move || body(engine))
        };
        let ranks: Vec<_> = (0..size).map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().ok()).collect()
    })
}
