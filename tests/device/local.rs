//! Ranks that are threads work on tensors where they are: on a GPU, or on what Vulkan offers in its place.

use std::panic::catch_unwind;

use burn::tensor::{DType, Device, DeviceKind, Int, Tensor, TensorData};
use burn_parallel::prelude::*;

use super::trials::{Trials, gpu};
use crate::transport_suite::device::{CHECKS, same, values};
use crate::transport_suite::device_failures::FAILURES;
use crate::transport_suite::over_threads;

pub fn add_to(trials: &mut Trials) {
    trials.add("messages_that_are_not_what_was_asked_for", messages_that_are_not_what_was_asked_for);
    trials.add("a_vector_can_be_received_from_a_device", a_vector_can_be_received_from_a_device);
    trials.add("ranks_with_devices_of_their_own", ranks_with_devices_of_their_own);
    trials.add("reductions_are_the_hosts_bit_for_bit", reductions_are_the_hosts_bit_for_bit);
    trials.add("more_ranks_than_a_kernel_reads_reduce_alike", more_ranks_than_a_kernel_reads_reduce_alike);
    for (name, check) in CHECKS {
        trials.add(name, move || {
            for size in [1, 2, 3, 4] {
                launch::threads(size).run(|rank| check(&rank, &gpu(), &DTYPES)).unwrap();
            }
        });
    }
    for (name, check) in FAILURES {
        trials.add(name, move || {
            for size in [2, 3, 4] {
                let ended = over_threads::run(size, |engine| check(&engine, &gpu()));
                assert!(ended.iter().all(Option::is_some), "a rank of {size} panicked; its message is above");
            }
        });
    }
}

/// What WGSL has.
const DTYPES: [DType; 3] = [DType::F32, DType::I32, DType::U32];

fn messages_that_are_not_what_was_asked_for() {
    let device = gpu();
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
    let device = gpu();
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
                let device = if rank.rank() == 1 { cpu.clone() } else { gpu() };
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

/// Values of every size, whose sums are rounded, so that another order or another dtype between would show.
fn uneven(rank: usize, elements: usize, dtype: DType, nans: bool) -> TensorData {
    let float = |i: usize| {
        let value = ((i * 7919 + rank * 104_729) % 2003) as f64 / 2003.0 - 0.5;
        let scale = [1.0, 37.0, 0.01][(i + rank) % 3];
        // A number of NaNs on every rank, on some elements of several ranks.
        if nans && (i * 31 + rank * 17).is_multiple_of(11) { f64::NAN } else { value * scale }
    };
    // Sums and products of these wrap around in the smaller types.
    let int = |i: usize| ((i * 7919 + rank * 104_729) % 251) as i64;
    match dtype.is_float() {
        true => TensorData::new((0..elements).map(float).collect(), [elements]).convert_dtype(dtype),
        false => TensorData::new((0..elements).map(int).collect(), [elements]).convert_dtype(dtype),
    }
}

fn reductions_are_the_hosts_bit_for_bit() {
    let all =
        [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::U32, DType::I64, DType::I16, DType::U8];
    let there: Vec<DType> = all.into_iter().filter(|dtype| gpu().supports_dtype(*dtype)).collect();
    println!("dtypes of the device: {there:?}");
    for size in 1..=8 {
        // Fewer elements than ranks, an odd number, and enough for shares that the ranks do not divide evenly.
        let lens: &[usize] = if [3, 8].contains(&size) { &[7, 1023, 16_391] } else { &[1, 1023] };
        launch::threads(size)
            .run(|rank| {
                for (dtype, len) in there.iter().flat_map(|dtype| lens.iter().map(move |len| (*dtype, *len))) {
                    match dtype.is_float() {
                        true => floats_are_alike(&rank, len, dtype)?,
                        false => integers_are_alike(&rank, len, dtype)?,
                    }
                }
                Ok(())
            })
            .unwrap();
    }
}

/// No kernel reads the tensors of more than 61 ranks: the partial result of the first goes to a second.
fn more_ranks_than_a_kernel_reads_reduce_alike() {
    let (here, there) = (Device::flex(), gpu());
    launch::threads(64)
        .threads_per_rank(1)
        .run(|rank| {
            let data = uneven(rank.rank(), 100, DType::F32, false);
            let on = |device: &Device| Tensor::<1>::from_data(data.clone(), (device, DType::F32));
            let [found, due] = [&there, &here].map(|device| rank.all_reduce(on(device), ReduceOp::Sum));
            assert_eq!(found?.into_data(), due?.into_data());
            Ok(())
        })
        .unwrap();
}

const EXACT: [ReduceOp; 4] = [ReduceOp::Sum, ReduceOp::Product, ReduceOp::Max, ReduceOp::Min];

fn floats_are_alike(rank: &Rank, len: usize, dtype: DType) -> Result<(), Error> {
    let (here, there) = (Device::flex(), gpu());
    let ops = EXACT.into_iter().chain([ReduceOp::Mean]).flat_map(|op| [(op, false), (op, true)]);
    for (op, nans) in ops {
        let what = format!("{op:?} of {len} {dtype:?} on {} ranks, NaNs: {nans}", rank.size());
        let on = |device: &Device| Tensor::<1>::from_data(uneven(rank.rank(), len, dtype, nans), (device, dtype));
        let alike = |found: Tensor<1>, due: Tensor<1>| {
            let values = |tensor: Tensor<1>| tensor.into_data().iter::<f64>().collect::<Vec<_>>();
            let (found, due) = (values(found), values(due));
            assert_eq!(found.len(), due.len(), "{what}");
            for (place, (found, due)) in found.iter().zip(&due).enumerate() {
                // But for what a NaN carries.
                let same = found.to_bits() == due.to_bits() || found.is_nan() && due.is_nan();
                assert!(same, "element {place} of {what}: {found} and {due}");
            }
        };
        alike(rank.all_reduce(on(&there), op)?, rank.all_reduce(on(&here), op)?);
        alike(rank.reduce_scatter(on(&there), op)?, rank.reduce_scatter(on(&here), op)?);
    }
    Ok(())
}

fn integers_are_alike(rank: &Rank, len: usize, dtype: DType) -> Result<(), Error> {
    let (here, there) = (Device::flex(), gpu());
    for op in EXACT {
        let data = || uneven(rank.rank(), len, dtype, false);
        let on = |device: &Device| Tensor::<1, Int>::from_data(data(), (device, dtype));
        let reduced = |device: &Device| Ok::<_, Error>(rank.all_reduce(on(device), op)?.into_data());
        assert_eq!(reduced(&there)?, reduced(&here)?, "{op:?} of {len} {dtype:?} on {} ranks", rank.size());
    }
    Ok(())
}
