//! Every collective against a plain reference, for every dtype, odd shapes and layouts, and several groups at once.
//!
//! Every rank can compute what every other rank brings, so each checks its own results.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{Device, Tensor, TensorData, bf16, f16};
use burn_parallel::Error;
use burn_parallel::comm::ReduceOp;
use burn_parallel::launch::{self, Rank};
use proptest::prelude::*;

use crate::common::forwarding::Forwarding;
use crate::transport_suite::checks;
use crate::transport_suite::collectives::{ranks_1_to_4, vectors};
use crate::transport_suite::items::for_every_item;

const SIZES: [usize; 5] = [1, 2, 3, 4, 8];

fn world<T: Send>(size: usize, f: impl Fn(Rank) -> Result<T, Error> + Sync) -> Vec<T> {
    launch::threads(size).threads_per_rank(1).timeout(Duration::from_secs(60)).run(f).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Also: the same bits on every rank, and in a second run.
    #[test]
    fn vectors_of_every_dtype(size in prop::sample::select(&SIZES[..]), seed: u64, len in prop_oneof![0..20usize, 1000..3000usize]) {
        let run = || world(size, |rank| {
            let mut alike = Vec::new();
            for_every_item!(vectors(&rank, seed, len, &mut alike));
            Ok(alike)
        });
        let results = run();
        prop_assert!(results.iter().all(|alike| *alike == results[0]));
        prop_assert!(run() == results);
    }

    #[test]
    fn tensors_of_every_dtype_rank_and_layout(
        size in prop::sample::select(&SIZES[..]),
        seed: u64,
        (a, b, c, d) in (0..11usize, 0..5usize, 1..4usize, 1..4usize),
    ) {
        world(size, |rank| {
            for_every_item!(ranks_1_to_4(&rank, seed, [a, b, c, d]));
            Ok(())
        });
    }

    /// Groups by color and key, groups of groups, and all of them at work at once.
    #[test]
    fn groups_of_groups(
        size in 1..9usize,
        colors in prop::collection::vec((0..3u64, -2..3i64), 8),
        nested in prop::collection::vec((prop_oneof![Just(0), Just(u64::MAX)], any::<i64>()), 8),
        seed: u64,
    ) {
        // Members of the group of `rank` among `among`, in order.
        let members = |among: &[usize], by: &[(u64, i64)], rank: usize| {
            let mut members: Vec<usize> = among.iter().copied().filter(|other| by[*other].0 == by[rank].0).collect();
            members.sort_by_key(|other| (by[*other].1, among.iter().position(|rank| rank == other)));
            members
        };
        world(size, |rank| {
            let me = rank.rank();
            let outer = rank.split(colors[me].0, colors[me].1)?;
            let inner = outer.split(nested[me].0, nested[me].1)?;
            let everybody: Vec<usize> = (0..size).collect();
            let outer_members = members(&everybody, &colors, me);
            let inner_members = members(&outer_members, &nested, me);
            for (comm, members) in [(rank.world(), &everybody), (&outer, &outer_members), (&inner, &inner_members)] {
                assert_eq!((comm.size(), members[comm.rank()]), (members.len(), me));
                assert_eq!(comm.all_gather(vec![me as u64])?, members.iter().map(|rank| *rank as u64).collect::<Vec<_>>());
            }
            assert_eq!(outer.group().as_ref(), format!("world/{}", colors[me].0));
            // Three groups in flight, in another order on every rank.
            let groups = [(rank.world(), &everybody), (&outer, &outer_members), (&inner, &inner_members)];
            let mut pending = Vec::new();
            for turn in 0..3 {
                let (comm, members) = &groups[(turn + me) % 3];
                for round in 0..3 {
                    let mine = vec![(me * round) as i64; (seed % 50) as usize];
                    let expected = members.iter().map(|rank| (rank * round) as i64).sum::<i64>();
                    pending.push((comm.start(move |comm| comm.all_reduce(mine, ReduceOp::Sum)), expected));
                }
            }
            for (pending, expected) in pending {
                assert_eq!(pending.wait()?, vec![expected; (seed % 50) as usize]);
            }
            vectors::<f32>(&inner, seed, 9, &mut Vec::new())?;
            vectors::<i16>(&outer, seed, 5, &mut Vec::new())
        });
    }
}

#[test]
fn sums_that_everybody_knows() {
    for size in SIZES {
        world(size, |rank| checks::sums_that_everybody_knows(&rank));
    }
}

#[test]
fn halves_are_rounded_once() {
    for size in SIZES {
        world(size, |rank| checks::halves_are_rounded_once(&rank));
    }
}

#[test]
fn a_nan_on_any_rank_is_seen() {
    for size in [1, 2, 3, 8] {
        world(size, |rank| checks::a_nan_on_any_rank_is_seen(&rank));
    }
}

fn tensor_at(data: Vec<f32>, dims: &[usize]) -> (FlexTensor, *const u8) {
    let tensor = FlexTensor::from_data(TensorData::new(data, dims.to_vec()));
    let place = tensor.bytes().as_ptr();
    (tensor, place)
}

#[test]
fn the_same_memory_comes_back() {
    world(3, |rank| {
        let mine = vec![1.0f32; 1000];
        let place = mine.as_ptr();
        let sum = rank.all_reduce(mine, ReduceOp::Sum)?;
        assert_eq!(sum.as_ptr(), place);
        let same = rank.broadcast(sum, 1)?;
        assert_eq!(same.as_ptr(), place);
        let bools = vec![true; 77];
        let place = bools.as_ptr();
        let bools = rank.all_reduce(bools, ReduceOp::Max)?;
        assert_eq!(bools.as_ptr(), place);
        let pieces = vec![vec![1u8; 9], vec![2; 30]];
        let places: Vec<_> = pieces.iter().map(|piece| piece.as_ptr()).collect();
        let pieces = rank.all_reduce_coalesced(pieces, ReduceOp::Sum)?;
        assert_eq!(pieces.iter().map(|piece| piece.as_ptr()).collect::<Vec<_>>(), places);

        let home = |tensor: Tensor<2>| tensor.try_into_primitive::<Flex>().unwrap().bytes().as_ptr();
        let (tensor, place) = tensor_at(vec![1.0; 600], &[20, 30]);
        let sum = rank.all_reduce(Tensor::<2>::from_primitive::<Flex>(tensor), ReduceOp::Sum)?;
        assert_eq!(home(sum), place);
        // A part of something larger, of which nothing else is held, is worked on where it is.
        let (tensor, place) = tensor_at(vec![1.0; 600], &[20, 30]);
        let sum = rank.all_reduce(Tensor::<2>::from_primitive::<Flex>(tensor).slice_dim(0, 4..9), ReduceOp::Sum)?;
        assert_eq!(sum.to_data(), TensorData::new(vec![3.0f32; 150], [5, 30]));
        assert_eq!(home(sum), place);
        // Messages move the tensor itself.
        let (tensor, place) = tensor_at(vec![rank.rank() as f32; 600], &[20, 30]);
        let (next, previous) = ((rank.rank() + 1) % 3, (rank.rank() + 2) % 3);
        rank.send(Tensor::<2>::from_primitive::<Flex>(tensor), next, 0)?;
        let places = rank.all_gather(vec![place.addr() as u64])?;
        assert_eq!(home(rank.recv::<Tensor<2>>(previous, 0)?).addr() as u64, places[previous]);
        Ok(())
    });
}

#[test]
fn tensors_of_an_autodiff_device_come_back_to_it() {
    world(2, |rank| {
        let device = Device::flex().autodiff();
        let weight = Tensor::<1>::ones([3], &device).require_grad();
        let sum = rank.all_reduce(weight.clone() * 2.0, ReduceOp::Sum)?;
        assert_eq!(sum.device(), device);
        assert!(!sum.is_require_grad());
        // A constant from then on: the gradient flows through the other factor alone.
        let gradients = (sum * weight.clone()).sum().backward();
        assert_eq!(weight.grad(&gradients).unwrap().into_data(), TensorData::from([4.0f32; 3]));
        Ok(())
    });
}

#[test]
fn bytes_and_calls_are_exact() {
    for size in SIZES {
        world(size, |rank| checks::bytes_and_calls_are_exact(&rank));
    }
}

#[test]
fn tags_are_independent_and_in_order() {
    for size in [1, 2, 3] {
        world(size, |rank| checks::tags_are_independent_and_in_order(&rank));
    }
}

#[test]
fn in_flight_and_direct_calls_interleave() {
    for size in [1, 2, 4] {
        world(size, |rank| checks::in_flight_and_direct_calls_interleave(&rank));
    }
}

/// More ranks than cores.
#[test]
fn stress() {
    world(8, |rank| checks::stress(&rank, 600));
}

/// A share that lies where the result has it is handed to a transport there, if that says that it can, and else as a
/// copy of its own.
#[test]
fn shares_are_copied_for_transports_that_do_not_gather_in_place() {
    static WITHIN: AtomicUsize = AtomicUsize::new(0);
    static APART: AtomicUsize = AtomicUsize::new(0);
    let gathered = |within| {
        let count = if within { &WITHIN } else { &APART };
        count.fetch_add(1, Relaxed);
    };
    for (in_place, expected) in [(true, [3, 0]), (false, [0, 3])] {
        world(3, |rank| {
            let comm = Forwarding::gathering(rank.split(0, rank.rank() as i64)?, in_place, gathered);
            let mut shares = [9.0f32; 6];
            shares[2 * rank.rank()..][..2].fill(rank.rank() as f32);
            comm.all_gather_in_place(&mut shares)?;
            assert_eq!(shares, [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]);
            Ok(())
        });
        assert_eq!([&WITHIN, &APART].map(|count| count.swap(0, Relaxed)), expected);
    }
}

/// A length that the ranks do not divide, or that is not that of all, is an error on all of them.
#[test]
fn shares_in_place_are_equal() {
    for (lens, words) in [([3, 3], "no equal shares of 2 ranks"), ([4, 6], "all_gather")] {
        let found = launch::threads(2).timeout(Duration::from_secs(60)).run(|rank| {
            let mut shares = vec![1i32; lens[rank.rank()]];
            let error = rank.all_gather_in_place(&mut shares).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert!(shares.iter().all(|share| *share == 1));
            Ok(())
        });
        found.unwrap();
    }
}
