//! Worlds of threads, each rank with NCCL on top of its communicator.

use std::time::Duration;

use burn_parallel::comm::{Communicator, nccl};

use super::over_threads::{self, OverThreads};
use super::{Engine, failures};

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

impl Engine for OverNccl {
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

/// Panics that belong to the suite say nothing.
pub fn hide_panics_on_purpose() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let said = info.payload().downcast_ref::<String>().map_or("", String::as_str);
        if !said.contains(failures::PURPOSE) {
            usual(info);
        }
    }));
}
