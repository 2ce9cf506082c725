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
        trial("buffers_reduced_together", buffers_reduced_together),
        trial("messages_stay_on_the_device", messages_stay_on_the_device),
        trial("messages_that_are_not_what_was_asked_for", messages_that_are_not_what_was_asked_for),
        trial("a_message_is_its_receivers_own", a_message_is_its_receivers_own),
        trial("a_vector_can_be_received_from_a_device", a_vector_can_be_received_from_a_device),
        trial("ranks_with_devices_of_their_own", ranks_with_devices_of_their_own),
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

/// Several buffers, empty and scalar-like ones among them, in one call, with and without shares.
fn buffers_reduced_together() {
    let device = device();
    for size in [1, 2, 3, 4] {
        launch::threads(size)
            .run(|rank| {
                for last in [3, 30_011] {
                    let lens = [5, 0, 1, last];
                    let bring = |device: &Device| {
                        lens.map(|len| {
                            let data = TensorData::new(values(rank.rank() + len, len), [len]);
                            Tensor::<1>::from_data(data, device)
                        })
                        .to_vec()
                    };
                    let before = rank.counters();
                    let reduced = rank.all_reduce_coalesced(bring(&device), ReduceOp::Mean)?;
                    let since = rank.counters() - before;
                    assert_eq!(since.of("all_reduce").calls, 1);
                    let bytes = lens.iter().sum::<usize>() as u64 * 4;
                    assert_eq!(since.of("all_reduce").bytes, 2 * bytes * (size as u64 - 1) / size as u64);
                    let expected = rank.all_reduce_coalesced(bring(&Device::flex()), ReduceOp::Mean)?;
                    assert_eq!(reduced.len(), expected.len());
                    for (ours, expected) in reduced.into_iter().zip(expected) {
                        assert_eq!(ours.device(), device);
                        ours.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::default());
                    }
                }
                Ok(())
            })
            .unwrap();
    }
    // Cut in another way, it is another call.
    let error = launch::threads(2)
        .run(|rank| {
            let ones = |len| Tensor::<1>::ones([len], &device);
            let cut = if rank.rank() == 0 { 3 } else { 4 };
            rank.all_reduce_coalesced(vec![ones(cut), ones(10 - cut)], ReduceOp::Sum).map(drop)
        })
        .unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
}

/// Towards each other, to oneself, tags in another order than sent, of several kinds and ranks.
fn messages_stay_on_the_device() {
    let device = device();
    for size in [1, 2, 3, 4] {
        launch::threads(size)
            .run(|rank| {
                let (me, next, previous) = (rank.rank(), (rank.rank() + 1) % size, (rank.rank() + size - 1) % size);
                let of = |rank: usize| values(rank, 35);
                for round in 0..3 {
                    let mine = Tensor::<2>::from_data(TensorData::new(of(me), [5, 7]), &device);
                    // Not contiguous, and still to be computed when it is sent.
                    rank.send(mine.clone().transpose().mul_scalar(2.0), next, round)?;
                    rank.send(mine.clone(), next, 9)?;
                    rank.send(Tensor::<1, Int>::from_data([me as i32, 7], (&device, DType::I32)), next, 10)?;
                    rank.send(vec![me as u64], next, 9)?;
                    rank.send(mine.is_nan(), next, 11)?;

                    let nans: Tensor<2, Bool> = rank.recv(previous, 11)?;
                    assert_eq!(nans.device(), device);
                    assert!(nans.into_data().iter::<bool>().all(|nan| !nan));
                    let numbers: Tensor<1, Int> = rank.recv(previous, 10)?;
                    assert_eq!(numbers.into_data().convert::<i64>(), TensorData::from([previous as i64, 7]));
                    let sent: Tensor<2> = rank.recv(previous, 9)?;
                    assert_eq!((sent.device(), sent.dims()), (device.clone(), [5, 7]));
                    let turned: Tensor<2> = rank.start_recv(previous, round).wait()?;
                    assert_eq!((turned.device(), turned.dims()), (device.clone(), [7, 5]));
                    assert_eq!(sent.clone().into_data(), TensorData::new(of(previous), [5, 7]));
                    assert_eq!(turned.transpose().into_data(), sent.mul_scalar(2.0).into_data());
                    assert_eq!(rank.recv::<Vec<u64>>(previous, 9)?, [previous as u64]);
                }
                let counters = rank.counters();
                let bytes = 3 * (2 * 35 * 4 + 2 * 4 + 8) as u64;
                assert!(counters.of("send").bytes >= bytes && counters.of("send").calls == 15);
                assert_eq!(counters.of("recv").bytes, counters.of("send").bytes);
                Ok(())
            })
            .unwrap();
    }
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

/// The memory is handed over; what either side does with it afterwards is not seen by the other.
fn a_message_is_its_receivers_own() {
    let device = device();
    launch::threads(2)
        .run(|rank| {
            let other = 1 - rank.rank();
            let mine = Tensor::<1>::full([50_000], 1.0 + rank.rank() as f32, &device);
            rank.send(mine.clone(), other, 0)?;
            let kept = mine.add_scalar(10.0);
            let theirs: Tensor<1> = rank.recv(other, 0)?;
            let changed = theirs.clone().mul_scalar(3.0);
            rank.barrier()?;
            let all = |tensor: Tensor<1>, value: f32| tensor.into_data().iter::<f32>().all(|x| x == value);
            assert!(all(kept, 11.0 + rank.rank() as f32) && all(theirs, 1.0 + other as f32));
            assert!(all(changed, 3.0 * (1.0 + other as f32)));
            Ok(())
        })
        .unwrap();
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
                    let same = |ours: Tensor<1>, expected: Tensor<1>| {
                        assert_eq!(ours.device(), device);
                        ours.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::default());
                    };
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
