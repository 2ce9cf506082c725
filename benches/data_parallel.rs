//! A data-parallel step against one rank alone and against two ranks that do not talk to each other.
//!
//! The three take turns within one run, round by round, and what counts is the median over rounds of their ratio: a
//! machine that is slower for a while is slower for all of them. That is why this is a loop of its own and not criterion's.
//!
//! `cargo bench --bench data_parallel -- [mlp|gpt] [ROUNDS]`

#[allow(dead_code)]
mod models;

use std::time::Instant;

use burn::module::Module;
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_parallel::prelude::*;
use models::{Gpt, Mlp, SEQUENCE, VOCABULARY};

const STEPS_PER_TURN: usize = 2;

/// Seconds a step of one rank alone, of two independent ranks, and of two replicas, by round.
fn rounds<M: Module + Sync>(
    rounds: usize,
    model: M,
    optimizer: impl Fn() -> ModuleOptimizer + Sync,
    loss: impl Fn(&M) -> Tensor<1> + Sync,
) -> Vec<[f64; 3]> {
    let measured = launch::threads(2).run(|rank| {
        let device = rank.device().autodiff();
        let mut single = Some(model.clone().fork(&device));
        let mut replica = Some(model.clone().fork(&device).data_parallel(&rank, DataParallelConfig::new())?);
        let (mut single_optim, mut replica_optim) = (optimizer(), optimizer());
        // Models go through the optimizer by value, so that it can update them in place.
        let mut step_alone = || {
            single = single.take().map(|model| {
                let grads = GradientsParams::from_grads(loss(&model).backward(), &model);
                single_optim.step(1e-4, model, grads)
            });
        };
        let mut step_together = || -> Result<(), Error> {
            if let Some(mut model) = replica.take() {
                let grads = model.backward(loss(&model))?;
                replica = Some(replica_optim.step(1e-4, model, grads));
            }
            Ok(())
        };
        let mut times = Vec::new();
        for round in 0..rounds + 1 {
            let mut time = [0.0; 3];
            for (mode, time) in time.iter_mut().enumerate() {
                rank.barrier()?;
                let began = Instant::now();
                for _ in 0..STEPS_PER_TURN {
                    match mode {
                        0 if rank.rank() > 0 => {}
                        0 | 1 => step_alone(),
                        _ => step_together()?,
                    }
                }
                *time = began.elapsed().as_secs_f64() / STEPS_PER_TURN as f64;
            }
            let slowest = rank.all_reduce(time.to_vec(), ReduceOp::Max)?;
            // The first round is for caches, lazy initialisation and the order of the buckets.
            if round > 0 {
                times.push([slowest[0], slowest[1], slowest[2]]);
            }
        }
        Ok(times)
    });
    measured.expect("a world of threads").swap_remove(0)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(name: &str, times: &[[f64; 3]]) {
    let [alone, independent, replicas] = [0, 1, 2].map(|mode| 1e3 * median(times.iter().map(|time| time[mode])));
    let over = |a: usize, b: usize| median(times.iter().map(|time| time[a] / time[b]));
    println!(
        "{name}: one rank {alone:.1} ms, two independent {independent:.1} ms, two replicas {replicas:.1} ms a step"
    );
    println!("{name}: replicas over independent {:.3}; replicas over one rank {:.3}", over(2, 1), over(2, 0));
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let wanted =
        |name: &str| !arguments.iter().any(|a| a == "mlp" || a == "gpt") || arguments.iter().any(|a| a == name);
    let number = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(9);
    let device = Device::flex().autodiff();
    if wanted("mlp") {
        let numbers = |salt: usize| {
            let values: Vec<f32> = (0..32 * 1024).map(|i| ((i * 7919 + salt) % 1000) as f32 / 500.0 - 1.0).collect();
            Tensor::<2>::from_data(TensorData::new(values, [32, 1024]), &Device::flex().autodiff())
        };
        let times = rounds(
            number,
            Mlp::new(&device).materialize(),
            || SgdConfig::new().init(),
            |model| model.loss(numbers(1), numbers(2)),
        );
        report("mlp", &times);
    }
    if wanted("gpt") {
        let numbers = |salt: usize| {
            let values: Vec<i64> = (0..8 * SEQUENCE).map(|i| ((i * 7919 + salt) % VOCABULARY) as i64).collect();
            Tensor::<2, Int>::from_data(TensorData::new(values, [8, SEQUENCE]), &Device::flex().autodiff())
        };
        let times = rounds(
            number,
            Gpt::new(&device).materialize(),
            || AdamConfig::new().init(),
            |model| model.loss(numbers(1), numbers(104729)),
        );
        report("gpt", &times);
    }
}
