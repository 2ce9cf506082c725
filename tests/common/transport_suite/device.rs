//! What must hold over any transport that carries tensors of devices, for any number of ranks: the same as on the host.
//!
//! Values are small integers, so that sums are exact in every dtype and in any order of the ranks.

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, Tolerance};
use burn_parallel::comm::{Communicator, ReduceOp};
use burn_parallel::{Error, layout};

use super::checks::cancelling;

/// A check that every rank runs, on its own device, with the dtypes that the device and the transport have.
type Check = fn(&Communicator, &Device, &[DType]) -> Result<(), Error>;

/// All of them.
pub const CHECKS: [(&str, Check); 11] = [
    ("collectives agree with the host's", collectives),
    ("reductions mean what they mean on the host", one_meaning),
    ("integers and bools", integers_and_bools),
    ("unequal rows are gathered", unequal_rows),
    ("what one rank holds is divided", divided),
    ("buffers reduced together", reduced_together),
    ("messages stay on the device", messages),
    ("messages that are expected", expected),
    ("a message is its receiver's own", handed_over),
    ("in flight and direct calls interleave", in_flight),
    ("a long chain keeps its order", chain),
];

pub fn values(rank: usize, elements: usize) -> Vec<f32> {
    (0..elements).map(|i| ((i * 7919 + rank * 104_729) % 13) as f32 - 6.0).collect()
}

fn floats(dtypes: &[DType]) -> impl Iterator<Item = DType> {
    dtypes.iter().copied().filter(DType::is_float)
}

fn tensor<const D: usize>(rank: usize, dims: [usize; D], device: &Device, dtype: DType) -> Tensor<D> {
    let data = TensorData::new(values(rank, dims.iter().product()), dims);
    Tensor::from_data(data.convert_dtype(dtype), (device, dtype))
}

/// Equal, as far as the dtype tells.
#[track_caller]
pub fn same<const D: usize>(found: Tensor<D>, expected: Tensor<D>, device: &Device) {
    assert_eq!((found.device(), found.dtype()), (device.clone(), expected.dtype()));
    let tolerance = match found.dtype() {
        DType::BF16 => Tolerance::rel_abs(2e-2, 1e-2),
        DType::F16 => Tolerance::rel_abs(2e-3, 1e-3),
        _ => Tolerance::default(),
    };
    let wide = |tensor: Tensor<D>| tensor.into_data().convert::<f64>();
    wide(found).assert_approx_eq::<f64>(&wide(expected), tolerance);
}

fn collectives(comm: &Communicator, device: &Device, dtypes: &[DType]) -> Result<(), Error> {
    let (me, size) = (comm.rank(), comm.size());
    for dtype in floats(dtypes) {
        // Fewer rows than ranks, rows that the ranks do not divide, and enough for shares.
        for dims in [[1, 3], [5, 4], [64, 1], [37, 900]] {
            let host = || tensor(me, dims, &Device::flex(), dtype);
            let there = || tensor(me, dims, device, dtype);
            for op in [ReduceOp::Sum, ReduceOp::Mean, ReduceOp::Max, ReduceOp::Min, ReduceOp::PreMulSum(0.5)] {
                same(comm.all_reduce(there(), op)?, comm.all_reduce(host(), op)?, device);
                same(comm.reduce_scatter(there(), op)?, comm.reduce_scatter(host(), op)?, device);
            }
            same(comm.all_gather(there())?, comm.all_gather(host())?, device);
            same(comm.all_to_all(there())?, comm.all_to_all(host())?, device);
            for root in 0..size {
                same(comm.broadcast(there(), root)?, comm.broadcast(host(), root)?, device);
                let both = |ours: Option<Tensor<2>>, expected: Option<Tensor<2>>| match (ours, expected) {
                    (Some(ours), Some(expected)) => same(ours, expected, device),
                    (ours, expected) => assert!(ours.is_none() && expected.is_none()),
                };
                both(comm.gather(there(), root)?, comm.gather(host(), root)?);
                both(comm.reduce(there(), ReduceOp::Sum, root)?, comm.reduce(host(), ReduceOp::Sum, root)?);
            }
            // What the rank keeps a handle of is not written to.
            let kept = there();
            comm.all_reduce(kept.clone(), ReduceOp::Sum)?;
            comm.broadcast(kept.clone(), size - 1)?;
            same(kept, host(), device);
        }
    }
    Ok(())
}

/// What has 16 bits is scaled and added in `f32` and rounded once; a NaN of any rank is in maxima and minima.
fn one_meaning(comm: &Communicator, device: &Device, dtypes: &[DType]) -> Result<(), Error> {
    let (me, size) = (comm.rank(), comm.size());
    let exact = |tensor: Tensor<2>, expected: &dyn Fn(usize) -> f32| {
        let found: Vec<f32> = tensor.into_data().iter::<f32>().collect();
        let good = |(place, x): (usize, &f32)| *x == expected(place) || x.is_nan() && expected(place).is_nan();
        assert!(found.iter().enumerate().all(good), "{found:?}");
    };
    for dtype in floats(dtypes) {
        // With and without shares; rows that the ranks divide.
        for dims in [[2 * size, 3], [size * 64, 300]] {
            let full = |value: f32| Tensor::<2>::full(dims, value, (device, dtype));
            if dtype == DType::F16 || dtype == DType::BF16 {
                let large = if dtype == DType::BF16 { 256.0 } else { 2048.0 };
                // As many ones as make a number that there is.
                let ones = (size - 1) / 2 * 2;
                let mine = if me == 0 { large } else { f32::from(u8::from(me <= ones)) };
                let sum = move |_: usize| large + ones as f32;
                exact(comm.all_reduce(full(mine), ReduceOp::Sum)?, &sum);
                exact(comm.reduce_scatter(full(mine), ReduceOp::Sum)?, &sum);
                exact(comm.all_reduce_coalesced(vec![full(mine); 2], ReduceOp::Sum)?.remove(1), &sum);
                let most = if dtype == DType::F16 { 65504.0 } else { 3.0e38 };
                exact(comm.all_reduce(full(most), ReduceOp::Max)?, &|_| dtype_value(dtype, most));
            }
            if let Some((large, factor, left)) = cancelling(dtype, me, size) {
                let op = ReduceOp::PreMulSum(factor);
                exact(comm.all_reduce(full(large), op)?, &|_| left);
                exact(comm.reduce_scatter(full(large), op)?, &|_| left);
                exact(comm.all_reduce_coalesced(vec![full(large); 2], op)?.remove(0), &|_| left);
            }
            for culprit in [0, size - 1] {
                let number = me as f32 - 1.0;
                let values = |place: usize| if me == culprit && place % 4 == 1 { f32::NAN } else { number };
                let mine = || {
                    let data = TensorData::new((0..dims[0] * dims[1]).map(values).collect(), dims);
                    Tensor::<2>::from_data(data.convert_dtype(dtype), (device, dtype))
                };
                for (op, extreme) in [(ReduceOp::Max, size as f32 - 2.0), (ReduceOp::Min, -1.0)] {
                    let whole = |place: usize| if place % 4 == 1 { f32::NAN } else { extreme };
                    let first = me * dims[0] / size * dims[1];
                    exact(comm.all_reduce(mine(), op)?, &whole);
                    exact(comm.reduce_scatter(mine(), op)?, &|place| whole(first + place));
                    exact(comm.all_reduce_coalesced(vec![mine(); 2], op)?.remove(1), &whole);
                    if let Some(reduced) = comm.reduce(mine(), op, size - 1)? {
                        exact(reduced, &whole);
                    }
                }
            }
        }
    }
    Ok(())
}

/// The number of a dtype that is next to this one.
fn dtype_value(dtype: DType, value: f32) -> f32 {
    TensorData::from([value]).convert_dtype(dtype).iter::<f32>().sum()
}

fn integers_and_bools(comm: &Communicator, device: &Device, dtypes: &[DType]) -> Result<(), Error> {
    let (me, n) = (comm.rank() as i64, comm.size() as i64);
    for dtype in dtypes.iter().copied().filter(|dtype| dtype.is_int() || dtype.is_uint()) {
        let counts = Tensor::<1, Int>::from_data(TensorData::from([me, n - me, 5]), (device, dtype));
        let sum = comm.all_reduce(counts.clone(), ReduceOp::Sum)?;
        assert_eq!((sum.device(), sum.dtype()), (device.clone(), dtype));
        let triangle = n * (n - 1) / 2;
        assert_eq!(sum.into_data().convert::<i64>(), TensorData::from([triangle, n * n - triangle, 5 * n]));
        let most = comm.all_reduce(counts, ReduceOp::Max)?;
        assert_eq!(most.into_data().convert::<i64>(), TensorData::from([n - 1, n, 5]));
    }
    let seen = Tensor::<1, Bool>::from_data([me == 0, true, me == 99], device);
    let bools = |tensor: Tensor<1, Bool>| tensor.into_data().iter::<bool>().collect::<Vec<_>>();
    assert_eq!(bools(comm.all_reduce(seen.clone(), ReduceOp::Max)?), [true, true, false]);
    assert_eq!(bools(comm.all_reduce(seen, ReduceOp::Min)?), [n == 1, true, false]);
    Ok(())
}

fn unequal_rows(comm: &Communicator, device: &Device, _: &[DType]) -> Result<(), Error> {
    let size = comm.size();
    // Rank 0 brings nothing.
    let mine = Tensor::<2>::full([comm.rank(), 2], comm.rank() as f32, device);
    let all = comm.all_gather(mine)?;
    assert_eq!(all.dims(), [size * (size - 1) / 2, 2]);
    if size > 1 {
        let firsts: Vec<f32> = all.into_data().iter::<f32>().step_by(2).collect();
        let expected: Vec<f32> = (0..size).flat_map(|rank| vec![rank as f32; rank]).collect();
        assert_eq!(firsts, expected);
    }
    Ok(())
}

/// Several buffers, empty and scalar-like ones among them, in one call, with and without shares.
fn reduced_together(comm: &Communicator, device: &Device, dtypes: &[DType]) -> Result<(), Error> {
    for dtype in floats(dtypes) {
        for last in [3, 30_011] {
            let lens = [5, 0, 1, last];
            let bring = |device: &Device| lens.map(|len| tensor(comm.rank() + len, [len], device, dtype)).to_vec();
            for op in [ReduceOp::Mean, ReduceOp::PreMulSum(0.25)] {
                let before = comm.counters();
                let reduced = comm.all_reduce_coalesced(bring(device), op)?;
                let since = comm.counters() - before;
                assert_eq!(since.of("all_reduce").calls, 1);
                // Shares differ by an element; together the ranks move what there is to move.
                let moved = comm.all_reduce(vec![since.of("all_reduce").bytes], ReduceOp::Sum)?;
                let bytes = lens.iter().sum::<usize>() * dtype.size();
                assert_eq!(moved, [2 * (bytes * (comm.size() - 1)) as u64]);
                let expected = comm.all_reduce_coalesced(bring(&Device::flex()), op)?;
                assert_eq!(reduced.len(), expected.len());
                reduced.into_iter().zip(expected).for_each(|(ours, expected)| same(ours, expected, device));
            }
        }
    }
    Ok(())
}

/// Round the ring and towards each other, to oneself, tags in another order than sent, of several kinds and ranks.
fn messages(comm: &Communicator, device: &Device, dtypes: &[DType]) -> Result<(), Error> {
    let (me, size) = (comm.rank(), comm.size());
    let before = comm.counters();
    let mut bytes = 0;
    for dtype in floats(dtypes) {
        for (next, previous) in [((me + 1) % size, (me + size - 1) % size), (size - 1 - me, size - 1 - me)] {
            let mine = tensor(me, [5, 7], device, dtype);
            // Not contiguous, and still to be computed when it is sent.
            comm.send(mine.clone().transpose().mul_scalar(2.0), next, 1)?;
            comm.send(mine.clone(), next, 9)?;
            comm.send(Tensor::<1, Int>::from_data([me as i32, 7], (device, DType::I32)), next, 10)?;
            comm.send(vec![me as u64], next, 9)?;
            comm.send(tensor(me, [0, 4], device, dtype), next, 12)?;
            comm.send(mine.is_nan(), next, 11)?;

            let nans: Tensor<2, Bool> = comm.recv(previous, 11)?;
            bytes += (2 * 35 * dtype.size() + 2 * 4 + 8 + 35 * nans.dtype().size()) as u64;
            assert_eq!(nans.device(), *device);
            assert!(nans.into_data().iter::<bool>().all(|nan| !nan));
            let nothing: Tensor<2> = comm.recv(previous, 12)?;
            assert_eq!((nothing.dims(), nothing.dtype()), ([0, 4], dtype));
            let numbers: Tensor<1, Int> = comm.recv(previous, 10)?;
            assert_eq!(numbers.into_data().convert::<i64>(), TensorData::from([previous as i64, 7]));
            let sent: Tensor<2> = comm.recv(previous, 9)?;
            let turned: Tensor<2> = comm.start_recv(previous, 1).wait()?;
            same(turned.transpose(), sent.clone().mul_scalar(2.0), device);
            same(sent, tensor(previous, [5, 7], &Device::flex(), dtype), device);
            assert_eq!(comm.recv::<Vec<u64>>(previous, 9)?, [previous as u64]);
        }
    }
    let since = comm.counters() - before;
    assert_eq!(since.of("send").bytes, bytes);
    assert_eq!(since.of("recv").bytes, bytes);
    Ok(())
}

/// Along any dim, from any rank, whatever the others bring; parts stay on the device.
fn divided(comm: &Communicator, device: &Device, dtypes: &[DType]) -> Result<(), Error> {
    let (me, before) = (comm.rank(), comm.counters());
    for dtype in floats(dtypes) {
        for (root, dims) in (0..comm.size()).flat_map(|root| [[1, 3], [5, 4], [37, 900]].map(|dims| (root, dims))) {
            for (dim, nothing) in [(0, [0, 0]), (1, [0, 0]), (0, [2, 7])] {
                let mine = |device: &Device| match me == root {
                    true => tensor(root, dims, device, dtype),
                    false => Tensor::zeros(nothing, (device, dtype)),
                };
                let own = layout::scatter_from_root(mine(device), dim, root, comm)?;
                let expected = layout::scatter_from_root(mine(&Device::flex()), dim, root, comm)?;
                assert_eq!(own.dims(), expected.dims());
                same(own, expected, device);
            }
        }
    }
    let scattered = (comm.counters() - before).of("scatter");
    // The half that was on the device, if it is one.
    let there = if *device == Device::flex() { 0 } else { scattered.bytes / 2 };
    assert_eq!((scattered.on_device, scattered.calls % 2), (there, 0));
    Ok(())
}

/// Receives are begun before, between and behind the sends, and waited for in another order; of one tag the oldest
/// comes first.
fn expected(comm: &Communicator, device: &Device, _: &[DType]) -> Result<(), Error> {
    let (me, size) = (comm.rank(), comm.size());
    let number = |from: usize, tag: u64, turn: usize| (1000 * from + 10 * tag as usize + turn) as f32;
    let is = |tensor: Tensor<1>, value: f32| {
        assert_eq!(tensor.device(), *device);
        assert!(tensor.into_data().iter::<f32>().all(|x| x == value), "{value} was expected");
    };
    for shift in 1..=size {
        let (next, previous) = ((me + shift) % size, (me + size - shift) % size);
        let begin = |tag: u64| (tag, comm.start_recv::<Tensor<1>>(previous, tag));
        let mut begun: Vec<_> = [3, 0, 0, 4].map(begin).into();
        let mut busy = Tensor::<2>::ones([64, 64], device);
        for tag in 0..5 {
            for turn in 0..2 {
                let dims = [if tag == 4 { 40_000 } else { 700 }];
                comm.send(Tensor::<1>::full(dims, number(me, tag, turn), device), next, tag)?;
            }
            busy = busy.clone().matmul(busy) / 64.0;
            begun.push(begin(tag));
        }
        // Not expected, and behind one that is.
        is(comm.recv(previous, 1)?, number(previous, 1, 0));
        let mut turns = [0, 1, 0, 0, 0];
        for (tag, pending) in begun.into_iter().rev() {
            if turns[tag as usize] == 2 {
                // A third of this tag: sent now.
                comm.send(Tensor::<1>::full([9], number(me, tag, 2), device), next, tag)?;
            }
            is(pending.wait()?, number(previous, tag, turns[tag as usize]));
            turns[tag as usize] += 1;
        }
        is(comm.recv(previous, 2)?, number(previous, 2, 1));
        assert_eq!(turns, [3, 2, 1, 2, 2]);
        assert!(busy.into_data().iter::<f32>().all(|x| x == 1.0));
    }
    Ok(())
}

/// The memory may be handed over; what either side does with it afterwards is not seen by the other.
fn handed_over(comm: &Communicator, device: &Device, _: &[DType]) -> Result<(), Error> {
    let (me, other) = (comm.rank(), comm.size() - 1 - comm.rank());
    for round in 0..3 {
        let number = |rank: usize| (1 + rank + 10 * round) as f32;
        let mine = Tensor::<1>::full([50_000], number(me), device);
        comm.send(mine.clone(), other, round as u64)?;
        let kept = mine.add_scalar(100.0);
        let theirs: Tensor<1> = comm.recv_on(device, other, round as u64)?;
        let changed = theirs.clone().mul_scalar(3.0);
        let all = |tensor: Tensor<1>, value: f32| tensor.into_data().iter::<f32>().all(|x| x == value);
        assert!(all(kept, 100.0 + number(me)) && all(theirs, number(other)) && all(changed, 3.0 * number(other)));
    }
    Ok(())
}

/// Collectives on two groups and messages in flight, beside direct calls and computation.
fn in_flight(comm: &Communicator, device: &Device, _: &[DType]) -> Result<(), Error> {
    let part = comm.split(comm.rank() as u64 % 2, 0)?;
    let (n, members, me) = (comm.size() as f32, part.size() as f32, comm.rank());
    let (next, previous) = ((me + 1) % comm.size(), (me + comm.size() - 1) % comm.size());
    let ones = || Tensor::<1>::ones([3000], device);
    let all = |tensor: Tensor<1>, value: f32| {
        assert!(tensor.into_data().iter::<f32>().all(|x| x == value), "{value} was expected");
    };
    for round in 0..5u64 {
        let mine = ones().mul_scalar(round as f32);
        let big = comm.start(move |comm| comm.all_reduce(mine, ReduceOp::Sum));
        let mine = ones();
        let small = part.start(move |part| part.all_reduce(mine, ReduceOp::Sum));
        comm.send(ones().mul_scalar(me as f32), next, round)?;
        all(comm.all_reduce(ones(), ReduceOp::Sum)?, n);
        all(part.all_reduce(ones(), ReduceOp::Mean)?, 1.0);
        all(comm.recv(previous, round)?, previous as f32);
        // Used where it was not computed: on this thread's own stream.
        all(big.wait()?.add_scalar(1.0), n * round as f32 + 1.0);
        all(small.wait()?, members);
    }
    Ok(())
}

/// What burn has enqueued before a collective is in it, and what comes after sees it.
fn chain(comm: &Communicator, device: &Device, _: &[DType]) -> Result<(), Error> {
    let mut x = Tensor::<1>::full([40_000], 1.0 + comm.rank() as f32, device);
    let mut expected = (comm.size() + 1) as f32 / 2.0;
    for step in 0..10 {
        x = comm.all_reduce(x.add_scalar(step as f32), ReduceOp::Mean)?.mul_scalar(0.5);
        expected = (expected + step as f32) * 0.5;
    }
    let expected = TensorData::from(vec![expected; 40_000].as_slice());
    x.into_data().assert_approx_eq::<f32>(&expected, Tolerance::default());
    Ok(())
}
