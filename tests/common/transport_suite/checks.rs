//! What must hold over any transport, for any number of ranks.

use std::time::Duration;

use burn::tensor::{DType, bf16, f16};
use burn_parallel::Error;
use burn_parallel::comm::{Communicator, Counters, ReduceOp};

use super::collectives::vectors;
use super::items::*;

/// Small integers, whose reductions are known.
pub fn sums_that_everybody_knows(comm: &Communicator) -> Result<(), Error> {
    let (size, n) = (comm.size(), comm.size() as i64);
    let r = comm.rank() as i64;
    let mine: Vec<i64> = (1..=7).map(|i| (r + 1) * i).collect();
    let triangle: Vec<i64> = (1..=7).map(|i| n * (n + 1) / 2 * i).collect();
    assert_eq!(comm.all_reduce(mine.clone(), ReduceOp::Sum)?, triangle);
    assert_eq!(comm.all_reduce(mine.clone(), ReduceOp::Max)?, (1..=7).map(|i| n * i).collect::<Vec<_>>());
    assert_eq!(comm.all_reduce(mine.clone(), ReduceOp::Min)?, (1..=7).collect::<Vec<_>>());
    let factorial: i64 = (1..=n).product();
    assert_eq!(comm.all_reduce(vec![r + 1], ReduceOp::Product)?, [factorial]);
    assert_eq!(comm.all_reduce(vec![r as f32], ReduceOp::Mean)?, [(n - 1) as f32 / 2.0]);
    assert_eq!(comm.all_reduce(vec![r > 0], ReduceOp::Max)?, [size > 1]);
    assert_eq!(comm.all_reduce(vec![r > 0], ReduceOp::Min)?, [false]);
    // A token-exact average: the factor is each rank's count over the count of all.
    let count = (r + 1) as f64 / (n * (n + 1) / 2) as f64;
    let mean = comm.all_reduce(vec![1.0f64, 10.0], ReduceOp::PreMulSum(count))?;
    assert!((mean[0] - 1.0).abs() < 1e-12 && (mean[1] - 10.0).abs() < 1e-11);
    Ok(())
}

/// 2048 + 1 is 2048 in f16: folded in f16 the ones would be lost one by one.
pub fn halves_are_rounded_once(comm: &Communicator) -> Result<(), Error> {
    // The ones, as many as make a number that f16 and bf16 know.
    let ones = comm.size() - 1 - (comm.size() - 1) % 2;
    let n = ones as f32;
    let mine = match comm.rank() {
        0 => 2048.0,
        rank if rank <= ones => 1.0,
        _ => 0.0,
    };
    assert_eq!(comm.all_reduce(vec![f16::from_f32(mine)], ReduceOp::Sum)?, [f16::from_f32(2048.0 + n)]);
    let mine = match comm.rank() {
        0 => 256.0,
        rank if rank <= ones => 1.0,
        _ => 0.0,
    };
    assert_eq!(comm.all_reduce(vec![bf16::from_f32(mine)], ReduceOp::Sum)?, [bf16::from_f32(256.0 + n)]);
    // 65504 is the largest f16; the sum is beyond it and the mean is not.
    assert_eq!(comm.all_reduce(vec![f16::MAX], ReduceOp::Mean)?, [f16::MAX]);
    assert_eq!(
        comm.all_reduce(vec![f16::MAX], ReduceOp::Sum)?,
        [if comm.size() > 1 { f16::INFINITY } else { f16::MAX }]
    );
    Ok(())
}

/// What a rank brings to a sum with factors, with its factor: all but what 16 bits would have to round away cancels
/// out. `None` for worlds of one rank.
pub fn cancelling(dtype: DType, rank: usize, size: usize) -> Option<(f32, f64, f32)> {
    // One more than these would be rounded to them, factors and products alike.
    let (large, left) = match dtype {
        DType::BF16 => (256.0f32, 0.5f32),
        _ => (4096.0, 1.0),
    };
    let factor = match rank {
        0 => 1.0 + f64::from(left / large),
        rank if rank + 1 == size => -1.0,
        _ => 0.0,
    };
    (size > 1).then_some((large, factor, left))
}

/// Neither a factor nor what it makes of an element is rounded to 16 bits.
pub fn factors_are_not_rounded(comm: &Communicator) -> Result<(), Error> {
    let (rank, size) = (comm.rank(), comm.size());
    let Some((large, factor, left)) = cancelling(DType::BF16, rank, size) else { return Ok(()) };
    for len in [1, 37, 5000] {
        let sum = comm.all_reduce(vec![bf16::from_f32(large); len], ReduceOp::PreMulSum(factor))?;
        assert_eq!(sum, vec![bf16::from_f32(left); len]);
        let parts = comm.reduce_scatter(vec![bf16::from_f32(large); len * size], ReduceOp::PreMulSum(factor))?;
        assert_eq!(parts, vec![bf16::from_f32(left); len]);
    }
    let Some((large, factor, left)) = cancelling(DType::F16, rank, size) else { return Ok(()) };
    let sum = comm.all_reduce_coalesced(vec![vec![f16::from_f32(large); 3]; 2], ReduceOp::PreMulSum(factor))?;
    assert_eq!(sum, vec![vec![f16::from_f32(left); 3]; 2]);
    if let Some(sum) = comm.reduce(vec![f16::from_f32(large); 70_000], ReduceOp::PreMulSum(factor), size - 1)? {
        assert_eq!(sum, vec![f16::from_f32(left); 70_000]);
    }
    Ok(())
}

/// A NaN is not lost in a maximum or minimum, whoever brings it.
pub fn a_nan_on_any_rank_is_seen(comm: &Communicator) -> Result<(), Error> {
    for culprit in 0..comm.size() {
        let mine = |nan: f64, number: f64| if comm.rank() == culprit { nan } else { number };
        for op in [ReduceOp::Max, ReduceOp::Min] {
            // Enough for vector instructions and a remainder.
            assert!(comm.all_reduce(vec![mine(f64::NAN, 1.0); 37], op)?.iter().all(|x| x.is_nan()));
            assert!(comm.all_reduce(vec![mine(f64::NAN, 1.0) as f32; 37], op)?.iter().all(|x| x.is_nan()));
            assert!(comm.all_reduce(vec![f16::from_f64(mine(f64::NAN, 1.0)); 37], op)?.iter().all(|x| x.is_nan()));
            assert!(comm.all_reduce(vec![bf16::from_f64(mine(f64::NAN, 1.0)); 37], op)?.iter().all(|x| x.is_nan()));
        }
    }
    Ok(())
}

/// The counters say what has been moved, to the byte.
pub fn bytes_and_calls_are_exact(comm: &Communicator) -> Result<(), Error> {
    let (n, s) = (comm.size() as u64, 8 * 3 * 5 * 7 * 4u64);
    let before = comm.counters();
    let one = |name: &'static str, bytes: u64, before: Counters| {
        let since = comm.counters() - before;
        let calls: Vec<_> = since.iter().map(|(name, tally)| (name, tally.calls, tally.bytes)).collect();
        assert_eq!(calls, [(name, 1, bytes)]);
        assert!(since.total().time > Duration::ZERO);
        comm.counters()
    };
    let mine = || vec![1.0f32; s as usize / 4];
    let share = s / n;
    comm.all_reduce(mine(), ReduceOp::Sum)?;
    let before = one("all_reduce", 2 * (n - 1) * share, before);
    comm.all_reduce_coalesced(vec![mine()[..100].to_vec(), mine()[100..].to_vec()], ReduceOp::Sum)?;
    let before = one("all_reduce", 2 * (n - 1) * share, before);
    comm.start(move |comm| comm.all_reduce(vec![1.0f32; s as usize / 4], ReduceOp::Sum)).wait()?;
    let before = one("all_reduce", 2 * (n - 1) * share, before);
    comm.reduce_scatter(mine(), ReduceOp::Sum)?;
    let before = one("reduce_scatter", (n - 1) * share, before);
    comm.all_gather(mine())?;
    let before = one("all_gather", (n - 1) * s, before);
    comm.all_to_all(mine())?;
    let before = one("all_to_all", (n - 1) * share, before);
    let me = comm.rank() as u64;
    comm.broadcast(mine(), 0)?;
    let before = one("broadcast", if me == 0 { 0 } else { s }, before);
    comm.reduce(mine(), ReduceOp::Sum, 0)?;
    let before = one("reduce", (n - 1) * share + if me == 0 { 0 } else { share }, before);
    comm.gather(mine(), 0)?;
    let before = one("gather", if me == 0 { (n - 1) * s } else { 0 }, before);
    comm.scatter((me == 0).then(mine), 0)?;
    let before = one("scatter", if me == 0 { 0 } else { share }, before);
    comm.barrier()?;
    let before = one("barrier", 0, before);
    let part = comm.split(0, 0)?;
    let before = one("split", 0, before);
    comm.send(mine(), comm.rank(), 1)?;
    let before = one("send", s, before);
    comm.recv::<Vec<f32>>(comm.rank(), 1)?;
    one("recv", s, before);
    // A group counts for itself, and calls that are refused do not count.
    assert_eq!(part.counters(), Counters::default());
    comm.all_reduce(vec![true], ReduceOp::Sum).unwrap_err();
    part.all_reduce(vec![0u8; 10], ReduceOp::Max)?;
    assert_eq!(comm.counters().of("all_reduce").calls, 3);
    // 10 bytes do not divide by 3, 4 or 8: what the ranks move together is exact all the same.
    let moved = comm.all_reduce(vec![part.counters().of("all_reduce").bytes], ReduceOp::Sum)?;
    assert_eq!(moved, [2 * (n - 1) * 10]);
    Ok(())
}

/// Messages of one tag come in order, whatever is asked for first.
pub fn tags_are_independent_and_in_order(comm: &Communicator) -> Result<(), Error> {
    let other = comm.size() - 1 - comm.rank();
    for round in 0..200u64 {
        comm.send(vec![round], other, round % 5)?;
    }
    let waiting: Vec<_> = (0..5).map(|tag| comm.start_recv::<Vec<u64>>(other, tag)).collect();
    for tag in (0..5).rev() {
        let first = if tag == 3 { 1 } else { 0 };
        if tag == 3 {
            assert_eq!(comm.recv::<Vec<u64>>(other, 3)?, [3]);
        }
        for round in first..39 {
            assert_eq!(comm.recv::<Vec<u64>>(other, tag)?, [round * 5 + tag]);
        }
    }
    for (tag, last) in waiting.into_iter().enumerate() {
        assert_eq!(last.wait()?, [195 + tag as u64], "a deferred receive takes what is left");
    }
    Ok(())
}

/// Several collectives in flight, on two groups, beside direct calls.
pub fn in_flight_and_direct_calls_interleave(comm: &Communicator) -> Result<(), Error> {
    let part = comm.split(comm.rank() as u64 / comm.size().div_ceil(2) as u64, 0)?;
    let (n, members, root) = (comm.size() as i64, part.size() as i64, comm.size() / 2);
    for round in 0..50i64 {
        let big = comm.start(move |comm| comm.all_reduce(vec![round; 5000], ReduceOp::Sum));
        let small = part.start(move |comm| comm.all_gather(vec![round]));
        let two = comm.start(move |comm| {
            let sum = comm.all_reduce(vec![1i64], ReduceOp::Sum)?;
            comm.broadcast(vec![sum[0] + comm.rank() as i64], root)
        });
        // Waits for what is in flight on `rank`, not for `part`.
        assert_eq!(comm.all_reduce(vec![comm.rank() as i64], ReduceOp::Max)?, [n - 1]);
        assert_eq!(part.all_reduce(vec![1i64], ReduceOp::Sum)?, [members]);
        if round % 3 == 0 {
            drop(big);
        } else {
            assert_eq!(big.wait()?, vec![n * round; 5000]);
        }
        assert_eq!(two.wait()?, [n + root as i64]);
        assert_eq!(small.wait()?, vec![round; part.size()]);
    }
    Ok(())
}

/// Thousands of collectives of all kinds on three groups, in flight and direct.
pub fn stress(comm_world: &Communicator, rounds: usize) -> Result<(), Error> {
    let halves = comm_world.split(comm_world.rank() as u64 % 2, 0)?;
    let quarters = halves.split(halves.rank() as u64 / 2, -(halves.rank() as i64))?;
    let groups = [comm_world, &halves, &quarters];
    let mut pending = std::collections::VecDeque::new();
    for round in 0..rounds {
        for (place, comm) in groups.iter().enumerate() {
            // The same choice on all ranks of the group.
            let choice = mix(11, place, round);
            let len = (choice >> 8) as usize % 300;
            let size = comm.size();
            match choice % 8 {
                0 => comm.barrier()?,
                1 => vectors::<bf16>(comm, choice, len % 20, &mut Vec::new())?,
                2 => equal(&comm.all_gather(input::<u16>(choice, comm.rank(), 3))?[..3], &input(choice, 0, 3), 2),
                3 => {
                    let mine = input::<i32>(choice, comm.rank(), len);
                    let started = comm.start(move |comm| comm.all_reduce(mine, ReduceOp::Sum));
                    pending.push_back((started, reduced::<i32>(choice, size, len, ReduceOp::Sum).unwrap()));
                }
                4 => {
                    let other = (comm.rank() + choice as usize % size) % size;
                    let from = (comm.rank() + size - choice as usize % size) % size;
                    comm.send(vec![comm.rank() as u64, choice], other, choice)?;
                    assert_eq!(comm.recv::<Vec<u64>>(from, choice)?, [from as u64, choice]);
                }
                _ => {
                    let result = comm.all_reduce(input::<f32>(choice, comm.rank(), len), ReduceOp::Sum)?;
                    equal(&result, &reduced::<f32>(choice, size, len, ReduceOp::Sum).unwrap(), round);
                }
            }
        }
        while pending.len() > 4 {
            let Some((started, expected)) = pending.pop_front() else { break };
            assert_eq!(started.wait()?, expected);
        }
    }

    Ok(())
}

/// Buffers of several windows, cut where windows and shares are not.
pub fn large(comm: &Communicator) -> Result<(), Error> {
    let (rank, size, seed) = (comm.rank(), comm.size(), 3);
    const LEN: usize = 700_003;
    let expected = reduced::<f32>(seed, size, LEN, ReduceOp::Sum).unwrap();
    let mine = input::<f32>(seed, rank, LEN);
    equal(&comm.all_reduce(mine.clone(), ReduceOp::Sum)?, &expected, "all_reduce");
    let (mut pieces, mut rest) = (Vec::new(), &mine[..]);
    for len in [1, 65_536, 0, 65_535, 3, 400_000, 100_000] {
        let (piece, after) = rest.split_at(len);
        pieces.push(piece.to_vec());
        rest = after;
    }
    pieces.push(rest.to_vec());
    equal(&comm.all_reduce_coalesced(pieces, ReduceOp::Sum)?.concat(), &expected, "all_reduce_coalesced");
    let part = burn_parallel::comm::part(LEN, size, rank);
    equal(&comm.reduce_scatter(mine.clone(), ReduceOp::Sum)?, &expected[part.clone()], "reduce_scatter");
    equal(&comm.broadcast(mine.clone(), size - 1)?, &input::<f32>(seed, size - 1, LEN), "broadcast");
    equal(&comm.scatter((rank == 0).then(|| mine.clone()), 0)?, &input::<f32>(seed, 0, LEN)[part], "scatter");
    let all: Vec<f32> = (0..size).flat_map(|rank| input::<f32>(seed, rank, LEN)).collect();
    equal(&comm.all_gather(mine.clone())?, &all, "all_gather");
    if let Some(result) = comm.reduce(mine.clone(), ReduceOp::Sum, size - 1)? {
        equal(&result, &expected, "reduce");
    }
    // Round the ring while a sum is on its way.
    let sum = comm.start({
        let mine = mine.clone();
        move |comm| comm.all_reduce(mine, ReduceOp::Sum)
    });
    comm.send(mine, (rank + 1) % size, 1)?;
    let previous = (rank + size - 1) % size;
    equal(&comm.recv::<Vec<f32>>(previous, 1)?, &input(seed, previous, LEN), "recv");
    equal(&sum.wait()?, &expected, "an all_reduce in flight");
    Ok(())
}

/// Groups of groups, some of one rank, all of them at work at once, in another order on every rank.
pub fn groups_of_groups(comm: &Communicator) -> Result<(), Error> {
    let (me, size) = (comm.rank(), comm.size());
    for (modulus, turned) in [(1, false), (2, true), (3, false), (size, true)] {
        let key = if turned { -(me as i64) } else { 0 };
        let outer = comm.split_named("outer", (me % modulus) as u64, key)?;
        let mut members: Vec<u64> = (0..size).filter(|rank| rank % modulus == me % modulus).map(|r| r as u64).collect();
        if turned {
            members.reverse();
        }
        assert_eq!(outer.group().as_ref(), format!("{}/outer{}", comm.group(), me % modulus));
        assert_eq!((outer.size(), members[outer.rank()]), (members.len(), me as u64));
        assert_eq!(outer.all_gather(vec![me as u64])?, members);
        let inner = outer.split(u64::MAX - outer.rank() as u64 / 2, 0)?;
        let pair: Vec<u64> = members.chunks(2).nth(outer.rank() / 2).unwrap().to_vec();
        assert_eq!(inner.all_gather(vec![me as u64])?, pair);
        let everybody: Vec<u64> = (0..size as u64).collect();
        let groups = [(comm, everybody), (&outer, members), (&inner, pair)];
        let mut pending = Vec::new();
        for turn in 0..3 {
            let (group, members) = &groups[(turn + me) % 3];
            for round in 0..3 {
                let mine = vec![(me as u64 + 1) * round; 50];
                let expected = members.iter().map(|rank| (rank + 1) * round).sum::<u64>();
                pending.push((group.start(move |comm| comm.all_reduce(mine, ReduceOp::Sum)), expected));
            }
        }
        for (pending, expected) in pending {
            assert_eq!(pending.wait()?, vec![expected; 50]);
        }
    }
    Ok(())
}
