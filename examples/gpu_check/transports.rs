//! The transport suite: what concerns tensors of devices over threads and over NCCL; the rest, which concerns the host's
//! data, over NCCL's communicator, which passes it on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use burn_parallel::comm::local::{self, WorldConfig};
use burn_parallel::comm::{Communicator, nccl};
use burn_parallel::prelude::*;

use crate::device::nccl_for;
use crate::report::{Figures, Shortfall};
use crate::section::Checks;
use crate::transport_suite::device::CHECKS;
use crate::transport_suite::{self, Engine};

pub fn run(checks: &mut Checks) {
    let (choice, dtypes) = (checks.device, checks.device.dtypes());
    for size in [1, 2, 4] {
        for (name, check) in CHECKS {
            checks.check(format!("threads, {size} ranks: {name}"), || {
                choice.open(0)?;
                let run = |rank: Rank| {
                    let device =
                        choice.open(rank.rank() % choice.count()).map_err(|why| Error::user(format!("{why:?}")))?;
                    check(&rank, &device, dtypes)
                };
                launch::threads(size).timeout(Duration::from_secs(60)).run(run)?;
                Ok(Vec::new())
            });
        }
    }
    for size in [1, 2, 4] {
        for (name, check) in CHECKS {
            checks.check(format!("NCCL, {size} ranks: {name}"), || {
                let gpus = nccl_for(choice, size)?;
                choice.open(0)?;
                launch::threads(size).timeout(Duration::from_secs(60)).run(|rank| {
                    let gpu = rank.rank() % gpus;
                    check(&nccl::join(&rank, gpu)?, &Device::cuda(gpu), dtypes)
                })?;
                Ok(Vec::new())
            });
        }
        checks.check(format!("NCCL, {size} ranks: the suite of the host's data, through NCCL's communicator"), || {
            let gpus = nccl_for(choice, size)?;
            host_suite(size, gpus)
        });
        checks.check(format!("NCCL, {size} ranks: a lost rank"), || {
            let gpus = nccl_for(choice, size)?;
            lost_rank(size, gpus)
        });
    }
}

/// Worlds by their number; each rank takes its place in each.
type Worlds = Arc<Mutex<HashMap<usize, Vec<Option<Communicator>>>>>;

/// Worlds of threads with NCCL on top.
struct OverThreads {
    rank: usize,
    size: usize,
    gpus: usize,
    made: Mutex<usize>,
    worlds: Worlds,
}

impl Engine for OverThreads {
    fn world(&self, timeout: Duration) -> Communicator {
        let mut made = self.made.lock().unwrap();
        *made += 1;
        let config = || WorldConfig::from_env().unwrap().with_timeout(timeout);
        let new = || local::world(self.size, config()).unwrap().into_iter().map(Some).collect();
        let host = self.worlds.lock().unwrap().entry(*made).or_insert_with(new)[self.rank].take().unwrap();
        nccl::join(&host, self.rank % self.gpus).unwrap()
    }
}

fn host_suite(size: usize, gpus: usize) -> Result<Figures, Shortfall> {
    let worlds = Worlds::default();
    let ranks: Vec<_> = (0..size)
        .map(|rank| {
            let engine = OverThreads { rank, size, gpus, made: Mutex::new(0), worlds: worlds.clone() };
            let tell = move |name: &str| {
                if rank == 0 {
                    println!("     {name}");
                }
            };
            thread::spawn(move || transport_suite::successes(&engine, &tell))
        })
        .collect();
    let outcomes: Vec<_> = ranks.into_iter().map(|rank| rank.join()).collect();
    match outcomes.iter().all(Result::is_ok) {
        true => Ok(Vec::new()),
        false => Err(Shortfall::Failed("a rank panicked; its message is above".into())),
    }
}

/// One rank fails while the others wait for a message of it, and the device for nothing that is left: all get its error.
fn lost_rank(size: usize, gpus: usize) -> Result<Figures, Shortfall> {
    let began = Instant::now();
    let outcome = launch::threads(size).timeout(Duration::from_secs(60)).run(|rank| {
        let gpu = rank.rank() % gpus;
        let comm = nccl::join(&rank, gpu)?;
        let ones = Tensor::<1>::ones([1 << 20], &Device::cuda(gpu));
        // Nobody will ask for it.
        comm.send(ones.clone(), 0, 1)?;
        let sum = comm.all_reduce(ones, ReduceOp::Sum)?;
        if rank.rank() + 1 == size {
            return Err(Error::user("on purpose"));
        }
        drop(sum.into_data());
        comm.recv::<Tensor<1>>(size - 1, 99).map(drop)
    });
    let elapsed = began.elapsed();
    match outcome {
        Err(error) if !error.to_string().contains("on purpose") => Err(error.into()),
        Ok(_) => Err(Shortfall::Failed("no rank got an error".into())),
        Err(_) if elapsed > Duration::from_secs(30) => Err(Shortfall::Failed(format!("it took {elapsed:.1?}"))),
        Err(_) => Ok(Vec::new()),
    }
}
