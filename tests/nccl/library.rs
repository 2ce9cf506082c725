//! NCCL: on a machine without it every rank is told so; on one with a GPU, what ranks do with device tensors is right.
//!
//! What needs a GPU is reported as ignored without one. With one, ranks share it where NCCL lets them (see
//! docs/gpu.md).

use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor};
use burn_parallel::comm::nccl;
use burn_parallel::prelude::*;
use libtest_mimic::Trial;

use crate::transport_suite::device::CHECKS;
use crate::transport_suite::device_failures::FAILURES;
use crate::transport_suite::{self, over_nccl};

pub fn trials() -> Vec<Trial> {
    let (missing, devices) = match nccl::library() {
        Ok(library) => (None, library.devices),
        Err(why) => (Some(why), 0),
    };
    if let Some(why) = &missing {
        println!("what needs a GPU is ignored: {why}");
    }
    let shares = std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some_and(|on| on != "0");
    let trial = |name: String, runs: bool, test: Box<dyn FnOnce() + Send>| {
        let test = move || {
            test();
            Ok(())
        };
        Trial::test(name, test).with_ignored_flag(!runs)
    };
    let here = missing.is_none();
    let mut trials = vec![
        trial(
            "what_is_missing_is_an_error_on_every_rank".into(),
            !here,
            Box::new(what_is_missing_is_an_error_on_every_rank),
        ),
        trial("a_device_that_does_not_exist".into(), here, Box::new(a_device_that_does_not_exist)),
        trial(
            "a_lost_rank_ends_what_the_device_waits_for".into(),
            here,
            Box::new(move || {
                a_lost_rank_ends_what_the_device_waits_for(devices, shares);
            }),
        ),
    ];
    for size in [1, 2, 4] {
        for (name, check) in CHECKS {
            let runs = here && (size <= devices || shares);
            let test = move || {
                let outcome = launch::threads(size).run(|rank| {
                    let gpu = rank.rank() % devices;
                    check(&nccl::join(&rank, gpu)?, &Device::cuda(gpu), &DTYPES)
                });
                outcome.unwrap();
            };
            trials.push(trial(format!("{size} ranks: {name}"), runs, Box::new(test)));
        }
        let runs = here && (size <= devices || shares);
        let whole = move |outcomes: Vec<Option<()>>| {
            assert!(outcomes.iter().all(Option::is_some), "a rank of {size} panicked; its message is above");
        };
        let suite = move || {
            whole(over_nccl::run(size, devices, |engine| {
                transport_suite::run(engine, &|_| ());
            }));
        };
        trials.push(trial(format!("{size} ranks: the suite of the host's data"), runs, Box::new(suite)));
        for (name, check) in FAILURES.into_iter().filter(|_| size > 1) {
            let test = move || {
                whole(over_nccl::run(size, devices, |engine| check(engine, &Device::cuda(engine.gpu))));
            };
            trials.push(trial(format!("{size} ranks: {name}"), runs, Box::new(test)));
        }
    }
    trials
}

const DTYPES: [DType; 8] =
    [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::I64, DType::U8, DType::U32];

/// And before anything is touched: no device is opened, nobody waits.
fn what_is_missing_is_an_error_on_every_rank() {
    let found = nccl::library().expect_err("only run where something is missing");
    assert!(matches!(found, Error::Gpu { .. }), "{found}");
    let began = Instant::now();
    for size in [1, 2, 3] {
        let outcomes = launch::threads(size).timeout(Duration::from_secs(20)).run(|rank| {
            let error = nccl::join(&rank, 0).map(drop).expect_err("nothing is there");
            // The communicator below goes on working.
            rank.barrier()?;
            Ok(error)
        });
        for error in outcomes.unwrap() {
            assert_eq!(error, found);
        }
    }
    assert!(began.elapsed() < Duration::from_secs(10), "no rank waited for NCCL");
}

fn a_device_that_does_not_exist() {
    let error = launch::threads(2).run(|rank| nccl::join(&rank, 999 * rank.rank()).map(drop)).unwrap_err();
    assert!(error.to_string().contains("999"), "{error}");
}

/// A message that nobody will send, and a rank that fails: whoever waits gets the error of the world, also where it
/// waits for the device.
fn a_lost_rank_ends_what_the_device_waits_for(devices: usize, shares: bool) {
    let size = if devices > 1 || shares { 2 } else { 1 };
    let began = Instant::now();
    let error = launch::threads(size)
        .timeout(Duration::from_secs(20))
        .run(|rank| {
            let gpu = rank.rank() % devices;
            let comm = nccl::join(&rank, gpu)?;
            let ones = Tensor::<1>::ones([1 << 20], &Device::cuda(gpu));
            comm.send(ones.clone(), 0, 1)?;
            if rank.rank() + 1 == size {
                return Err(Error::user("on purpose"));
            }
            let sum = comm.all_reduce(ones, ReduceOp::Sum)?;
            drop(sum.into_data());
            comm.recv::<Tensor<1>>(size - 1, 99).map(drop)
        })
        .unwrap_err();
    assert!(error.to_string().contains("on purpose"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(15), "somebody waited");
}
