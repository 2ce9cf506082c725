//! What else is done with a model of which ranks hold rows: evaluated, loaded, put together, reported, refused.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::prelude::*;
use burn::tensor::DType;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use super::parity::{share, strategy};
use crate::common::models::{Cnn, Lm as Encoder, Mlp, Numbers, device, images};
use crate::common::reference::{all_same, bytes, filled, optimizer, own, values};
use crate::common::store::Store;
use crate::grad_norm::lm::{Kind, Lm, loss};

const TIED: Kind = Kind { tied: true, frozen: true, dtype: DType::F32 };

fn meshes() -> Vec<[usize; 3]> {
    vec![[2, 1, 1], [3, 1, 1], [2, 1, 2], [2, 2, 1], [2, 2, 2]]
}

#[test]
fn evaluation_and_assembly_are_those_of_one_device() {
    let model = TIED.init(&device());
    let expected = values(&model);
    let tokens = || Numbers(5).classes::<2>([6, 5], 13, &Device::flex());
    let forward = |model: &Lm, tokens: Tensor<2, Int>| {
        let targets = tokens.clone();
        model.summed((tokens, targets)).0 / 30.0
    };
    let alone = forward(&model.valid(), tokens()).into_scalar::<f32>();
    for axes in meshes() {
        for keep in [Keep::Pass, Keep::MicroBatch, Keep::Step] {
            // A pipeline keeps nothing for a micro-batch.
            if axes[1] > 1 && keep == Keep::MicroBatch {
                continue;
            }
            launch::threads(axes.iter().product())
                .run(|world| {
                    let strategy = strategy(axes, TIED, Sharding::Parameters, keep);
                    let mut split = own(&model).parallelize(&world, &strategy)?;
                    if axes[1] > 1 {
                        let replica = split.mesh().coordinate("dp")?;
                        split.step(share(0, replica, axes[0]), loss)?;
                    }
                    for _ in 0..2 {
                        let found = split.forward_with(tokens(), forward)?.into_scalar::<f32>();
                        assert!((found - alone).abs() < 1e-5 * alone, "{axes:?} {keep:?}: {found} {alone}");
                    }
                    all_same(&format!("{axes:?}"), &expected, &values(&split.assemble()?), 0.0);
                    Ok(())
                })
                .unwrap();
        }
    }
}

#[test]
fn each_rank_holds_its_rows() {
    let model = TIED.init(&device());
    launch::threads(4)
        .run(|world| {
            let model =
                own(&model).parallelize(&world, &strategy([4, 1, 1], TIED, Sharding::Parameters, Keep::Pass))?;
            // 13 words of 8: 4 rows, of which the last rank has one.
            assert_eq!(model.report().sharding, Sharding::Parameters);
            assert!(model.report().to_string().contains("parameters"), "{}", model.report());
            let found = values(model.local());
            let dims: BTreeMap<&str, &[usize]> =
                found.iter().map(|(path, whole)| (path.as_str(), whole.dims.as_slice())).collect();
            assert_eq!(dims["tokens.weight"], [4, 8]);
            assert_eq!(dims["layers.1.up.bias"], [2]);
            let padding = &found["tokens.weight"].values[8..];
            assert_eq!(padding.iter().all(|x| *x == 0.0), world.rank() == 3);
            Ok(())
        })
        .unwrap();
}

#[test]
fn rows_of_lazy_parameters_are_loaded_and_no_rank_makes_more() {
    let trained = filled(Encoder::new(11, 16, 2, &device()));
    let expected = values(&trained);
    let elements: usize = expected.values().map(|whole| whole.values.len()).sum();
    for ranks in [2, 4] {
        let read = launch::threads(ranks)
            .run(|world| {
                let data = DataParallelConfig::new().with_sharding(Sharding::Parameters);
                let strategy = Strategy::new().with_data(data).with_engine(Engine::Captured);
                let lazy = Encoder::lazy(11, 16, 2, &device());
                let all = bytes(&lazy).lazy;
                let model = lazy.parallelize(&world, &strategy)?;
                assert_eq!(bytes(model.local()).lazy, all, "nothing is made by wrapping");
                let mut store = Store::of(expected.clone());
                let model = model.load(&mut store)?;
                let held: usize = bytes(model.local()).bytes.values().sum();
                // Padding is at most a row for each parameter.
                assert!(held <= elements * 4 / ranks + expected.len() * 64 * 4, "{held} of {}", elements * 4);
                all_same("loaded", &expected, &values(&model.assemble()?), 0.0);
                Ok(store.elements_read())
            })
            .unwrap();
        assert_eq!(read.iter().sum::<usize>(), elements, "every element is read by one rank");
    }
}

#[test]
fn lazy_parameters_are_made_by_the_first_step() {
    let data = DataParallelConfig::new().with_sharding(Sharding::Parameters);
    let strategy = Strategy::new().with_data(data).with_engine(Engine::Captured);
    let all = launch::threads(2)
        .run(|world| {
            let mut model = Encoder::lazy(11, 16, 1, &device()).parallelize(&world, &strategy)?;
            let mut numbers = Numbers(3);
            let mut words = || numbers.classes::<2>([2, 5], 11, &device());
            model.step((words(), words()), |model, (tokens, targets)| model.loss(tokens, targets))?;
            assert_eq!(bytes(model.local()).lazy, 0);
            Ok(values(&model.assemble()?))
        })
        .unwrap();
    assert_eq!(all[0], all[1]);
}

#[test]
fn what_goes_with_whole_parameters_only_is_refused() {
    launch::threads(2)
        .run(|world| {
            let wrap = |data: DataParallelConfig| {
                let strategy = Strategy::new().with_data(data).with_engine(Engine::Captured);
                TIED.init(&device()).parallelize(&world, &strategy).map(|_| ())
            };
            let sharded = || DataParallelConfig::new().with_sharding(Sharding::Parameters);
            let hook = wrap(sharded().with_comm_hook(burn_parallel::data_parallel::AllReduceHook)).unwrap_err();
            assert!(hook.to_string().contains("communication hook"), "{hook}");
            let compare = wrap(sharded().with_compare_every(2)).unwrap_err();
            assert!(compare.to_string().contains("compare_every"), "{compare}");
            Ok(())
        })
        .unwrap();
}

#[test]
fn rows_do_not_train_without_their_replicas() {
    launch::threads(2)
        .run(|world| {
            let split = TIED.init(&device()).tensor_parallel(&world.split(world.rank() as u64, 0)?, Plan::new())?;
            let data = DataParallelConfig::new().with_sharding(Sharding::Parameters);
            let mut alone = split.data_parallel(&world, data)?.into_inner();
            let error = alone.step(share(0, world.rank(), 2), loss).unwrap_err();
            assert!(error.to_string().contains("data_parallel"), "{error}");
            Ok(())
        })
        .unwrap();
}

#[test]
fn buffers_are_shared_and_rows_are_not() {
    let model = TIED.init(&device());
    let expected = values(&model);
    launch::threads(2)
        .run(|world| {
            let strategy = strategy([2, 1, 1], TIED, Sharding::Parameters, Keep::Pass);
            // Frozen parameters are no buffers.
            let model = own(&model).parallelize(&world, &strategy)?.sync_buffers()?;
            all_same("after sync_buffers", &expected, &values(&model.assemble()?), 0.0);
            Ok(())
        })
        .unwrap();
}

/// Running statistics are each replica's own, as without rows.
#[test]
fn batch_norms_and_random_numbers_are_those_of_whole_replicas() {
    let train = |sharding: Sharding| {
        launch::threads(2)
            .run(|world| {
                let data = DataParallelConfig::new().with_sharding(sharding);
                let strategy = Strategy::new().with_data(data).with_engine(Engine::Captured);
                let mut model = own(&Cnn::new(&device())).parallelize(&world, &strategy)?;
                let mut optim = optimizer();
                for step in 0..3 {
                    let batch = images(4, step * 2 + world.rank() as u64, &device());
                    let step = model.step(batch, |model, (images, targets)| model.loss(images, targets))?;
                    model = model.optimize(&mut optim, 0.05, step)?;
                }
                let mut dropped = own(&Mlp::new(0.5, &device())).parallelize(&world, &strategy)?;
                let x = Numbers(world.rank() as u64).tensor::<2>([5, 6], &device());
                let loss = dropped.step(x, |model, x| model.forward(x).powi_scalar(2).mean())?.loss.item();
                Ok((values(&model.assemble()?), loss))
            })
            .unwrap()
    };
    let (expected, found) = (train(Sharding::None), train(Sharding::Parameters));
    assert!(expected[0].0["norm.running_mean"] != expected[1].0["norm.running_mean"]);
    for (expected, found) in expected.iter().zip(&found) {
        all_same("batch norms", &expected.0, &found.0, 1e-4);
        assert!((expected.1 - found.1).abs() < 1e-6 * expected.1.abs(), "{} {}", expected.1, found.1);
    }
}
