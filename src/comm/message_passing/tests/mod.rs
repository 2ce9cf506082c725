//! Tests with malformed messages, short memory, and an endpoint that fails halfway.

mod dropped_groups;
mod failing_endpoint;
mod malformed_messages;
mod memory_endpoint;
mod out_of_memory;
mod step_parts;

use std::sync::Arc;
use std::time::Duration;

use self::memory_endpoint::{MemoryEndpoint, MemoryNetwork};
use super::Worlds;
use crate::comm::Communicator;
use crate::comm::WorldConfig;

/// A world of ranks in this process, over endpoints in memory; only of the listed ranks, the test plays the others.
struct TestWorld {
    network: Arc<MemoryNetwork>,
    comms: Vec<Communicator>,
    worlds: Vec<Worlds>,
}

impl TestWorld {
    fn new(size: usize, ranks: impl IntoIterator<Item = usize>, network: MemoryNetwork) -> Self {
        let (network, mut comms, mut worlds) = (Arc::new(network), Vec::new(), Vec::new());
        for rank in ranks {
            let world = Worlds::new();
            let config = WorldConfig::from_env().unwrap().with_timeout(Duration::from_secs(20));
            comms.push(world.create(Box::new(MemoryEndpoint::new(rank, size, &network)), config).unwrap());
            worlds.push(world);
        }
        Self { network, comms, worlds }
    }

    /// Runs this on all ranks. Returns what each returned.
    fn run<R: Send>(&self, f: impl Fn(&Communicator) -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = self.comms.iter().map(|comm| scope.spawn(|| f(comm))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }
}

impl Drop for TestWorld {
    fn drop(&mut self) {
        self.comms.clear();
        self.network.lose_all();
        self.worlds.iter().for_each(|world| {
            world.end();
        });
    }
}
