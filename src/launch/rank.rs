//! A rank of a world: its communicator, device, threads and random numbers.

use std::ops::Deref;

use burn::tensor::Device;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::comm::Communicator;

/// One worker: its place in the world, its device, its share of the cores and its seed.
///
/// Dereferences to the [`Communicator`] of the world.
#[derive(Debug, Clone)]
pub struct Rank {
    world: Communicator,
    device: Device,
    threads: usize,
    seed: u64,
}

impl Rank {
    pub(super) fn new(world: Communicator, device: Device, threads: usize, seed: u64) -> Self {
        Self { world, device, threads, seed }
    }

    /// The communicator of all ranks.
    pub fn world(&self) -> &Communicator {
        &self.world
    }

    /// The device this rank computes on, without autodiff: `rank.device().autodiff()` trains.
    pub fn device(&self) -> Device {
        self.device.clone()
    }

    /// Threads that compute for this rank.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The seed of the run, the same on every rank.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Random numbers of this rank alone: one stream of the run's seed per rank, the same in every run with that seed.
    ///
    /// Use it for what shall differ between ranks. burn's own random tensors (`Distribution`, `Dropout`) come from one
    /// generator per process and device, which ranks that are threads share: what each of them draws there depends on
    /// who comes first, whatever the seed.
    pub fn rng(&self) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(self.world.rank() as u64 + 1);
        rng
    }

    /// `[rank 1/4]`, to put before what this rank prints.
    pub fn prefix(&self) -> String {
        format!("[rank {}/{}]", self.world.rank(), self.world.size())
    }
}

impl Deref for Rank {
    type Target = Communicator;

    fn deref(&self) -> &Communicator {
        &self.world
    }
}
