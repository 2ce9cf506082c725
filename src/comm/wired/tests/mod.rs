//! What ranks do when a peer lies, memory is short, or the wire fails halfway.

mod broken;
mod forged;
mod line;
mod short;

use std::sync::Arc;
use std::time::Duration;

use self::line::{Line, Lines};
use super::Worlds;
use crate::comm::Communicator;
use crate::comm::local::WorldConfig;

/// A world of ranks in this process, over a wire in memory; of those that are listed, the others being left to the test.
struct World {
    lines: Arc<Lines>,
    comms: Vec<Communicator>,
    worlds: Vec<Worlds>,
}

impl World {
    fn new(size: usize, ranks: impl IntoIterator<Item = usize>, lines: Lines) -> Self {
        let (lines, mut comms, mut worlds) = (Arc::new(lines), Vec::new(), Vec::new());
        for rank in ranks {
            let world = Worlds::new();
            let config = WorldConfig::from_env().unwrap().with_timeout(Duration::from_secs(20));
            comms.push(world.found(Box::new(Line::new(rank, size, &lines)), config).unwrap());
            worlds.push(world);
        }
        Self { lines, comms, worlds }
    }

    /// Runs this on all ranks. Returns what each returned.
    fn run<R: Send>(&self, f: impl Fn(&Communicator) -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = self.comms.iter().map(|comm| scope.spawn(|| f(comm))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.comms.clear();
        self.lines.lose_all();
        self.worlds.iter().for_each(|world| {
            world.end();
        });
    }
}
