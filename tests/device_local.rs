//! Ranks that are threads reduce tensors where they are: on a GPU, or on what Vulkan offers in its place.
//!
//! Without any such device the tests are reported as ignored.

use std::panic::catch_unwind;

use burn::tensor::{Bool, DType, Device, DeviceKind, Int, Tensor, TensorData, Tolerance};
use burn_parallel::prelude::*;
use libtest_mimic::{Arguments, Trial};

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
    let trials = vec![
        trial("collectives_agree_with_those_on_the_host", collectives_agree_with_those_on_the_host),
        trial("integers_and_bools", integers_and_bools),
        trial("unequal_rows_are_gathered", unequal_rows_are_gathered),
        trial("a_tensor_on_the_host_does_not_meet_one_on_a_device", a_tensor_on_the_host_does_not_meet_one_on_a_device),
        trial("a_long_chain_on_many_ranks_keeps_its_order", a_long_chain_on_many_ranks_keeps_its_order),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn device() -> Device {
    Device::wgpu(DeviceKind::DefaultDevice)
}

fn values(rank: usize, elements: usize) -> Vec<f32> {
    (0..elements).map(|i| ((i * 7919 + rank * 104_729) % 1009) as f32 / 64.0 - 7.5).collect()
}

fn collectives_agree_with_those_on_the_host() {
    let device = device();
    for size in [1, 2, 3, 4] {
        launch::threads(size)
            .run(|rank| {
                // Fewer rows than ranks, rows that the ranks do not divide, and enough for shares.
                for (rows, width) in [(1, 3), (5, 4), (64, 1), (37, 900)] {
                    let data = TensorData::new(values(rank.rank(), rows * width), [rows, width]);
                    let host = || Tensor::<2>::from_data(data.clone(), &Device::flex());
                    let there = || Tensor::<2>::from_data(data.clone(), &device);
                    let same = |ours: Tensor<2>, expected: Tensor<2>| {
                        assert_eq!(ours.device(), device);
                        ours.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::default());
                    };
                    let product_free =
                        [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Max, ReduceOp::Min, ReduceOp::PreMulSum(0.5)];
                    for op in product_free {
                        same(rank.all_reduce(there(), op)?, rank.all_reduce(host(), op)?);
                        same(rank.reduce_scatter(there(), op)?, rank.reduce_scatter(host(), op)?);
                    }
                    same(rank.all_gather(there())?, rank.all_gather(host())?);
                    same(rank.all_to_all(there())?, rank.all_to_all(host())?);
                    for root in 0..size {
                        same(rank.broadcast(there(), root)?, rank.broadcast(host(), root)?);
                        match (rank.gather(there(), root)?, rank.gather(host(), root)?) {
                            (Some(ours), Some(expected)) => same(ours, expected),
                            (ours, expected) => assert!(ours.is_none() && expected.is_none()),
                        }
                    }
                }
                Ok(())
            })
            .unwrap();
    }
}

fn integers_and_bools() {
    let device = device();
    launch::threads(3)
        .run(|rank| {
            let mine = rank.rank() as i32;
            let counts = Tensor::<1, Int>::from_data([mine, 2 - mine, 5], (&device, DType::I32));
            let sum = rank.all_reduce(counts.clone(), ReduceOp::Sum)?;
            assert_eq!(sum.into_data().convert::<i64>(), TensorData::from([3i64, 3, 15]));
            let most = rank.all_reduce(counts, ReduceOp::Max)?;
            assert_eq!(most.into_data().convert::<i64>(), TensorData::from([2i64, 2, 5]));
            let seen = Tensor::<1, Bool>::from_data([mine == 0, true, mine == 7], &device);
            let any = rank.all_reduce(seen.clone(), ReduceOp::Max)?.into_data();
            assert_eq!(any.iter::<bool>().collect::<Vec<_>>(), [true, true, false]);
            let all = rank.all_reduce(seen, ReduceOp::Min)?.into_data();
            assert_eq!(all.iter::<bool>().collect::<Vec<_>>(), [false, true, false]);
            Ok(())
        })
        .unwrap();
}

fn unequal_rows_are_gathered() {
    let device = device();
    launch::threads(3)
        .run(|rank| {
            let rows = rank.rank() + 1;
            let mine = Tensor::<2>::full([rows, 2], rank.rank() as f32, &device);
            let all = rank.all_gather(mine)?;
            assert_eq!(all.dims(), [6, 2]);
            let firsts: Vec<f32> = all.into_data().iter::<f32>().step_by(2).collect();
            assert_eq!(firsts, [0.0, 1.0, 1.0, 2.0, 2.0, 2.0]);
            Ok(())
        })
        .unwrap();
}

fn a_tensor_on_the_host_does_not_meet_one_on_a_device() {
    let device = device();
    let error = launch::threads(2)
        .run(|rank| {
            let device = if rank.rank() == 0 { Device::flex() } else { device.clone() };
            rank.all_reduce(Tensor::<1>::ones([4], &device), ReduceOp::Sum)
        })
        .unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    assert!(error.to_string().contains("on its device"), "{error}");
}

fn a_long_chain_on_many_ranks_keeps_its_order() {
    let device = device();
    let outcomes = launch::threads(4)
        .run(|rank| {
            let mut x = Tensor::<1>::full([40_000], 1.0 + rank.rank() as f32, &device);
            for step in 0..10 {
                // What burn has enqueued before is in it, what comes after sees it.
                x = rank.all_reduce(x.add_scalar(step as f32), ReduceOp::Mean)?.mul_scalar(0.5);
            }
            Ok(x.into_data())
        })
        .unwrap();
    let mut expected = 2.5;
    for step in 0..10 {
        expected = (expected + step as f32) * 0.5;
    }
    for outcome in outcomes {
        outcome.assert_approx_eq::<f32>(&TensorData::from(vec![expected; 40_000].as_slice()), Tolerance::default());
    }
}
