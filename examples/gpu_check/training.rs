//! A small language model, trained a few steps: on this device alone and split by each strategy, beside the CPU alone.

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_parallel::comm::{nccl, part};
use burn_parallel::prelude::*;

use self::gpt::{Gpt, GptConfig};
use crate::device::nccl_for;
use crate::report::{Figures, Shortfall, figure};
use crate::section::Checks;

#[path = "../train_lm/gpt.rs"]
#[allow(dead_code, reason = "the example that it belongs to needs all of it")]
mod gpt;

const STEPS: usize = 4;
const ROWS: usize = 8;
const SEQ: usize = 16;
const VOCAB: usize = 64;
const RATE: f64 = 1e-3;

/// How the model is spread over the ranks.
#[derive(Debug, Clone, Copy)]
enum Parallelism {
    Data,
    Tensor,
    Pipeline,
}

pub fn run(checks: &mut Checks) {
    let choice = checks.device;
    let host = Device::flex();
    host.seed(11);
    let model = GptConfig::new(VOCAB, SEQ, 32, 4, 2).init(&host.clone().autodiff());
    let mut expected = Vec::new();
    checks.check("the CPU alone", || {
        expected = alone(&model, &host);
        Ok(losses(&expected))
    });
    checks.check("the device alone", || {
        let device = choice.open(0)?;
        close(&expected, &alone(&model, &device))
    });
    for (strategy, name) in [
        (Parallelism::Data, "data parallel"),
        (Parallelism::Tensor, "tensor parallel"),
        (Parallelism::Pipeline, "pipeline parallel"),
    ] {
        checks.check(format!("{name}, 2 ranks, threads"), || {
            let device = choice.open(0)?;
            let ranks = launch::threads(2).device(device).run(|rank| {
                let device = rank.device();
                split(strategy, &rank, &device, &model)
            });
            agree(&expected, ranks)
        });
        checks.check(format!("{name}, 2 ranks, NCCL"), || {
            let gpus = nccl_for(choice, 2)?;
            choice.open(0)?;
            let ranks = launch::threads(2).run(|rank| {
                let gpu = rank.rank() % gpus;
                split(strategy, &nccl::join(&rank, gpu)?, &Device::cuda(gpu), &model)
            });
            agree(&expected, ranks)
        });
    }
}

/// Rows of a batch: tokens and what follows them. They repeat, so that there is something to learn.
fn batch(step: usize, rows: std::ops::Range<usize>, device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let tensor = |shift: usize| {
        let token = |row: usize, place: usize| ((row * 7 + (place + shift) * 3 + step * 5) % VOCAB) as i64;
        let tokens: Vec<i64> = rows.clone().flat_map(|row| (0..SEQ).map(move |place| token(row, place))).collect();
        Tensor::from_data(TensorData::new(tokens, [rows.len(), SEQ]), device)
    };
    (tensor(0), tensor(1))
}

fn loss(model: &Gpt, (tokens, targets): (Tensor<2, Int>, Tensor<2, Int>)) -> Loss {
    let (nats, count) = model.loss_sum(tokens, targets);
    Loss::sum(nats, count)
}

fn alone(model: &Gpt, device: &Device) -> Vec<f64> {
    let device = device.clone().autodiff();
    let mut model = model.clone().fork(&device);
    let mut optim: ModuleOptimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let (tokens, targets) = batch(step, 0..ROWS, &device);
        let (nats, count) = model.loss_sum(tokens, targets);
        let loss = nats / count as f64;
        losses.push(loss.clone().inner().into_scalar::<f64>());
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optim.step(RATE, model, grads);
    }
    losses
}

fn split(strategy: Parallelism, comm: &Communicator, device: &Device, model: &Gpt) -> Result<Vec<f64>, Error> {
    let device = device.clone().autodiff();
    let model = model.clone().fork(&device);
    let mut optim: ModuleOptimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    match strategy {
        Parallelism::Data => {
            let mut model = model.data_parallel(comm, DataParallelConfig::new())?;
            for step in 0..STEPS {
                let rows = part(ROWS, comm.size(), comm.rank());
                let done = model.step_micro_batches([batch(step, rows, &device)], |model, (tokens, targets)| {
                    let (nats, count) = model.loss_sum(tokens, targets);
                    Loss::sum(nats, count as f64)
                })?;
                losses.push(done.loss.item());
                model = optim.step(RATE, model, done.grads);
            }
        }
        Parallelism::Tensor => {
            let mut model = model.tensor_parallel(comm, Plan::megatron())?;
            for step in 0..STEPS {
                let done = model.step(batch(step, 0..ROWS, &device), loss)?;
                losses.push(done.loss.item());
                model = optim.step(RATE, model, done.grads);
            }
        }
        Parallelism::Pipeline => {
            let config = PipelineConfig::new(4).with_schedule(Schedule::OneForwardOneBackward);
            let mut model = model.pipeline_parallel(comm, config)?;
            for step in 0..STEPS {
                let done = model.step(batch(step, 0..ROWS, &device), loss)?;
                losses.push(done.loss.item());
                model = optim.step(RATE, model, done.grads);
            }
        }
    }
    Ok(losses)
}

/// What all ranks say beside what is expected. That a strategy does not take the device is not held against it.
fn agree(expected: &[f64], ranks: Result<Vec<Vec<f64>>, Error>) -> Result<Figures, Shortfall> {
    let ranks = ranks.map_err(|error| {
        let text = error.to_string();
        match text.contains("Device::flex()") {
            true => Shortfall::Refused(text),
            false => Shortfall::Failed(text),
        }
    })?;
    if ranks.iter().any(|rank| *rank != ranks[0]) {
        return Err(Shortfall::Failed(format!("the ranks have different losses: {ranks:?}")));
    }
    close(expected, &ranks[0])
}

fn close(expected: &[f64], found: &[f64]) -> Result<Figures, Shortfall> {
    // f32, summed in another order, over a few steps; tensor cores may multiply with fewer bits.
    const LIMIT: f64 = 2e-3;
    let difference = expected.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    if expected.len() != STEPS || found.len() != STEPS || difference > LIMIT || difference.is_nan() {
        return Err(Shortfall::Failed(format!("losses {found:.5?} instead of {expected:.5?}")));
    }
    Ok([losses(found), vec![figure("difference", difference, "")]].concat())
}

fn losses(losses: &[f64]) -> Figures {
    match losses {
        [first, .., last] => vec![figure("first loss", *first, ""), figure("last loss", *last, "")],
        _ => Vec::new(),
    }
}
