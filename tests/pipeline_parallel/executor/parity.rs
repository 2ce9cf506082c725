//! A pipeline trains as one device does.

use std::sync::{Arc, Mutex};

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{DType, Device, Tensor};
use burn_parallel::pipeline_parallel::schedule::{Routes, Schedule, Timetable};
use burn_parallel::pipeline_parallel::{EagerStage, Pipeline, Received, Sent};
use burn_parallel::prelude::*;

use super::messages::schedules;
use super::model::{Block, Tokens, batch, blocks, edges, forward, values, whole};

const STEPS: usize = 3;

#[derive(Debug, Clone, Copy)]
enum Optimizer {
    AdamW,
    Sgd,
}

impl Optimizer {
    fn init(self) -> (ModuleOptimizer, f64) {
        match self {
            Self::AdamW => (AdamWConfig::new().init(), 1e-2),
            Self::Sgd => (SgdConfig::new().init(), 0.3),
        }
    }
}

/// Losses and parameters of one device that sees each batch as a whole.
fn on_one_device(mut blocks: Vec<Block>, micro_batches: usize, optimizer: Optimizer) -> (Vec<f64>, Vec<Vec<f32>>) {
    let (mut optim, lr) = optimizer.init();
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let parts: Vec<(Tensor<1>, f64)> =
            batch(micro_batches, step).iter().map(|tokens| whole(&blocks, tokens)).collect();
        let weight: f64 = parts.iter().map(|(_, count)| count).sum();
        let sum = parts.into_iter().map(|(sum, _)| sum).reduce(|a, b| a + b).unwrap();
        let mean = sum / weight;
        losses.push(mean.clone().inner().into_scalar::<f64>());
        let mut grads = mean.backward();
        blocks = blocks
            .into_iter()
            .map(|block| {
                let grads = GradientsParams::from_module(&mut grads, &block);
                optim.step(lr, block, grads)
            })
            .collect();
    }
    (losses, blocks.iter().map(values).collect())
}

fn compare(schedule: &Schedule, ranks: usize, micro_batches: usize, optimizer: Optimizer) {
    compare_on(schedule, ranks, micro_batches, optimizer, Device::autodiff);
}

fn compare_on(
    schedule: &Schedule,
    ranks: usize,
    micro_batches: usize,
    optimizer: Optimizer,
    autodiff: fn(Device) -> Device,
) {
    let timetable = schedule.timetable(ranks, micro_batches).unwrap();
    let stages = timetable.stages();
    let name = format!("{schedule:?}, {ranks} ranks, {micro_batches} micro-batches, {optimizer:?}");
    let model = blocks(stages);
    let (expected, parameters) = on_one_device(model.clone(), micro_batches, optimizer);
    let trained = launch::threads(ranks)
        .threads_per_rank(1)
        .run(|rank| {
            let device = autodiff(rank.device());
            let mut held: Vec<_> = timetable
                .stages_of(rank.rank())
                .into_iter()
                .map(|stage| {
                    let block = model[stage].clone().fork(&device);
                    let run = move |block: &Block, tokens: &Tokens, received: Received| {
                        forward(stages, block, tokens, received)
                    };
                    let mine = edges(stages).into_iter().filter(|edge| edge.from == stage || edge.to == stage);
                    EagerStage::new(stage, stages, block, run).with_edges(mine)
                })
                .collect();
            let mut pipeline = Pipeline::new(&rank, timetable.clone(), &held)?;
            let (mut optim, lr) = optimizer.init();
            let mut losses = Vec::new();
            for step in 0..STEPS {
                let batch = batch(micro_batches, step);
                let seen = pipeline.evaluate(&mut held, &batch)?.mean_loss();
                let run = pipeline.step(&mut held, &batch)?;
                assert_eq!(seen, run.mean_loss(), "{name}: evaluation sees the same loss");
                losses.push(run.mean_loss());
                let peak = pipeline.peak_activations();
                assert_eq!(run.report.peak_activations_of_rank, peak.per_rank[rank.rank()], "{name}");
                held = held
                    .into_iter()
                    .map(|mut stage| {
                        let grads = stage.take_gradients(run.gradient_factor);
                        stage.update(|block| optim.step(lr, block, grads))
                    })
                    .collect();
            }
            let stages = timetable.stages_of(rank.rank());
            let values = stages.into_iter().zip(held.iter().map(|stage| values(stage.module())));
            Ok((losses, values.collect::<Vec<_>>()))
        })
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    for (losses, held) in trained {
        for (loss, expected) in losses.iter().zip(&expected) {
            assert!((loss - expected).abs() <= 1e-5 * expected.abs(), "{name}: loss {loss} for {expected}");
        }
        for (stage, values) in held {
            assert_eq!(values.len(), parameters[stage].len());
            for (value, expected) in values.iter().zip(&parameters[stage]) {
                assert!((value - expected).abs() <= 2e-5, "{name}, stage {stage}: {value} for {expected}");
            }
        }
    }
}

#[test]
fn every_schedule_trains_like_one_device() {
    for schedule in schedules() {
        for ranks in 1..=4 {
            compare(&schedule, ranks, 5, Optimizer::AdamW);
        }
    }
}

#[test]
fn fewer_micro_batches_than_stages_train_like_one_device() {
    for schedule in schedules() {
        for (ranks, micro_batches) in [(2, 1), (3, 2), (4, 1), (4, 3)] {
            compare(&schedule, ranks, micro_batches, Optimizer::Sgd);
        }
    }
}

#[test]
fn gradient_checkpointing_changes_nothing() {
    let checkpointing = |device: Device| device.autodiff().gradient_checkpointing();
    for schedule in schedules() {
        compare_on(&schedule, 3, 4, Optimizer::AdamW, checkpointing);
    }
}

#[test]
fn a_timetable_of_ones_own_trains_like_one_device() {
    // Forwards in one order and backwards in another; two stages on the first rank, one on the second.
    let text = "0F0,0F2,2F0,0F1,2F2,2F1,2B1,2I0,2B2,2W0,0B2,0B1,0I0,0W0\n1F2,1F0,1F1,1B1,1B2,1B0";
    let timetable: Timetable = text.parse().unwrap();
    timetable.validate(&Routes::chain(3)).unwrap();
    for optimizer in [Optimizer::AdamW, Optimizer::Sgd] {
        compare(&Schedule::Custom(timetable.clone()), 2, 3, optimizer);
    }
}

/// A gradient that does not exist is not a gradient of zeros: a parameter that the loss does not reach is left alone by
/// the optimizer, on whatever rank it is.
#[test]
fn a_stage_that_the_loss_does_not_reach_has_no_gradient() {
    let untouched = launch::threads(2)
        .run(|rank| {
            let device = rank.device().autodiff();
            let layer: Linear = LinearConfig::new(3, 3).init(&device);
            let before = values(&layer);
            let mut stage = EagerStage::new(rank.rank(), 2, layer, |layer: &Linear, rows: &Tensor<2>, mut received| {
                if received.stage() == 0 {
                    return Ok(Sent::new().to(1, layer.forward(rows.clone())));
                }
                // What came is looked at, and not used.
                let came = received.float::<2>(0)?.dims()[0] as f64;
                Ok(Sent::new().loss_mean(layer.forward(rows.clone()).sum() / came as f32, came))
            });
            let timetable = Schedule::OneForwardOneBackward.timetable(2, 2)?;
            let mut pipeline = Pipeline::new(&rank, timetable, std::slice::from_ref(&stage))?;
            let rows = vec![Tensor::<2>::ones([4, 3], &Device::flex()); 2];
            let run = pipeline.step(std::slice::from_mut(&mut stage), &rows)?;
            let grads = stage.take_gradients(run.gradient_factor);
            let count = grads.len();
            let mut optim: ModuleOptimizer = AdamWConfig::new().init();
            let stage = stage.update(|layer| optim.step(0.1, layer, grads));
            Ok((count, values(stage.module()) == before))
        })
        .unwrap();
    assert_eq!(untouched, [(0, true), (2, false)]);
}

#[test]
fn a_scale_of_the_loss_cancels_out() {
    let weights = |scale: f64| {
        let layers: Vec<Linear> = {
            let ones = |rows: usize| Tensor::<2>::ones([rows, 2], &Device::flex().autodiff()) * 0.3;
            let layer = || Linear { weight: burn::module::Param::from_tensor(ones(2)), bias: None };
            vec![layer(), layer()]
        };
        launch::threads(2)
            .run(|rank| {
                let layer = layers[rank.rank()].clone().fork(&rank.device().autodiff());
                let mut stage =
                    EagerStage::new(rank.rank(), 2, layer, |layer: &Linear, rows: &Tensor<2>, mut received| {
                        let input = if received.stage() == 0 { rows.clone() } else { received.float::<2>(0)? };
                        let output = layer.forward(input);
                        Ok(match received.stage() {
                            0 => Sent::new().to(1, output),
                            _ => Sent::new().loss_sum(output.powf_scalar(2.0).sum(), 3.0),
                        })
                    });
                let timetable = Schedule::GPipe.timetable(2, 2)?;
                let mut pipeline = Pipeline::new(&rank, timetable, std::slice::from_ref(&stage))?.with_scale(scale)?;
                let rows = vec![Tensor::<2>::ones([3, 2], &Device::flex()); 2];
                let run = pipeline.step(std::slice::from_mut(&mut stage), &rows)?;
                let grads = stage.take_gradients(run.gradient_factor);
                let grad = grads.get::<2>(stage.module().weight.id).unwrap();
                Ok(grad.into_data().try_into_vec::<f32>().unwrap())
            })
            .unwrap()
    };
    let (plain, scaled) = (weights(1.0), weights(1.0 / 64.0));
    // A power of two: nothing is rounded.
    assert_eq!(plain, scaled);
    // By hand: y = 3 x (2 x 0.3 x 0.6)^2 a column; dL/dw1 = x^T dy w^T / 6 = 2 * 0.36 * ... the same everywhere.
    let expected = 2.0 * 0.36 * 2.0 * 0.3 * 3.0 / 3.0;
    assert!(plain[0].iter().all(|grad| (grad - expected as f32).abs() < 1e-6), "{plain:?} for {expected}");
}

/// Not only counted: the activations of a stage are no longer held by anybody once its backward is over.
#[test]
fn memory_is_freed_as_the_schedule_promises() {
    for (schedule, most) in [(Schedule::OneForwardOneBackward, 2), (Schedule::GPipe, 8)] {
        let held = launch::threads(2)
            .run(|rank| {
                let layer: Linear = LinearConfig::new(16, 16).init(&rank.device().autodiff());
                let given: Arc<Mutex<Vec<FlexTensor>>> = Arc::default();
                let most = Arc::new(Mutex::new(0));
                let (watched, peak) = (given.clone(), most.clone());
                let run = move |layer: &Linear, rows: &Tensor<2>, mut received: Received| {
                    if received.stage() == 1 {
                        return Ok(
                            Sent::new().loss_sum(layer.forward(received.float::<2>(0)?).powf_scalar(2.0).sum(), 1.0)
                        );
                    }
                    let output = layer.forward(rows.clone()).tanh();
                    let mut watched = watched.lock().unwrap();
                    watched.push(output.clone().inner().try_into_primitive::<Flex>().unwrap());
                    let alive = watched.iter().filter(|tensor| !tensor.is_unique()).count();
                    let mut peak = peak.lock().unwrap();
                    *peak = alive.max(*peak);
                    Ok(Sent::new().to(1, output))
                };
                let mut stage = EagerStage::new(rank.rank(), 2, layer, run);
                let mut pipeline = Pipeline::new(&rank, schedule.timetable(2, 8)?, std::slice::from_ref(&stage))?;
                let rows = vec![Tensor::<2>::ones([4, 16], &Device::flex()); 8];
                pipeline.step(std::slice::from_mut(&mut stage), &rows)?;
                // Nobody else works any more.
                rank.barrier()?;
                let left = given.lock().unwrap().iter().filter(|tensor| !tensor.is_unique()).count();
                let most = *most.lock().unwrap();
                Ok((most, left))
            })
            .unwrap();
        assert_eq!(held[0], (most, 0), "{schedule:?}");
    }
}

/// Activations and their gradients cross in the dtype that they are sent in.
#[test]
fn edges_of_every_float_dtype_carry_gradients() {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let layers: Vec<Linear> = (0..2).map(|_| LinearConfig::new(5, 5).init(&Device::flex().autodiff())).collect();
        let rows = |index: usize| Tensor::<2>::ones([2 + index, 5], &Device::flex()) * (index as f32 + 0.5);
        let tail = |layer: &Linear, hidden: Tensor<2>| layer.forward(hidden.cast(DType::F32)).powf_scalar(2.0).sum();
        let mut grads = (0..3)
            .map(|index| tail(&layers[1], layers[0].forward(rows(index)).cast(dtype)))
            .reduce(|a, b| a + b)
            .unwrap()
            .backward();
        let expected: Vec<Vec<f32>> = layers
            .iter()
            .map(|layer| layer.weight.val().grad_remove(&mut grads).unwrap().into_data().try_into_vec().unwrap())
            .collect();
        let found = launch::threads(2)
            .run(|rank| {
                let layer = layers[rank.rank()].clone().fork(&rank.device().autodiff());
                let mut stage =
                    EagerStage::new(rank.rank(), 2, layer, |layer: &Linear, rows: &Tensor<2>, mut received| {
                        if received.stage() == 0 {
                            return Ok(Sent::new().to(1, layer.forward(rows.clone()).cast(dtype)));
                        }
                        let hidden = received.float::<2>(0)?;
                        assert_eq!(hidden.dtype(), dtype);
                        Ok(Sent::new().loss_sum(tail(layer, hidden), 1.0))
                    });
                let timetable = Schedule::ZeroBubbleH1.timetable(2, 3)?;
                let mut pipeline = Pipeline::new(&rank, timetable, std::slice::from_ref(&stage))?;
                let batch: Vec<Tensor<2>> = (0..3).map(rows).collect();
                let run = pipeline.step(std::slice::from_mut(&mut stage), &batch)?;
                let sent = run.report.counters.of("send");
                // 2 + 3 + 4 rows of 5, in whichever direction.
                assert_eq!((sent.calls, sent.bytes), (3, (45 * dtype.size()) as u64));
                let grads = stage.take_gradients(1.0);
                let grad = grads.get::<2>(stage.module().weight.id).unwrap();
                Ok(grad.into_data().try_into_vec::<f32>().unwrap())
            })
            .unwrap();
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            // The rows of a micro-batch are summed apart: all else is the same arithmetic.
            assert!((found - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{dtype:?}: {found} for {expected}");
        }
    }
}
