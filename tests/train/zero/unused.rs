//! Ranks that use different parameters in the same micro-batch, by the model's own forward (`allow_unused_parameters`).

use std::time::{Duration, Instant};

use burn::module::{Lora, Module, ParamGroup};
use burn::nn::Linear;
use burn::prelude::*;
use burn_parallel::data_parallel::{Eager, Replica};
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::layers::{ParallelFeedForward, ParallelFeedForwardConfig};
use burn_parallel::train::{Engine, Strategy};
use proptest::prelude::{Just, ProptestConfig, prop_oneof, proptest};

use super::{config, wrap};
use crate::common::checkpointing::{beside, is_demanded, on_checkpointing, own_for};
use crate::common::models::{Numbers, device};
use crate::common::reference::{Wholes, all_same, optimizer, own, values};
use crate::zero_captured::branches::{Batch, WIDTH, layers, loss, trains_like_one};

fn allowing(keep: Keep) -> DataParallelConfig {
    config(Sharding::Parameters).with_keep(keep).with_allow_unused_parameters(true)
}

#[test]
fn replicas_that_use_different_layers_train_like_one() {
    for (replicas, keep) in [(2, Keep::Pass), (3, Keep::Pass), (3, Keep::MicroBatch), (4, Keep::Step)] {
        let strategy = Strategy::new().with_data(allowing(keep)).with_engine(Engine::Eager);
        trains_like_one(replicas, replicas, &strategy, &format!("dp {replicas}, {keep:?}"));
    }
    let hybrid = Strategy::new().with_data(allowing(Keep::Pass).with_sharding_ranks(2)).with_engine(Engine::Eager);
    trains_like_one(4, 4, &hybrid, "dp 4, rows among 2");
    let noisy = Strategy::new().with_data(allowing(Keep::Pass).with_noise_scale_every(1)).with_engine(Engine::Eager);
    trains_like_one(3, 3, &noisy, "dp 3, with the noise of gradients");
}

/// The layers that each micro-batch goes through, one behind the other, in each step on each rank.
type Orders = Vec<Vec<Vec<Vec<usize>>>>;

fn input(step: usize, rank: usize, number: usize) -> Tensor<2> {
    let rows = 1 + (step + 2 * rank + number) % 3;
    Numbers((step * 31 + rank * 7 + number) as u64).tensor([rows, WIDTH], &device())
}

/// The sum of the losses of its rows, which weigh different numbers of items.
fn ordered(layers: &[Linear], (x, order): (Tensor<2>, Vec<usize>)) -> Loss {
    let items = x.dims()[0] + order.len();
    let x = order.iter().fold(x, |x, place| layers[*place].forward(x).tanh());
    Loss::sum(x.powi_scalar(2).sum(), items)
}

/// Losses and parameters of ranks with these orders, each with its own, or with those of all.
fn run(
    orders: &Orders,
    ranks: usize,
    config: &DataParallelConfig,
    make: &(dyn Fn() -> Vec<Linear> + Sync),
) -> (Vec<f64>, Wholes) {
    let threads = launch::threads(ranks).timeout(Duration::from_secs(30));
    let ran = threads.run(|world| {
        let mut model = own_for(&make(), config).data_parallel(&world, config.clone())?;
        let mut optim = optimizer();
        let mut losses = Vec::new();
        for (step, of_ranks) in orders.iter().enumerate() {
            let mine = of_ranks.iter().enumerate().filter(|(rank, _)| ranks == 1 || *rank == world.rank());
            let batches = mine.flat_map(|(rank, orders)| {
                orders.iter().enumerate().map(move |(number, order)| (input(step, rank, number), order.clone()))
            });
            let done = model.step_micro_batches(batches, |layers, batch| ordered(layers, batch))?;
            losses.push(done.loss.item());
            model = model.optimize(&mut optim, 0.05, done)?;
        }
        Ok((losses, values(&model.assemble()?)))
    });
    ran.unwrap().swap_remove(0)
}

fn orders_train_like_one(
    orders: &Orders,
    ranks: usize,
    config: &DataParallelConfig,
    make: &(dyn Fn() -> Vec<Linear> + Sync),
) {
    let what = format!("{ranks} ranks, {config:?}, {orders:?}");
    let (expected, found) = (run(orders, 1, &DataParallelConfig::new(), make), run(orders, ranks, config, make));
    for (expected, found) in expected.0.iter().zip(&found.0) {
        let same = (found - expected).abs() <= 2e-5 * expected.abs() || found.is_nan() && expected.is_nan();
        assert!(same, "{what}: loss {found}, not {expected}");
    }
    all_same(&what, &expected.1, &found.1, 3e-4);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, max_shrink_iters: 8, ..ProptestConfig::default() })]

    /// Layers in any order, several times as well, in any number of micro-batches, also none.
    #[test]
    fn any_order_trains_like_one_device(
        orders in proptest::collection::vec(
            proptest::collection::vec(
                proptest::collection::vec(proptest::collection::vec(0..5usize, 1..5), 0..3),
                3,
            ),
            2,
        ),
        ranks in 2..4usize,
        keep in prop_oneof![Just(Keep::Pass), Just(Keep::MicroBatch), Just(Keep::Step)],
    ) {
        let orders: Orders = orders.into_iter().map(|step| step[..ranks].to_vec()).collect();
        orders_train_like_one(&orders, ranks, &allowing(keep), &layers);
    }
}

/// Experts of which some are frozen, with and without an adapter.
#[test]
fn frozen_and_adapted_layers_train_like_one_device() {
    let orders: Orders = vec![
        vec![vec![vec![0, 1, 4]], vec![vec![0, 2, 4], vec![3]], vec![]],
        vec![vec![vec![4, 3]], vec![vec![0, 1]], vec![vec![2, 2, 0]]],
        vec![vec![vec![0, 2]], vec![], vec![vec![1, 3], vec![0]]],
    ];
    let frozen = || layers().freeze_group(ParamGroup::from_regex("^[12]").unwrap());
    for keep in [Keep::Pass, Keep::MicroBatch] {
        orders_train_like_one(&orders, 3, &allowing(keep), &frozen);
    }
    // Factors of B are not zero: those of A get gradients from the first step on.
    let adapted = crate::common::reference::filled(layers().apply_lora(Lora::new(2, 4.0)));
    orders_train_like_one(&orders, 3, &allowing(Keep::Pass), &|| own(&adapted));
}

/// A loop of one's own: different numbers of `accumulate`s, forwards without a backward between, and a rank without
/// data.
#[test]
fn a_loop_of_ones_own_trains_like_one_device() {
    // In each step the layers of each micro-batch, of two ranks.
    let orders = [[vec![vec![0, 1, 4], vec![2]], vec![vec![0, 3, 4]]], [vec![], vec![vec![1], vec![4, 2], vec![0]]]];
    let ran = |size: usize, config: DataParallelConfig| {
        let threads = launch::threads(size).timeout(Duration::from_secs(30));
        let ran = threads.run(|world| {
            let mut model = own_for(&layers(), &config).data_parallel(&world, config.clone())?;
            let mut optim = optimizer();
            for (step, of_ranks) in orders.iter().enumerate() {
                if size > 1 && world.rank() == 1 {
                    // It ends with the next backward.
                    drop(layers_of(&model, &[3, 4]));
                }
                let mine = of_ranks.iter().enumerate().filter(|(rank, _)| size == 1 || *rank == world.rank());
                let mut losses = mine.flat_map(|(rank, orders)| {
                    orders.iter().enumerate().map(move |(number, order)| (input(step, rank, number), order.clone()))
                });
                let mut next = losses.next();
                let grads = loop {
                    let Some(batch) = next.take() else { break model.backward_without_data()? };
                    next = losses.next();
                    let loss = ordered(&model, beside(&model, batch));
                    match next {
                        Some(_) => model.accumulate(loss)?,
                        None => break model.backward(loss)?,
                    }
                };
                let mut done = model.step_micro_batches(Vec::<Batch>::new(), |layers, batch| loss(layers, batch))?;
                done.grads = grads;
                model = model.optimize(&mut optim, 0.05, done)?;
            }
            Ok(values(&model.assemble()?))
        });
        ran.unwrap().swap_remove(0)
    };
    let expected = ran(1, DataParallelConfig::new());
    for keep in [Keep::Pass, Keep::MicroBatch, Keep::Step] {
        all_same(&format!("{keep:?}"), &expected, &ran(2, allowing(keep)), 3e-4);
    }
}

fn layers_of(layers: &[Linear], order: &[usize]) -> Tensor<2> {
    let device = layers[0].weight.base().device();
    order.iter().fold(Tensor::ones([1, WIDTH], &device), |x, place| layers[*place].forward(x))
}

/// Experts that are split by hand over an axis of their own: the ranks that share a replica use the same ones, and wait
/// for each other in the middle of each.
#[test]
fn experts_that_are_split_by_hand_train_like_one_device() {
    let losses = |dp: usize, tp: usize, config: DataParallelConfig| {
        let threads = launch::threads(dp * tp).timeout(Duration::from_secs(30));
        let ran = threads.run(|world| {
            let mesh = Mesh::new(&world, [("dp", dp), ("tp", tp)])?;
            let (replicas, group) = (mesh.axis("dp")?, mesh.axis("tp")?);
            let expert = |seed| ParallelFeedForwardConfig::new(96, 130).with_seed(Some(seed)).init(&group, &device());
            let experts: Vec<ParallelFeedForward> = (0..4).map(expert).collect::<Result<_, _>>()?;
            let experts = if is_demanded(&config) { on_checkpointing(experts) } else { experts };
            let mut model = experts.data_parallel(&replicas, config.clone())?;
            let mut optim = optimizer();
            let mut losses = Vec::new();
            for step in 0..4 {
                let orders: [&[usize]; 2] = [&[0, 1, 3], &[[2, 0], [1, 2], [3, 1], [0, 0]][step]];
                let mine = (0..2).filter(|replica| dp == 1 || *replica == replicas.rank());
                let batches = mine.map(|replica| {
                    let x = Numbers((step * 2 + replica) as u64).tensor::<2>([2 + replica, 96], &device());
                    (x, orders[replica].to_vec())
                });
                let done = model.step_micro_batches(batches, |experts, (x, order): (Tensor<2>, Vec<usize>)| {
                    let run = |x, place: &usize| experts[*place].forward(x).expect("the others run it too");
                    order.iter().fold(x, run).powi_scalar(2).mean()
                })?;
                losses.push(done.loss.item());
                model = model.optimize(&mut optim, 0.05, done)?;
            }
            Ok(losses)
        });
        ran.unwrap().swap_remove(0)
    };
    let expected = losses(1, 1, DataParallelConfig::new());
    for (expected, found) in expected.iter().zip(losses(2, 2, allowing(Keep::Pass))) {
        assert!((found - expected).abs() <= 2e-5 * expected, "{found}, not {expected}");
    }
}

/// Ranks evaluate with other layers and as often as the others, before steps and behind them.
#[test]
fn ranks_evaluate_each_its_own() {
    launch::threads(3)
        .timeout(Duration::from_secs(30))
        .run(|world| {
            let mut model = own_for(&layers(), &allowing(Keep::Pass)).data_parallel(&world, allowing(Keep::Pass))?;
            let mut optim = optimizer();
            for turn in 0..3 {
                let whole = model.assemble()?;
                let order: [&[usize]; 3] = [&[0, 1, 2, 3, 4], &[4, 1], &[]];
                let order = order[(world.rank() + turn) % 3];
                let found =
                    model.forward_with(Tensor::<1>::zeros([1], &device()), |layers, _| layers_of(layers, order))?;
                let expected = layers_of(&whole, order).into_data();
                for (found, expected) in found.into_data().iter::<f32>().zip(expected.iter::<f32>()) {
                    assert!((found - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{found} for {expected}");
                }
                let batch = (input(turn, world.rank(), 0), vec![(world.rank() + turn) % 5, 2]);
                let done = model.step(batch, |layers, batch| ordered(layers, batch))?;
                model = model.optimize(&mut optim, 0.05, done)?;
            }
            Ok(())
        })
        .unwrap();
}

/// Each block is gathered once a pass for all that use it, whoever skips it; each gather takes one message more, as
/// does each step and the end of each micro-batch.
#[test]
fn a_block_is_gathered_once_for_all_that_use_it() {
    // The layers that ranks use, and how many groups are gathered for it. Backward has no need of the first layer's
    // weight, and that in use at the end of a forward is there still.
    let cases: [([&[usize]; 3], u64); 4] = [
        ([&[0, 1, 2, 3, 4], &[0, 1, 2, 3, 4], &[0, 1, 2, 3, 4]], 8),
        // Dropped layers, and early exit.
        ([&[0, 1, 2, 3, 4], &[0, 2, 4], &[0, 1]], 8),
        // Experts.
        ([&[0, 1, 4], &[0, 2, 4], &[0, 3, 4]], 8),
        ([&[0, 4], &[0, 4], &[0, 4]], 2),
    ];
    for (orders, groups) in cases {
        launch::threads(3)
            .timeout(Duration::from_secs(30))
            .run(|world| {
                let mut model =
                    own_for(&layers(), &allowing(Keep::Pass)).data_parallel(&world, allowing(Keep::Pass))?;
                for _ in 0..2 {
                    let before = model.counters();
                    let batch = || (input(0, 0, 0), orders[world.rank()].to_vec());
                    model.step_micro_batches([batch(), batch()], |layers, batch| ordered(layers, batch))?;
                    let counted = model.counters() - before;
                    assert_eq!(counted.parameters.of("all_gather").calls, 2 * groups, "{orders:?}");
                    let said = counted.control.of("all_gather");
                    assert_eq!((said.calls, said.bytes), (2 * groups + 3, (2 * groups + 3) * 2 * 8), "{orders:?}");
                }
                Ok(())
            })
            .unwrap();
    }
}

/// Whatever goes wrong on a rank, while others wait for what they want, ends all.
#[test]
fn failures_end_all_ranks() {
    type Model = Replica<Eager<Vec<Linear>>>;
    // Given the model, and a copy of it from before the last step.
    type Otherwise = fn(&mut Model, &Model) -> Result<(), Error>;
    let cases: [(&str, Otherwise); 4] = [
        ("in the middle", |model, _| {
            let batch = (input(0, 0, 0), vec![0, 1]);
            model.step(batch, |layers, batch| {
                drop(layers[0].forward(batch.0.clone()));
                assert!(batch.1.is_empty(), "in the middle");
                ordered(layers, batch)
            })?;
            Ok(())
        }),
        ("weight is -1", |model, _| {
            let x = input(0, 0, 0);
            model.step(x, |layers, x| Loss::sum(layers[1].forward(x).sum(), -1.0))?;
            Ok(())
        }),
        ("of a copy of it from before a step", |_, copy| {
            drop(copy[3].forward(beside(copy, input(0, 0, 0))));
            Ok(())
        }),
        ("it left", |_, _| Err(Error::user("it left"))),
    ];
    for (words, otherwise) in cases {
        let began = Instant::now();
        let ended = launch::threads(3).timeout(Duration::from_secs(20)).run(|world| {
            let mut model = own_for(&layers(), &allowing(Keep::Pass)).data_parallel(&world, allowing(Keep::Pass))?;
            let mut optim = optimizer();
            let mut copy = model.clone();
            for step in 0..2 {
                if step == 1 && world.rank() == 1 {
                    otherwise(&mut model, &copy)?;
                }
                copy = model.clone();
                let batch = (input(step, world.rank(), 0), vec![0, 2 + world.rank()]);
                let done = model.step(batch, |layers, batch| ordered(layers, batch))?;
                model = model.optimize(&mut optim, 0.05, done)?;
            }
            Ok(())
        });
        let error = ended.unwrap_err().to_string();
        assert!(error.contains(words), "`{words}` is missing in: {error}");
        assert!(began.elapsed() < Duration::from_secs(15), "nobody waits for the time-out: {error}");
    }
}

/// Without the setting the error says first that there is one, also where some ranks have no data.
#[test]
fn the_error_names_the_setting() {
    for without_data in [false, true] {
        let ended = launch::threads(3).timeout(Duration::from_secs(4)).run(|world| {
            let mut model = wrap(&world, &layers(), config(Sharding::Parameters))?;
            let batch = (input(0, 0, 0), vec![world.rank(), 4]);
            let none = without_data && world.rank() == 2;
            model.step_micro_batches((!none).then_some(batch), |layers, batch| ordered(layers, batch))?;
            Ok(())
        });
        let error = ended.unwrap_err().to_string();
        let (setting, other) = (error.find("allow_unused_parameters"), error.find("captured"));
        assert!(setting.is_some() && setting < other, "{error}");
    }
}

/// A rank that waits for the others in another way, while they wait for its rows, is told what it may not do.
#[test]
fn a_rank_that_waits_in_another_way_is_told_so() {
    let ended = launch::threads(2).timeout(Duration::from_secs(3)).run(|world| {
        let model = own_for(&layers(), &allowing(Keep::Pass)).data_parallel(&world, allowing(Keep::Pass))?;
        drop(layers_of(&model, if world.rank() == 0 { &[0] } else { &[0, 1] }));
        world.barrier()
    });
    let error = ended.unwrap_err().to_string();
    assert!(error.contains("with `allow_unused_parameters` replicas say") && error.contains("`join`"), "{error}");
}
