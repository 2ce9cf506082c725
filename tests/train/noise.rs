//! The noise of gradients: on every mesh that of the same micro-batches on one device, and what is known of it.

use std::ops::Range;

use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn::tensor::{DType, TensorData};
use burn_parallel::batch::{BatchSplit, GradientNoise, NoNoise, NoiseScale};
use burn_parallel::prelude::*;
use burn_parallel::sharding::{Keep, Sharding};
use burn_parallel::train::{Clip, Engine, Norm};

use crate::common::checkpointing::own_by;
use crate::common::models::{Numbers, device};
use crate::common::reference::gradient_values;
use crate::grad_norm::lm::{self, Batch, Kind, Lm, ROWS};

const KIND: Kind = Kind { tied: true, frozen: true, dtype: DType::F32 };

fn part(batch: &Batch, rows: Range<usize>) -> Batch {
    (batch.0.clone().narrow(0, rows.start, rows.len()), batch.1.clone().narrow(0, rows.start, rows.len()))
}

/// The square of the mean gradient over some rows, and their tokens.
fn square(model: &Lm, batch: Batch) -> (f64, f64) {
    let (sum, items) = model.summed(batch);
    let grads = GradientsParams::from_grads((sum / items as f64).backward(), model);
    let squares = gradient_values(model, &grads).into_values().flat_map(|whole| whole.values);
    (squares.map(|x| f64::from(x).powi(2)).sum(), items as f64)
}

/// By the formula, of the gradients of these rows of a batch.
fn expected(model: &Lm, parts: &[Range<usize>], batch: &Batch) -> GradientNoise {
    let squares: Vec<(f64, f64)> = parts.iter().map(|rows| square(model, part(batch, rows.clone()))).collect();
    let (whole, items) = square(model, part(batch, 0..ROWS));
    let squares: f64 = squares.iter().map(|(square, items)| square * items).sum();
    let trace = (squares - items * whole) / (parts.len() - 1) as f64;
    GradientNoise { squared_norm: whole - trace / items, trace, micro_batches: parts.len() as u64, items }
}

/// The micro-batches of all replicas.
fn all_parts(split: &BatchSplit) -> Vec<Range<usize>> {
    (0..split.replicas()).flat_map(|replica| split.micro_batches(replica)).collect()
}

/// The last step's norm comes with it where replicas divide rows: those before were asked for in the same way.
const MEASURED: usize = 4;

/// What each rank measures in a step that clips nothing, and in some that do. Nothing learns.
fn measured(
    whole: &Lm,
    strategy: &Strategy,
    ranks: usize,
    split: &BatchSplit,
) -> Vec<[Result<GradientNoise, NoNoise>; MEASURED]> {
    launch::threads(ranks)
        .run(|world| {
            let mut model = own_by(whole, strategy).parallelize(&world, strategy)?;
            let replica = model.mesh().coordinate("dp")?;
            let mut optim: ModuleOptimizer = SgdConfig::new().init();
            let mut found = [Err(NoNoise::Off); MEASURED];
            for (step, found) in found.iter_mut().enumerate() {
                let batch = lm::batch(step, &device());
                let rows = split.micro_batches(replica).into_iter().map(|rows| part(&batch, rows));
                let done = model.step_micro_batches(rows, lm::loss)?;
                assert!(matches!(done.noise(), Err(NoNoise::NoNorm | NoNoise::BetweenStages)));
                // Clipping comes after.
                let clip = if step == 0 { Clip::never() } else { Clip::at(1e-3) };
                let done = done.clip_grad_norm(&model, clip)?;
                *found = done.noise();
                if strategy.data.sharding == Sharding::Optimizer && strategy.pp * strategy.tp == 1 {
                    assert_eq!(done.counters.norm.total().calls, u64::from(step < 3), "step {step}");
                }
                model = model.optimize(&mut optim, 0.0, done)?;
            }
            Ok(found)
        })
        .unwrap()
}

fn close(found: GradientNoise, expected: GradientNoise, what: &str) {
    assert_eq!((found.micro_batches, found.items), (expected.micro_batches, expected.items), "{what}");
    let near = |a: f64, b: f64| (a - b).abs() <= 2e-4 * b.abs().max(expected.trace / expected.items);
    let same = near(found.squared_norm, expected.squared_norm) && near(found.trace, expected.trace);
    assert!(same, "{what}: {found:?}, not {expected:?}");
}

/// Tied weights in several places and several stages, padding, frozen layers, unequal shares; clipped or not.
#[test]
fn every_mesh_measures_what_one_device_does() {
    let whole = KIND.init(&device());
    let data = |sharding| DataParallelConfig::new().with_noise_scale_every(1).with_sharding(sharding);
    let pipeline = |axes: [usize; 3]| PipelineConfig::new(2).with_cut(lm::cut(axes[1]));
    // dp, pp, tp, what replicas divide, and the most rows at once.
    for (axes, sharding, at_once) in [
        ([1, 1, 1], Sharding::None, 2),
        ([2, 1, 1], Sharding::None, 9),
        ([4, 1, 1], Sharding::None, 1),
        ([2, 1, 2], Sharding::None, 3),
        ([1, 1, 2], Sharding::None, 4),
        ([1, 2, 1], Sharding::None, 2),
        ([2, 2, 1], Sharding::None, 9),
        ([2, 1, 1], Sharding::Optimizer, 3),
        ([4, 1, 1], Sharding::Gradients, 2),
        ([2, 1, 2], Sharding::Gradients, 3),
    ] {
        let mut strategy = Strategy::new().with_dp(axes[0]).with_data(data(sharding));
        if axes[2] > 1 {
            strategy = strategy.with_tp(axes[2], KIND.plan());
        }
        if axes[1] > 1 {
            strategy = strategy.with_pp(axes[1], pipeline(axes));
        }
        let ranks = axes.iter().product();
        let split = BatchSplit::of(&strategy, ranks, ROWS, Some(at_once)).unwrap();
        let found = measured(&whole, &strategy, ranks, &split);
        for step in 0..MEASURED {
            let expected = expected(&whole, &all_parts(&split), &lm::batch(step, &device()));
            for noise in &found {
                assert_eq!(noise[step], found[0][step], "the same on all ranks");
            }
            close(found[0][step].unwrap(), expected, &format!("{axes:?} {sharding} step {step}"));
        }
    }
}

/// Gradients are measured before the replicas sum them up, also where nobody has more than rows of the sum.
#[test]
fn replicas_that_divide_parameters_measure_what_one_device_does() {
    // dp, pp, tp, the engine, how long parameters are kept, how many ranks divide them, and the most rows at once.
    for (axes, engine, keep, sharding_ranks, at_once) in [
        ([2, 1, 1], Engine::Eager, Keep::Pass, None, 3),
        ([4, 1, 1], Engine::Eager, Keep::Step, Some(2), 2),
        ([2, 1, 1], Engine::Captured, Keep::Pass, None, 3),
        ([4, 1, 1], Engine::Captured, Keep::Step, Some(2), 2),
        ([2, 1, 2], Engine::Captured, Keep::MicroBatch, None, 3),
        ([2, 2, 1], Engine::Captured, Keep::Pass, None, 9),
    ] {
        // Stages that share a parameter see parts of its gradient.
        let kind = Kind { tied: axes[1] == 1, frozen: engine == Engine::Captured, ..KIND };
        let whole = kind.init(&device());
        let data =
            DataParallelConfig::new().with_noise_scale_every(1).with_sharding(Sharding::Parameters).with_keep(keep);
        let data = sharding_ranks.into_iter().fold(data, DataParallelConfig::with_sharding_ranks);
        let mut strategy = Strategy::new().with_dp(axes[0]).with_data(data).with_engine(engine);
        if axes[2] > 1 {
            strategy = strategy.with_tp(axes[2], kind.plan());
        }
        if axes[1] > 1 {
            strategy = strategy.with_pp(axes[1], PipelineConfig::new(2).with_cut(lm::cut(axes[1])));
        }
        let ranks = axes.iter().product();
        let split = BatchSplit::of(&strategy, ranks, ROWS, Some(at_once)).unwrap();
        let mut parts = all_parts(&split);
        if axes[1] > 1 {
            // Gradients leave the stages after each micro-batch of the pipeline.
            let halves = |run: Range<usize>| {
                let middle = run.start + run.len().div_ceil(2);
                [run.start..middle, middle..run.end]
            };
            parts = parts.into_iter().flat_map(halves).collect();
        }
        let found = measured(&whole, &strategy, ranks, &split);
        for step in 0..MEASURED {
            let expected = expected(&whole, &parts, &lm::batch(step, &device()));
            for noise in &found {
                assert_eq!(noise[step], found[0][step], "the same on all ranks");
            }
            close(found[0][step].unwrap(), expected, &format!("{axes:?} {engine:?} {keep:?} step {step}"));
        }
    }
}

/// With tied weights in two stages there is no number, and every rank says why.
#[test]
fn stages_that_share_a_divided_parameter_say_so() {
    let data = DataParallelConfig::new().with_noise_scale_every(1).with_sharding(Sharding::Parameters);
    let pipeline = PipelineConfig::new(2).with_cut(lm::cut(2));
    let strategy = Strategy::new().with_dp(2).with_data(data).with_pp(2, pipeline);
    let split = BatchSplit::of(&strategy, 4, ROWS, None).unwrap();
    let found = measured(&KIND.init(&device()), &strategy, 4, &split);
    assert!(found.iter().flatten().all(|noise| *noise == Err(NoNoise::BetweenStages)), "{found:?}");
}

/// Measured in every step, or in every third.
#[test]
fn noise_that_is_known_is_found() {
    [1, 3].into_iter().for_each(known_noise_is_found);
}

/// The gradient of a row is the row: a mean and uniform noise.
fn known_noise_is_found(every: u64) {
    const MEASUREMENTS: u64 = 500;
    let (mean, width) = ([1.0, 0.5, -0.5f32], 2.0f32);
    let (squared_norm, trace) = (1.5, 3.0 * 4.0 / 3.0);
    let found = launch::threads(2)
        .run(|rank| {
            let device = rank.device().autodiff();
            let model: Linear = LinearConfig::new(3, 1).with_bias(false).init(&device);
            let mut model = model.data_parallel(&rank, DataParallelConfig::new().with_noise_scale_every(every))?;
            let mut numbers = Numbers(5 + 1000 * rank.rank() as u64);
            let mut rows = |count: usize| {
                let row = |numbers: &mut Numbers| mean.map(|mean| mean + width * numbers.next());
                let rows: Vec<f32> = (0..count).flat_map(|_| row(&mut numbers)).collect();
                Tensor::<2>::from_data(TensorData::new(rows, [count, 3]), &device)
            };
            let mut noise = NoiseScale::with_decay(0.999);
            for step in 0..(MEASUREMENTS * every) as usize {
                // Unequal micro-batches, and unequal numbers of them.
                let counts: &[usize] = if (step + rank.rank()).is_multiple_of(4) { &[7] } else { &[2, 5, 1] };
                let batches: Vec<_> = counts.iter().map(|count| rows(*count)).collect();
                let step = model.step_micro_batches(batches, |model, x| model.forward(x).mean())?;
                noise.add(&step.clip_grad_norm(&model, Clip::never())?);
            }
            Ok(noise)
        })
        .unwrap();
    assert_eq!(found[0], found[1]);
    let noise = &found[0];
    assert_eq!(noise.steps(), MEASUREMENTS);
    let near = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 0.07, "{found}, not {expected}");
    near(noise.squared_norm(), squared_norm);
    near(noise.trace(), trace);
    assert!((noise.items().unwrap() / (trace / squared_norm) - 1.0).abs() < 0.1);
}

/// Not a bit of the training changes, nor the number of collectives.
#[test]
fn measuring_changes_nothing_else() {
    let whole = KIND.init(&device());
    let train = |every: u64| {
        launch::threads(2)
            .run(|rank| {
                let config = DataParallelConfig::new().with_noise_scale_every(every);
                let mut model = whole.clone().fork(&device()).data_parallel(&rank, config)?;
                let mut gradients = Vec::new();
                let mut calls = Vec::new();
                for step in 0..3 {
                    let batch = lm::batch(step, &device());
                    let rows = [part(&batch, 0..2 + rank.rank()), part(&batch, 4..9)];
                    let done = model.step_micro_batches(rows, lm::loss)?.clip_grad_norm(&model, 1.0)?;
                    let counters = &done.counters;
                    calls.push(
                        [counters.gradients.total(), counters.norm.total()].map(|tally| (tally.calls, tally.bytes)),
                    );
                    calls.push([(counters.control.total().calls, 0); 2]);
                    gradients.push(gradient_values(&whole, &done.grads));
                }
                Ok((gradients, calls))
            })
            .unwrap()
    };
    assert_eq!(train(1), train(0));
}

#[test]
fn where_there_is_no_number_there_is_a_reason() {
    let whole = KIND.init(&device());
    let config = |every| DataParallelConfig::new().with_noise_scale_every(every);
    launch::threads(1)
        .run(|rank| {
            let batch = lm::batch(0, &device());
            let both = || [part(&batch, 0..4), part(&batch, 4..9)];
            let model = || whole.clone().fork(&device());
            let mut off = model().data_parallel(&rank, config(0))?;
            let step = off.step_micro_batches(both(), lm::loss)?.clip_grad_norm(&off, 1.0)?;
            assert_eq!(step.noise(), Err(NoNoise::Off));
            let mut on = model().data_parallel(&rank, config(1))?;
            let step = on.step(batch.clone(), lm::loss)?.clip_grad_norm(&on, 1.0)?;
            assert_eq!(step.noise(), Err(NoNoise::OneMicroBatch));
            let infinity = Clip::at(1.0).with_norm(Norm::Infinity);
            let step = on.step_micro_batches(both(), lm::loss)?.clip_grad_norm(&on, infinity)?;
            assert_eq!(step.noise(), Err(NoNoise::OtherNorm));
            let mean = |model: &Lm, batch| {
                let (sum, items) = model.summed(batch);
                sum / items as f64
            };
            let step = on.step_sync_batch_norm(vec![(part(&batch, 0..4), 4.0), (part(&batch, 4..8), 4.0)], mean)?;
            assert_eq!(step.clip_grad_norm(&on, 1.0)?.noise(), Err(NoNoise::BatchNorm));
            let mut alone = model().tensor_parallel(&rank, KIND.plan())?;
            let step = alone.step_micro_batches(both(), lm::loss)?.clip_grad_norm(&alone, 1.0)?;
            assert_eq!(step.noise(), Err(NoNoise::NoReplicas));
            let mut noise = NoiseScale::new();
            noise.add(&step);
            assert_eq!(noise.items(), Err(NoNoise::NoReplicas));
            Ok(())
        })
        .unwrap();
}
