//! The transport suite: what concerns tensors of devices over threads and over NCCL; the rest, which concerns the
//! host's data, over NCCL's communicator, which passes it on.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use burn_parallel::comm::nccl;
use burn_parallel::prelude::*;

use crate::common::failing::hide_panics_on_purpose;
use crate::device::{Choice, nccl_for};
use crate::report::{Figures, Shortfall};
use crate::section::Checks;
use crate::transport_suite;
use crate::transport_suite::device::CHECKS;
use crate::transport_suite::device_failures::FAILURES;
use crate::transport_suite::{over_nccl, over_threads};

pub fn run(checks: &mut Checks) {
    let (choice, dtypes) = (checks.device, checks.device.dtypes());
    hide_panics_on_purpose();
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
    for size in [2, 4] {
        for (name, check) in FAILURES {
            checks.check(format!("threads, {size} ranks: {name}"), || {
                if choice == Choice::Flex {
                    return Err(Shortfall::Skipped("tensors of Flex are the host's".into()));
                }
                choice.open(0)?;
                let device = |rank: usize| choice.open(rank % choice.count()).unwrap_or_else(|_| Device::flex());
                passed(over_threads::run(size, |factory| check(&factory, &device(factory.rank))))
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
        for (name, check) in FAILURES.iter().filter(|_| size > 1) {
            checks.check(format!("NCCL, {size} ranks: {name}"), || {
                let gpus = nccl_for(choice, size)?;
                choice.open(0)?;
                passed(over_nccl::run(size, gpus, |factory| check(factory, &Device::cuda(factory.gpu))))
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

fn host_suite(size: usize, gpus: usize) -> Result<Figures, Shortfall> {
    passed(over_nccl::run(size, gpus, |factory| {
        let first = factory.is_first();
        transport_suite::run(factory, &|name| {
            if first {
                println!("     {name}");
            }
        })
    }))
}

fn passed<R>(ranks: Vec<Option<R>>) -> Result<Figures, Shortfall> {
    match ranks.iter().all(Option::is_some) {
        true => Ok(Vec::new()),
        false => Err(Shortfall::Failed("a rank panicked; its message is above".into())),
    }
}

/// One rank fails while the others wait for a message of it, and the device for nothing that is left: all get its
/// error.
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
