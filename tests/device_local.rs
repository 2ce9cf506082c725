//! Ranks that are threads work on tensors where they are: on a GPU, or on what Vulkan offers in its place.
//!
//! Without any such device the tests are reported as ignored.

mod transport_suite;

use std::panic::catch_unwind;

use burn::tensor::{DType, Device, DeviceKind, Tensor, TensorData};
use burn_parallel::prelude::*;
use libtest_mimic::{Arguments, Trial};
use transport_suite::device::{CHECKS, same, values};
use transport_suite::device_failures::FAILURES;
use transport_suite::over_threads;

fn main() {
    // burn panics where there is no device.
    let found = catch_unwind(|| Tensor::<1>::ones([1], &device()).into_data()).is_ok();
    let trial = |name: &str, test: fn()| {
        let test = move || {
            test();
            Ok(())
        };
        Trial::test(name, test).with_ignored_flag(!found)
    };
    let mut trials = vec![
        trial("messages_that_are_not_what_was_asked_for", messages_that_are_not_what_was_asked_for),
        trial("a_vector_can_be_received_from_a_device", a_vector_can_be_received_from_a_device),
        trial("ranks_with_devices_of_their_own", ranks_with_devices_of_their_own),
    ];
    for (name, check) in CHECKS {
        let test = move || {
            for size in [1, 2, 3, 4] {
                launch::threads(size).run(|rank| check(&rank, &device(), &DTYPES)).unwrap();
            }
            Ok(())
        };
        trials.push(Trial::test(name, test).with_ignored_flag(!found));
    }
    for (name, check) in FAILURES {
        let test = move || {
            for size in [2, 3, 4] {
                let ended = over_threads::run(size, |engine| check(&engine, &device()));
                assert!(ended.iter().all(Option::is_some), "a rank of {size} panicked; its message is above");
            }
            Ok(())
        };
        trials.push(Trial::test(name, test).with_ignored_flag(!found));
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// What WGSL has.
const DTYPES: [DType; 3] = [DType::F32, DType::I32, DType::U32];

fn device() -> Device {
    Device::wgpu(DeviceKind::DefaultDevice)
}

fn messages_that_are_not_what_was_asked_for() {
    let device = device();
    let error = launch::threads(2)
        .run(|rank| {
            if rank.rank() == 1 {
                rank.send(Tensor::<2>::ones([3, 5], &device), 0, 4)?;
                return rank.barrier();
            }
            rank.recv::<Tensor<3>>(1, 4).map(drop)
        })
        .unwrap_err();
    assert!(matches!(error, Error::UnexpectedMessage { from: 1, to: 0, tag: 4, .. }), "{error}");
    assert!(error.to_string().contains("F32 [3, 5]"), "{error}");
}

fn a_vector_can_be_received_from_a_device() {
    let device = device();
    launch::threads(2)
        .run(|rank| {
            let other = 1 - rank.rank();
            rank.send(Tensor::<2>::ones([2, 2], &device).mul_scalar(rank.rank() as f32), other, 0)?;
            assert_eq!(rank.recv::<Vec<f32>>(other, 0)?, [other as f32; 4]);
            // The other way round: what was in host memory is put on the device that is asked for.
            rank.send(vec![rank.rank() as f32; 3], other, 1)?;
            let there: Tensor<1> = rank.recv_on(&device, other, 1)?;
            assert_eq!((there.device(), there.into_data()), (device.clone(), TensorData::from([other as f32; 3])));
            Ok(())
        })
        .unwrap();
}

/// Ranks whose tensors are on different devices, as far as burn knows: the same software device under two names.
fn ranks_with_devices_of_their_own() {
    let cpu = Device::wgpu(DeviceKind::Cpu);
    if catch_unwind(|| Tensor::<1>::ones([1], &cpu).into_data()).is_err() {
        println!("there is no second device: ranks_with_devices_of_their_own was skipped");
        return;
    }
    for size in [2, 3] {
        launch::threads(size)
            .run(|rank| {
                let device = if rank.rank() == 1 { cpu.clone() } else { device() };
                for len in [5, 40_000] {
                    let data = TensorData::new(values(rank.rank(), len), [len]);
                    let there = || Tensor::<1>::from_data(data.clone(), &device);
                    let host = || Tensor::<1>::from_data(data.clone(), &Device::flex());
                    let same = |ours: Tensor<1>, expected: Tensor<1>| same(ours, expected, &device);
                    same(rank.all_reduce(there(), ReduceOp::Sum)?, rank.all_reduce(host(), ReduceOp::Sum)?);
                    same(rank.all_gather(there())?, rank.all_gather(host())?);
                    same(rank.broadcast(there(), 1)?, rank.broadcast(host(), 1)?);
                    let next = (rank.rank() + 1) % size;
                    let previous = (rank.rank() + size - 1) % size;
                    rank.send(there(), next, 0)?;
                    rank.send(host(), next, 1)?;
                    same(rank.recv_on(&device, previous, 0)?, rank.recv(previous, 1)?);
                }
                Ok(())
            })
            .unwrap();
    }
}
