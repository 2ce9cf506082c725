//! NCCL: on a machine without it every rank is told so; on one with a GPU, collectives on device tensors are right.
//!
//! What needs a GPU is reported as ignored without one.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Int, Tensor};
use burn_parallel::comm::nccl;
use burn_parallel::prelude::*;
use libtest_mimic::{Arguments, Trial};

fn main() {
    let (missing, devices) = match nccl::library() {
        Ok(library) => (None, library.devices),
        Err(why) => (Some(why), 0),
    };
    if let Some(why) = &missing {
        println!("what needs a GPU is ignored: {why}");
    }
    let shares = devices > 1 || std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some_and(|on| on != "0");
    let trial = |name: &str, runs: bool, test: fn()| {
        let test = move || {
            test();
            Ok(())
        };
        Trial::test(name, test).with_ignored_flag(!runs)
    };
    let here = missing.is_none();
    let trials = vec![
        trial("what_is_missing_is_an_error_on_every_rank", !here, what_is_missing_is_an_error_on_every_rank),
        trial("a_device_that_does_not_exist", here, a_device_that_does_not_exist),
        trial("one_rank_gets_what_it_brings", here, one_rank_gets_what_it_brings),
        trial("ranks_agree_with_the_host", here && shares, ranks_agree_with_the_host),
    ];
    // NCCL takes one test at a time.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials).exit();
}

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

fn one_rank_gets_what_it_brings() {
    launch::threads(1)
        .run(|rank| {
            let comm = nccl::join(&rank, 0)?;
            let device = Device::cuda(0);
            let x = Tensor::<2>::from_data([[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.0]], &device);
            let expected = x.clone().into_data();
            for op in [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Max, ReduceOp::Min, ReduceOp::Product] {
                assert_eq!(comm.all_reduce(x.clone(), op)?.into_data(), expected);
                assert_eq!(comm.reduce_scatter(x.clone(), op)?.into_data(), expected);
            }
            let halved = comm.all_reduce(x.clone(), ReduceOp::PreMulSum(0.5))?;
            assert_eq!(halved.into_data(), x.clone().mul_scalar(0.5).into_data());
            assert_eq!(comm.all_gather(x.clone())?.into_data(), expected);
            assert_eq!(comm.broadcast(x.clone(), 0)?.into_data(), expected);
            assert_eq!(comm.all_to_all(x.clone())?.into_data(), expected);
            assert_eq!(comm.gather(x.clone(), 0)?.map(Tensor::into_data), Some(expected.clone()));
            let counts = Tensor::<1, Int>::from_data([1, 2, 3], &device);
            assert_eq!(comm.all_reduce(counts.clone(), ReduceOp::Sum)?.into_data(), counts.into_data());
            // What follows on burn's stream sees the result, and what went before is in it.
            let y = comm.start(move |comm| comm.all_reduce(x.exp(), ReduceOp::Sum)).wait()?.log();
            y.into_data().assert_approx_eq::<f32>(&expected, Default::default());
            let part = comm.split(0, 0)?;
            assert_eq!(part.all_reduce(counts_of(&device), ReduceOp::Max)?.into_data(), counts_of(&device).into_data());
            Ok(())
        })
        .unwrap();
}

fn counts_of(device: &Device) -> Tensor<1, Int> {
    Tensor::from_data([7, 8], device)
}

fn ranks_agree_with_the_host() {
    let devices = nccl::library().expect("only run where there is a GPU").devices;
    for size in [2, 4] {
        launch::threads(size)
            .run(|rank| {
                let gpu = rank.rank() % devices;
                let comm = nccl::join(&rank, gpu)?;
                for rows in [1, 3, 4, 7, 64] {
                    let values: Vec<f32> = (0..rows * 5).map(|i| (i * (rank.rank() + 1)) as f32).collect();
                    let host = Tensor::<1>::from_data(values.as_slice(), &Device::flex()).reshape([rows, 5]);
                    let there = Tensor::<2>::from_data(host.to_data(), &Device::cuda(gpu));
                    let same =
                        |ours: Tensor<2>, expected: Tensor<2>| assert_eq!(ours.into_data(), expected.into_data());
                    same(comm.all_reduce(there.clone(), ReduceOp::Sum)?, rank.all_reduce(host.clone(), ReduceOp::Sum)?);
                    same(
                        comm.reduce_scatter(there.clone(), ReduceOp::Max)?,
                        rank.reduce_scatter(host.clone(), ReduceOp::Max)?,
                    );
                    same(comm.all_gather(there.clone())?, rank.all_gather(host.clone())?);
                    same(comm.all_to_all(there.clone())?, rank.all_to_all(host.clone())?);
                    same(comm.broadcast(there, size - 1)?, rank.broadcast(host, size - 1)?);
                }
                Ok(())
            })
            .unwrap();
    }
}
