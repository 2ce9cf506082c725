//! Models that change after they were wrapped: what is unfrozen trains, layers put in take part, the rest is an error.

use std::time::Duration;

use burn::module::{Lora, Module, ParamGroup};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn_parallel::data_parallel::{Eager, Replica};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::Engine;

use crate::common::checkpointing::{own_by, own_for};
use crate::common::fill::{filled, filled_from};
use crate::common::models::device;
use crate::common::reference::{all_same, close, values};

type Layers = Vec<Linear>;

const WORLDS: [usize; 4] = [1, 2, 3, 4];
/// Rows that each rank has.
const ROWS: usize = 2;

fn layers() -> Layers {
    filled((0..3).map(|_| LinearConfig::new(4, 4).init(&device())).collect())
}

fn head(seed: u64) -> Linear {
    filled_from(seed, LinearConfig::new(4, 4).init(&device()))
}

fn rows(step: usize, rows: std::ops::Range<usize>) -> Tensor<2> {
    let numbers: Vec<f32> =
        rows.clone().flat_map(|row| (0..4).map(move |i| ((step * 31 + row * 7 + i * 3) % 11) as f32 / 11.0)).collect();
    Tensor::from_data(TensorData::new(numbers, [rows.len(), 4]), &device())
}

fn loss(model: &Layers, x: Tensor<2>) -> Tensor<1> {
    model.iter().fold(x, |x, layer| layer.forward(x).tanh()).powi_scalar(2).mean()
}

fn sgd() -> ModuleOptimizer {
    SgdConfig::new().init()
}

fn first() -> ParamGroup {
    ParamGroup::from_paths(vec!["0.weight", "0.bias"])
}

/// What one device has after steps, before some of which the model is changed.
fn alone(model: Layers, world: usize, steps: usize, change: impl Fn(usize, Layers) -> Layers) -> Layers {
    let (mut model, mut optim) = (model, sgd());
    for step in 0..steps {
        model = change(step, model);
        let grads = GradientsParams::from_grads(loss(&model, rows(step, 0..world * ROWS)).backward(), &model);
        model = optim.step(0.5, model, grads);
    }
    model
}

/// How a replica makes a step on its rows.
type Way = fn(&mut Replica<Eager<Layers>>, Tensor<2>) -> Result<GradientsParams, Error>;

const WAYS: [(&str, Way); 4] = [
    ("step", |model, x| Ok(model.step(x, loss)?.grads)),
    ("backward", |model, x| {
        let loss = loss(model, x);
        model.backward(loss)
    }),
    ("micro-batches", |model, x| Ok(model.step_micro_batches(x.split(1, 0), loss)?.grads)),
    ("accumulate", |model, x| {
        let [a, b] = x.split(1, 0).try_into().unwrap();
        let one = loss(model, a);
        model.accumulate(one)?;
        let other = loss(model, b);
        model.backward(other)
    }),
];

fn share(rank: &Rank) -> std::ops::Range<usize> {
    rank.rank() * ROWS..(rank.rank() + 1) * ROWS
}

#[test]
fn parameters_that_are_unfrozen_after_wrapping_train() {
    for world in WORLDS {
        let expected = alone(layers().freeze_group(first()), world, 4, |step, model| match step {
            1 => model.unfreeze_group(first()),
            _ => model,
        });
        for (name, way) in WAYS {
            launch::threads(world)
                .run(|rank| {
                    let model = layers().freeze_group(first());
                    let (mut model, mut optim) = (model.data_parallel(&rank, DataParallelConfig::new())?, sgd());
                    for step in 0..4 {
                        if step == 1 {
                            model = model.unfreeze_group(first());
                        }
                        let grads = way(&mut model, rows(step, share(&rank)))?;
                        assert_eq!(grads.len(), if step == 0 { 4 } else { 6 });
                        model = optim.step(0.5, model, grads);
                    }
                    all_same(&format!("{name} on {world}"), &values(&expected), &values(&*model), 1e-5);
                    Ok(())
                })
                .unwrap();
        }
    }
}

#[test]
fn a_layer_put_in_after_wrapping_takes_part_from_its_first_step_on() {
    for world in WORLDS {
        let expected = alone(layers(), world, 4, |step, mut model| {
            if step == 2 {
                model[2] = head(5);
            }
            model
        });
        for (name, way) in WAYS {
            launch::threads(world)
                .run(|rank| {
                    let (mut model, mut optim) = (layers().data_parallel(&rank, DataParallelConfig::new())?, sgd());
                    for step in 0..4 {
                        if step == 2 {
                            // Where a forward is still to come, the ranks need not bring the same.
                            let equal = matches!(name, "backward" | "accumulate");
                            model[2] = head(if equal { 5 } else { 5 + rank.rank() as u64 });
                        }
                        let (buckets, grads) = (model.buckets(), way(&mut model, rows(step, share(&rank)))?);
                        assert_eq!(grads.len(), 6, "{name} on {world}");
                        assert_eq!(model.buckets(), buckets, "what has gone is reduced no more");
                        model = optim.step(0.5, model, grads);
                    }
                    all_same(&format!("{name} on {world}"), &values(&expected), &values(&*model), 1e-5);
                    Ok(())
                })
                .unwrap();
        }
    }
}

#[test]
fn layers_of_unequal_values_are_refused_where_the_forward_has_run() {
    for world in [2, 4] {
        let error = launch::threads(world).timeout(Duration::from_secs(20)).run(|rank| {
            let mut model = layers().data_parallel(&rank, DataParallelConfig::new())?;
            model[1] = head(5 + u64::from(rank.rank() == world - 1));
            let loss = loss(&model, rows(0, share(&rank)));
            model.backward(loss).map(drop)
        });
        match error.unwrap_err() {
            Error::ModelMismatch { rank, path, problem, .. } => {
                assert_eq!((rank, path.as_str()), (world - 1, "1.weight"));
                assert!(problem.contains("put in after wrapping"), "{problem}");
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_model_that_changes_on_some_ranks_only_is_an_error_with_its_path() {
    let check = |world: usize, sharding: Sharding, (name, way): (&str, Way)| {
        let cases = [0, world - 1].into_iter().flat_map(|odd| [(odd, false), (odd, true)]);
        for (odd, unfreezes) in cases {
            let outcome = launch::threads(world).timeout(Duration::from_secs(20)).run(|rank| {
                let config = DataParallelConfig::new().with_sharding(sharding);
                let mut model = own_for(&layers(), &config).freeze_group(first()).data_parallel(&rank, config)?;
                way(&mut model, rows(0, share(&rank)))?;
                if rank.rank() == odd {
                    match unfreezes {
                        true => model = model.unfreeze_group(first()),
                        false => model[0] = own_for(&head(2), &DataParallelConfig::new().with_sharding(sharding)),
                    }
                }
                way(&mut model, rows(1, share(&rank))).map(drop)
            });
            match outcome.unwrap_err() {
                Error::ModelMismatch { path, problem, .. } => {
                    assert_eq!(path, "0.weight", "{name}, {sharding}");
                    assert!(problem.contains("after wrapping"), "{problem}");
                }
                other => panic!("{name}, {sharding}: {other}"),
            }
        }
    };
    for world in [2, 3, 4] {
        WAYS.into_iter().for_each(|way| check(world, Sharding::None, way));
    }
    for way in WAYS {
        check(3, Sharding::Optimizer, way);
        check(3, Sharding::Gradients, way);
        // A loop of one's own gathers in its forward what the others do not.
        if matches!(way.0, "step" | "micro-batches") {
            check(3, Sharding::Parameters, way);
        }
    }
}

#[test]
fn replicas_of_split_and_cut_models_train_what_is_unfrozen() {
    let expected = alone(layers().freeze_group(first()), 2, 4, |step, model| match step {
        1 => model.unfreeze_group(first()),
        _ => model,
    });
    let plan = Plan::new().shard("0.weight", 1).shard("0.bias", 0).shard("1.weight", 0);
    for other in [1, 2] {
        launch::threads(2 * other)
            .run(|world| {
                let mesh = Mesh::new(&world, [("dp", 2), ("other", other)])?;
                let (dp, other) = (mesh.axis("dp")?, mesh.axis("other")?);
                let own = dp.rank() * ROWS..(dp.rank() + 1) * ROWS;
                let model = layers().freeze_group(first()).tensor_parallel(&other, &plan)?;
                let (mut model, mut optim) = (model.data_parallel(&dp, DataParallelConfig::new())?, sgd());
                for step in 0..4 {
                    if step == 1 {
                        model = model.unfreeze_group(first());
                    }
                    let grads = model.step(rows(step, own.clone()), loss)?.grads;
                    assert_eq!(grads.len(), if step == 0 { 4 } else { 6 });
                    model = optim.step(0.5, model, grads);
                }
                all_same("dp x tp", &values(&expected), &values(&model.assemble()?), 1e-5);

                let model = layers().freeze_group(first());
                let mut model = model.pipeline_parallel(&other, PipelineConfig::new(2))?;
                model.prepare(rows(0, own.clone()), loss)?;
                let (mut model, mut optim) = (model.data_parallel(&dp, DataParallelConfig::new())?, sgd());
                for step in 0..4 {
                    if step == 1 {
                        model = model.unfreeze_group(first());
                    }
                    let grads = model.step(rows(step, own.clone()), loss)?.grads;
                    model = optim.step(0.5, model, grads);
                }
                all_same("dp x pp", &values(&expected), &values(&model.assemble()?), 1e-5);
                Ok(())
            })
            .unwrap();
    }
}

#[derive(Module, Debug)]
struct Twice {
    a: Linear,
    b: Linear,
}

fn twice_loss(model: &Twice, x: Tensor<2>) -> Tensor<1> {
    model.b.forward(model.a.forward(x).tanh()).powi_scalar(2).mean()
}

#[test]
fn one_parameter_in_two_fields_is_an_error_once_they_differ() {
    let twice = || {
        let one = head(3);
        Twice { b: Linear { bias: None, ..one.clone() }, a: one }
    };
    for world in WORLDS {
        let (mut single, x) = (twice(), rows(0, 0..world * ROWS));
        let grads = GradientsParams::from_grads(twice_loss(&single, x).backward(), &single);
        single = sgd().step(0.5, single, grads);
        let error = launch::threads(world).timeout(Duration::from_secs(20)).run(|rank| {
            let mut model = twice().data_parallel(&rank, DataParallelConfig::new())?;
            let grads = model.step(rows(0, share(&rank)), twice_loss)?.grads;
            model = sgd().step(0.5, model, grads);
            // Burn's optimizers have moved the first alone.
            all_same("as burn alone does", &values(&single), &values(&*model), 1e-5);
            // Tied again, they are one parameter.
            let weight = model.a.weight.clone();
            let untied = std::mem::replace(&mut model.b.weight, weight);
            model.step(rows(1, share(&rank)), twice_loss)?;
            model.b.weight = untied;
            model.step(rows(2, share(&rank)), twice_loss).map(drop)
        });
        let text = error.unwrap_err().to_string();
        assert!(text.contains("`b.weight` shares its id") && text.contains("Keep one `Param`"), "{text}");
    }
}

/// Where replicas divide the update of a parameter, the result goes into all its fields.
#[test]
fn one_parameter_in_two_fields_stays_one_where_its_update_is_divided() {
    const WORLD: usize = 2;
    let layer = || Linear { bias: None, ..head(3) };
    let (mut once, mut optim, mut expected) = (layer(), sgd(), Vec::new());
    for step in 0..3 {
        let both = Twice { b: once.clone(), a: once.clone() };
        let loss = twice_loss(&both, rows(step, 0..WORLD * ROWS));
        let grads = GradientsParams::from_grads(loss.backward(), &once);
        expected.push(loss.into_scalar::<f32>());
        once = optim.step(0.5, once, grads);
    }
    let stages = [Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters];
    for (sharding, engine) in stages.into_iter().flat_map(|one| [(one, Engine::Eager), (one, Engine::Captured)]) {
        let data = DataParallelConfig::new().with_sharding(sharding);
        let strategy = Strategy::new().with_dp(WORLD).with_data(data).with_engine(engine);
        let losses = launch::threads(WORLD).timeout(Duration::from_secs(20)).run(|rank| {
            let layer = layer();
            let model = Twice { b: layer.clone(), a: layer };
            let mut model = own_by(&model, &strategy).parallelize(&rank, &strategy)?;
            let (mut optim, mut losses) = (sgd(), Vec::new());
            for step in 0..3 {
                let step = model.step(rows(step, share(&rank)), twice_loss)?;
                losses.push(step.loss.item() as f32);
                model = model.optimize(&mut optim, 0.5, step)?;
            }
            Ok(losses)
        });
        for (found, expected) in losses.unwrap()[0].iter().zip(&expected) {
            close(&format!("{sharding:?}, {engine:?}"), *expected, *found);
        }
    }
}

#[test]
fn the_model_of_a_replica_is_as_it_was_before_it_was_wrapped() {
    let lora = || Lora::new(2, 4.0);
    let tuned = filled_from(9, layers().apply_lora(lora()));
    for world in [1, 2, 3] {
        let expected = alone(tuned.clone(), world, 3, |_, model| model);
        launch::threads(world)
            .run(|rank| {
                let mut model = layers().data_parallel(&rank, DataParallelConfig::new())?;
                model.step(rows(0, share(&rank)), loss)?;
                let clone = model.clone();
                // Adapters of burn find parameters without a hook, although a clone of the replica lives on.
                let model = filled_from(9, model.into_inner().apply_lora(lora()));
                assert!(model.iter().all(|layer| layer.weight.adapter().is_some()));
                let (mut model, mut optim) = (model.data_parallel(&rank, DataParallelConfig::new())?, sgd());
                for step in 0..3 {
                    let grads = model.step(rows(step, share(&rank)), loss)?.grads;
                    assert_eq!(grads.len(), 6);
                    model = optim.step(0.5, model, grads);
                }
                all_same("adapters", &values(&expected), &values(&*model), 1e-5);
                // What came with adapters keeps them.
                let model = model.into_inner();
                assert!(model.iter().all(|layer| layer.weight.adapter().is_some()));
                drop(clone);
                let grads = GradientsParams::from_grads(loss(&model, rows(3, 0..2)).backward(), &model);
                assert_eq!(grads.len(), 6);
                Ok(())
            })
            .unwrap();
    }
    let twice = || {
        let one = head(3);
        Twice { b: Linear { bias: None, ..one.clone() }, a: one }
    };
    let grads = |model: &Twice| GradientsParams::from_grads(twice_loss(model, rows(0, 0..2)).backward(), model);
    let alone = twice();
    let expected = grads(&alone).get::<2>(alone.a.weight.id).unwrap().into_data();
    launch::threads(2)
        .run(|rank| {
            let model = twice().data_parallel(&rank, DataParallelConfig::new())?.into_inner();
            let found = grads(&model).get::<2>(model.a.weight.id).unwrap().into_data();
            found.assert_eq(&expected, true);
            Ok(())
        })
        .unwrap();
}
