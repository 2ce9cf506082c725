//! Worlds of threads, each rank with NCCL on top of its communicator.

use std::time::Duration;

use burn_parallel::comm::{Communicator, nccl};

use super::WorldFactory;
use super::over_threads::{self, OverThreads};

/// One rank's way to them.
pub struct OverNccl {
    threads: OverThreads,
    /// Number of its GPU.
    pub gpu: usize,
}

impl OverNccl {
    pub fn is_first(&self) -> bool {
        self.threads.rank == 0
    }
}

impl WorldFactory for OverNccl {
    fn world(&self, timeout: Duration) -> Communicator {
        nccl::join(&self.threads.world(timeout), self.gpu).unwrap()
    }

    fn calls(&self) -> u64 {
        6
    }

    fn calls_of_part(&self) -> u64 {
        2
    }
}

/// Runs `body` on `size` ranks that take the GPUs in turns. `None` for those that panicked.
pub fn run<R: Send>(size: usize, gpus: usize, body: impl Fn(&OverNccl) -> R + Sync) -> Vec<Option<R>> {
    over_threads::run(size, |threads| {
        let gpu = threads.rank % gpus;
        body(&OverNccl { threads, gpu })
    })
}
