//! The distributed sampler deals every item, in a fixed order, through burn's own dataloaders.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, LazyLock};

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::{Dataset, InMemDataset};
use burn::module::Param;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Tensor};
use burn_parallel::data_parallel::Share;
use burn_parallel::prelude::*;
use proptest::prelude::*;

const SIZES: [usize; 5] = [1, 2, 3, 4, 8];

/// The ranks of a group of each of [`SIZES`].
static GROUPS: LazyLock<Vec<Vec<Communicator>>> = LazyLock::new(|| {
    let group = |size| launch::threads(size).run(|rank| Ok(rank.world().clone())).expect("the ranks start");
    SIZES.into_iter().map(group).collect()
});

/// The samplers of all ranks of a group, in rank order.
fn samplers(items: usize, group: &[Communicator]) -> Vec<DistributedSampler> {
    group.iter().map(|rank| DistributedSampler::new(items, rank)).collect()
}

/// Every rank's items in one epoch.
fn deal(samplers: &[DistributedSampler], epoch: usize) -> Vec<Vec<usize>> {
    samplers.iter().map(|sampler| sampler.epoch(epoch).expect("there is memory").iter().collect()).collect()
}

fn sorted(mut items: Vec<usize>) -> Vec<usize> {
    items.sort_unstable();
    items
}

/// The order of the epoch, from the hands that were dealt of it.
fn undeal(hands: &[Vec<usize>]) -> Vec<usize> {
    let turns = hands.iter().map(Vec::len).max().unwrap_or(0);
    (0..turns).flat_map(|turn| hands.iter().filter_map(move |hand| hand.get(turn).copied())).collect()
}

/// Lengths at the edges, and any others.
fn lengths() -> impl proptest::strategy::Strategy<Value = usize> {
    prop_oneof![0..10_usize, 10..70_usize, 70..3000_usize]
}

proptest! {
    #[test]
    fn uneven_deals_every_item_once(items in lengths(), shuffle: Option<u64>, epoch in 0..1000_usize) {
        for group in GROUPS.iter() {
            let mut samplers = samplers(items, group);
            if let Some(seed) = shuffle {
                samplers.iter_mut().for_each(|sampler| *sampler = sampler.with_shuffle(seed));
            }
            let hands = deal(&samplers, epoch);
            prop_assert_eq!(sorted(hands.concat()), (0..items).collect::<Vec<_>>());
            let (most, least) = (hands[0].len(), hands[group.len() - 1].len());
            prop_assert!(most - least <= 1);
            prop_assert!(hands.is_sorted_by(|one, next| one.len() >= next.len()));
        }
    }

    #[test]
    fn pad_repeats_the_start_of_the_order(items in lengths(), seed: u64, epoch in 0..1000_usize) {
        for group in GROUPS.iter() {
            let plain: Vec<_> = samplers(items, group).iter().map(|sampler| sampler.with_shuffle(seed)).collect();
            let padded: Vec<_> = plain.iter().map(|sampler| sampler.with_remainder(Remainder::Pad)).collect();
            let (order, dealt) = (undeal(&deal(&plain, epoch)), undeal(&deal(&padded, epoch)));
            prop_assert!(padded.iter().all(|sampler| sampler.len() == items.div_ceil(group.len())));
            prop_assert_eq!(dealt.len() % group.len(), 0);
            prop_assert!(dealt.len() - items < group.len());
            let expected: Vec<usize> = order.iter().cycle().take(dealt.len()).copied().collect();
            prop_assert_eq!(dealt, expected);
        }
    }

    #[test]
    fn drop_leaves_out_the_end_of_the_order(items in lengths(), seed: u64, epoch in 0..1000_usize) {
        for group in GROUPS.iter() {
            let plain: Vec<_> = samplers(items, group).iter().map(|sampler| sampler.with_shuffle(seed)).collect();
            let short: Vec<_> = plain.iter().map(|sampler| sampler.with_remainder(Remainder::Drop)).collect();
            let mut order = undeal(&deal(&plain, epoch));
            order.truncate(items / group.len() * group.len());
            prop_assert!(short.iter().all(|sampler| sampler.len() == items / group.len()));
            prop_assert_eq!(undeal(&deal(&short, epoch)), order);
        }
    }

    #[test]
    fn a_global_batch_is_the_same_whatever_the_size(items in lengths(), seed: u64, per_eighth in 1..5_usize) {
        let batch = 8 * per_eighth; // the sizes 1, 2, 4 and 8 divide it
        let batches = |group: &[Communicator]| -> Vec<Vec<usize>> {
            let samplers: Vec<_> = samplers(items, group).iter().map(|sampler| sampler.with_shuffle(seed)).collect();
            let hands = deal(&samplers, 5);
            let share = batch / group.len();
            let part = |hand: &Vec<usize>, number| hand.chunks(share).nth(number).unwrap_or(&[]).to_vec();
            let together = |number| sorted(hands.iter().flat_map(|hand| part(hand, number)).collect());
            (0..items.div_ceil(batch)).map(together).collect()
        };
        let expected = batches(&GROUPS[0]);
        for group in GROUPS.iter().filter(|group| 8 % group.len() == 0) {
            prop_assert_eq!(&batches(group), &expected);
        }
    }

    #[test]
    fn a_share_is_what_it_iterates(items in lengths(), shuffle: Option<u64>) {
        for (sampler, rank) in samplers(items, &GROUPS[2]).into_iter().zip(0..) {
            let sampler = shuffle.map_or(sampler, |seed| sampler.with_shuffle(seed));
            let share: Share = sampler.epoch(3).expect("there is memory");
            prop_assert_eq!((share.epoch(), share.len(), share.is_empty()), (3, sampler.len(), sampler.is_empty()));
            prop_assert_eq!(share.iter().count(), share.len());
            prop_assert!(share.iter().enumerate().all(|(turn, item)| share.get(turn) == Some(item)));
            prop_assert_eq!(share.get(share.len()), None);
            if shuffle.is_none() {
                prop_assert!(share.iter().eq((rank..items).step_by(3)));
            }
        }
    }
}

/// The same numbers come from an independent ChaCha8 and shuffle in Python, written after the documentation.
#[test]
fn shuffled_orders_never_change() {
    let order = |items, seed, epoch| deal(&[samplers(items, &GROUPS[0])[0].with_shuffle(seed)], epoch).concat();
    assert_eq!(order(10, 42, 0), [0, 9, 6, 1, 2, 5, 4, 8, 7, 3]);
    assert_eq!(order(10, 42, 1), [5, 1, 2, 8, 7, 3, 0, 4, 9, 6]);
    assert_eq!(order(10, 43, 0), [7, 5, 1, 4, 8, 6, 3, 9, 0, 2]);
    let long = order(1000, 7, 3);
    assert_eq!(long[..10], [22, 825, 140, 54, 511, 180, 143, 870, 925, 411]);
    assert_eq!(long[990..], [623, 50, 470, 274, 835, 82, 495, 600, 148, 856]);
}

#[test]
fn epochs_and_seeds_give_other_orders_and_the_same_again() {
    let sampler = samplers(50, &GROUPS[0])[0];
    let mut orders = HashSet::new();
    for seed in 0..20 {
        for epoch in 0..20 {
            let order = deal(&[sampler.with_shuffle(seed)], epoch).concat();
            assert_eq!(order, deal(&[sampler.with_shuffle(seed)], epoch).concat());
            assert!(orders.insert(order), "seed {seed}, epoch {epoch} repeats an order");
        }
    }
    assert_eq!(deal(&[sampler], 0), deal(&[sampler], 1), "without shuffling, epochs are alike");
}

/// Each of the 24 orders of 4 items, and each item at each place, about equally often.
#[test]
fn orders_are_equally_likely() {
    let sampler = samplers(4, &GROUPS[0])[0].with_shuffle(1);
    let mut counts = HashMap::new();
    for epoch in 0..24_000 {
        *counts.entry(deal(&[sampler], epoch).concat()).or_insert(0_i32) += 1;
    }
    assert_eq!(counts.len(), 24);
    // Five standard deviations of a binomial count with mean 1000.
    assert!(counts.values().all(|count| (count - 1000).abs() < 155), "{counts:?}");
}

#[test]
fn empty_short_and_endless_datasets() {
    let remainders = [Remainder::Uneven, Remainder::Pad, Remainder::Drop];
    for group in GROUPS.iter() {
        for remainder in remainders {
            for sampler in samplers(0, group) {
                let share = sampler.with_shuffle(1).with_remainder(remainder).epoch(0).expect("it is short");
                assert!(share.is_empty() && share.get(0).is_none());
            }
            // No order is made that would have to fit into memory.
            for (sampler, rank) in samplers(usize::MAX, group).into_iter().zip(0_u128..) {
                let sampler = sampler.with_remainder(remainder);
                let share = sampler.epoch(usize::MAX).expect("it is not made");
                let item = |turn: usize| (rank + group.len() as u128 * turn as u128) % usize::MAX as u128;
                for turn in [0, 1, share.len() / 2, share.len() - 1] {
                    assert_eq!(share.get(turn).map(|found| found as u128), Some(item(turn)));
                }
                assert_eq!(share.get(share.len()), None);
            }
        }
        let hands = |remainder| {
            let samplers = samplers(2, group).into_iter().map(|sampler| sampler.with_remainder(remainder));
            deal(&samplers.collect::<Vec<_>>(), 0)
        };
        if group.len() == 8 {
            assert_eq!(hands(Remainder::Uneven).concat(), [0, 1]);
            assert_eq!(hands(Remainder::Pad).concat(), [0, 1, 0, 1, 0, 1, 0, 1]);
            assert!(hands(Remainder::Drop).concat().is_empty());
        }
    }
    let error = samplers(usize::MAX, &GROUPS[1])[0].with_shuffle(1).epoch(0).expect_err("no machine has the memory");
    assert!(error.to_string().contains(&usize::MAX.to_string()), "{error}");
}

/// Batches are the items themselves.
struct Items;

impl Batcher<usize, Vec<usize>> for Items {
    fn batch(&self, items: Vec<usize>, _device: &Device) -> Vec<usize> {
        items
    }
}

fn loader(dataset: DistributedDataset<InMemDataset<usize>>, workers: usize) -> Arc<dyn DataLoader<Vec<usize>>> {
    DataLoaderBuilder::new(Items).batch_size(4).num_workers(workers).set_device(Device::flex()).build(dataset)
}

#[test]
fn dataloaders_deliver_complete_batches() {
    for group in GROUPS.iter() {
        for items in [0, 1, 3, 29, 64, 101] {
            for workers in [0, 1, 3] {
                let mut all = Vec::new();
                for rank in group {
                    let sampler = DistributedSampler::new(items, rank).with_shuffle(9);
                    let numbers = InMemDataset::new((0..items).map(|item| item + 1000).collect());
                    let dataset = DistributedDataset::new(numbers, sampler).expect("the length is right");
                    let dataset = dataset.epoch(2).expect("it is short");
                    let expected: Vec<usize> = dataset.share().iter().map(|item| item + 1000).collect();
                    let loader = loader(dataset, workers);
                    assert_eq!(loader.num_items(), expected.len());
                    for _pass in 0..2 {
                        let batches: Vec<_> = loader.iter().map(|batch| batch.expect("it is in memory")).collect();
                        assert_eq!(batches.len(), expected.len().div_ceil(4));
                        assert!(batches.iter().filter(|batch| batch.len() != 4).count() <= 1);
                        if workers < 2 {
                            assert_eq!(batches.concat(), expected, "in order");
                        }
                        assert_eq!(sorted(batches.concat()), sorted(expected.clone()));
                    }
                    all.extend(expected);
                }
                assert_eq!(sorted(all), (1000..1000 + items).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn a_dataset_is_read_by_its_share() {
    let sampler = samplers(7, &GROUPS[1])[1].with_shuffle(3);
    let letters = InMemDataset::new(('a'..='g').collect());
    let dataset = DistributedDataset::new(letters, sampler).expect("the length is right");
    for epoch in [0, 1, 0] {
        let dataset = dataset.epoch(epoch).expect("it is short");
        let indices: Vec<usize> = sampler.epoch(epoch).expect("it is short").iter().collect();
        let letters: Vec<char> = dataset.iter().map(|letter| letter.expect("it is in memory")).collect();
        let expected: Vec<char> = indices.iter().map(|index| (b'a' + *index as u8) as char).collect();
        assert_eq!((letters, dataset.len()), (expected.clone(), 3));
        assert_eq!(dataset.get_many(vec![2, 0]).expect("it is in memory"), [expected[2], expected[0]]);
    }
}

#[test]
fn a_sampler_for_another_length_is_refused() {
    let sampler = samplers(8, &GROUPS[1])[0];
    let error = DistributedDataset::new(InMemDataset::new(vec![0; 7]), sampler).expect_err("7 are not 8");
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error:?}");
    assert!(error.to_string().contains("7 items") && error.to_string().contains("for 8"), "{error}");
}

/// Rows of one number.
struct Column;

impl Batcher<usize, Tensor<2>> for Column {
    fn batch(&self, items: Vec<usize>, device: &Device) -> Tensor<2> {
        let rows: Vec<f32> = items.into_iter().map(|item| item as f32 / 100.0).collect();
        Tensor::<1>::from_floats(rows.as_slice(), device).unsqueeze_dim(1)
    }
}

/// Two epochs over 37 items in batches of 16 together; every size must take the same steps, to the same weights.
fn train(size: usize) -> Vec<(Vec<f64>, Vec<f64>, f32)> {
    launch::threads(size)
        .run(|rank| {
            let device = rank.device().autodiff();
            let model = LinearConfig::new(1, 1).with_bias(false).init(&device);
            let start = Param::from_tensor(Tensor::<2>::ones([1, 1], &device));
            let model = Linear { weight: start, ..model };
            let mut model = model.data_parallel(&rank, DataParallelConfig::new())?;
            let mut optim: ModuleOptimizer = SgdConfig::new().init();
            let sampler = DistributedSampler::new(37, &rank).with_shuffle(4);
            let dataset = DistributedDataset::new(InMemDataset::new((0..37).collect()), sampler)?;
            let (mut losses, mut weights) = (Vec::new(), Vec::new());
            for epoch in 0..2 {
                let loader = DataLoaderBuilder::new(Column)
                    .batch_size(16 / size)
                    .num_workers(1)
                    .set_device(device.clone())
                    .build(dataset.epoch(epoch)?);
                for batch in model.join(loader.iter()) {
                    let batch = batch?.transpose().map_err(Error::user)?;
                    let step = model.step_micro_batches(batch, |model, x| {
                        let items = x.dims()[0] as f64;
                        let error = model.forward(x.clone()) - x * 2.0;
                        Loss::mean((error.clone() * error).mean(), items)
                    })?;
                    losses.push(step.loss.item());
                    weights.push(step.weight);
                    model = optim.step(0.5, model, step.grads);
                }
            }
            Ok((losses, weights, model.weight.val().into_scalar::<f32>()))
        })
        .expect("all ranks finish")
}

#[test]
fn uneven_loaders_finish_together_and_train_alike() {
    let (losses, weights, weight) = train(1).remove(0);
    assert_eq!(weights, [16.0, 16.0, 5.0, 16.0, 16.0, 5.0]);
    for size in [2, 4, 8, 16] {
        let ranks = train(size);
        assert!(ranks.iter().all(|rank| *rank == ranks[0]), "ranks of {size} differ");
        assert_eq!(ranks[0].1, weights);
        for (loss, expected) in ranks[0].0.iter().zip(&losses) {
            assert!((loss - expected).abs() <= 1e-5 * expected, "{size} ranks: loss {loss}, alone {expected}");
        }
        assert!((ranks[0].2 - weight).abs() < 1e-5);
    }
}

#[test]
fn ranks_without_any_item_finish_too() {
    let steps = launch::threads(4)
        .run(|rank| {
            let device = rank.device().autodiff();
            let mut model = LinearConfig::new(1, 1).init(&device).data_parallel(&rank, DataParallelConfig::new())?;
            let dataset = DistributedDataset::new(InMemDataset::new(vec![5; 2]), DistributedSampler::new(2, &rank))?;
            let loader = DataLoaderBuilder::new(Column).batch_size(1).num_workers(2).set_device(device).build(dataset);
            let mut weights = Vec::new();
            for batch in model.join(loader.iter()) {
                let batch = batch?.transpose().map_err(Error::user)?;
                weights.push(model.step_micro_batches(batch, |model, x| model.forward(x).mean())?.weight);
            }
            Ok(weights)
        })
        .expect("all ranks finish");
    assert_eq!(steps, vec![vec![2.0]; 4]);
}
