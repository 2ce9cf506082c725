//! A data-parallel step against one rank alone and against two ranks that do not talk to each other.
//!
//! The three take turns within one run, round by round, and what counts is the median over rounds of their ratio: a
//! machine that is slower for a while is slower for all of them. That is why this is a loop of its own and not
//! criterion's.
//!
//! With `sharded`, instead: steps of two replicas that divide nothing, optimizer state, gradients and parameters (ZeRO
//! 0 to 3), with both engines, by turns in changing order; beside their time there is how long rank 0 had nothing to do
//! but wait for the other, and, on Linux, the processor time of both ranks and the load of the machine.
//!
//! With `captured`, instead: the three of above as captured steps with fused operations and fused optimizers, in turns
//! in changing order, with the processor time of a rank and how long rank 0 waited.
//!
//! `cargo bench --bench data_parallel -- [mlp|gpt] [sharded|captured] [ROUNDS]`

mod figures;
#[allow(dead_code)]
mod models;

use std::time::Instant;

use burn::module::Module;
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_parallel::graph::TensorTree;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;
use figures::{Figures, clock, median};
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

/// Seconds a step, of the processor for each rank, and of waiting on rank 0, of captured steps: of one rank alone, of
/// two independent ranks, and of two replicas, by round.
fn captured<M: Module + Sync, I: TensorTree + Clone + Sync>(
    rounds: usize,
    model: M,
    optimizer: impl Fn() -> ModuleOptimizer + Sync,
    inputs: impl Fn() -> I + Sync,
    loss: impl Fn(&M, I) -> Tensor<1> + Sync,
) -> Vec<[[f64; 3]; 3]> {
    let measured = launch::threads(2).threads_per_rank(1).run(|rank| {
        let device = rank.device().autodiff();
        let alone = rank.split(rank.rank() as u64, 0)?;
        let strategy = |ranks| Strategy::new().with_dp(ranks).with_engine(Engine::Captured);
        let single = model.clone().fork(&device).parallelize(&alone, &strategy(1))?;
        let replica = model.clone().fork(&device).parallelize(&rank, &strategy(2))?;
        let mut models = [(Some(single), optimizer()), (Some(replica), optimizer())];
        let mut times = Vec::new();
        for round in 0..rounds + 1 {
            let mut time = [[0.0; 3]; 3];
            for turn in 0..3 {
                let mode = (turn + round) % 3;
                let (model, optim) = &mut models[usize::from(mode == 2)];
                rank.barrier()?;
                let (began, worked, mut waited) = (Instant::now(), clock::of_process(), 0.0);
                let runs = mode > 0 || rank.rank() == 0;
                for _ in 0..if runs { STEPS_PER_TURN } else { 0 } {
                    if let Some(mut taken) = model.take() {
                        let step = taken.step(inputs(), &loss)?;
                        waited += step.counters.waited.as_secs_f64();
                        *model = Some(taken.optimize(optim, 1e-4, step)?);
                    }
                }
                rank.barrier()?;
                let ranks = if mode > 0 { 2.0 } else { 1.0 };
                let spent = [began.elapsed().as_secs_f64(), (clock::of_process() - worked) / ranks, waited];
                time[mode] = spent.map(|time| time / STEPS_PER_TURN as f64);
            }
            // The first round captures, and is for caches and the order of the buckets.
            if round > 0 {
                times.push(time);
            }
        }
        Ok(times)
    });
    measured.expect("a world of threads").swap_remove(0)
}

/// How steps run: by which engine, and whether on a device with gradient checkpointing.
#[derive(Clone, Copy, PartialEq)]
struct Run {
    engine: Engine,
    checkpoints: bool,
}

impl Run {
    fn device(self, device: Device) -> Device {
        if self.checkpoints { device.autodiff().gradient_checkpointing() } else { device.autodiff() }
    }
}

const EAGER: Run = Run { engine: Engine::Eager, checkpoints: false };
const CHECKPOINTED: Run = Run { engine: Engine::Eager, checkpoints: true };
const CAPTURED: Run = Run { engine: Engine::Captured, checkpoints: false };

/// What replicas divide, in which steps; the first of a kind of steps is what the others of it are compared with.
const DIVIDED: [(&str, Run, Sharding, Keep); 9] = [
    ("eager, nothing", EAGER, Sharding::None, Keep::Pass),
    ("eager, ZeRO 1", EAGER, Sharding::Optimizer, Keep::Pass),
    ("eager, ZeRO 2", EAGER, Sharding::Gradients, Keep::Pass),
    ("eager, ZeRO 3, kept for a micro-batch", EAGER, Sharding::Parameters, Keep::MicroBatch),
    ("eager with gradient checkpointing, nothing", CHECKPOINTED, Sharding::None, Keep::Pass),
    ("eager with gradient checkpointing, ZeRO 3", CHECKPOINTED, Sharding::Parameters, Keep::Pass),
    ("captured, nothing", CAPTURED, Sharding::None, Keep::Pass),
    ("captured, ZeRO 3", CAPTURED, Sharding::Parameters, Keep::Pass),
    ("captured, ZeRO 3, kept for a micro-batch", CAPTURED, Sharding::Parameters, Keep::MicroBatch),
];

/// Seconds a step, of the processors for it, and of waiting in it, with each of [`DIVIDED`], by round.
fn divided<M: Module + Sync, I: TensorTree + Clone + Sync>(
    rounds: usize,
    make: impl Fn(&Device) -> M + Sync,
    optimizer: impl Fn() -> ModuleOptimizer + Sync,
    inputs: impl Fn(&Device) -> I + Sync,
    loss: impl Fn(&M, I) -> Tensor<1> + Sync,
) -> Vec<Vec<[f64; 3]>> {
    let measured = launch::threads(2).run(|rank| {
        let mut models = Vec::new();
        for (_, run, sharding, keep) in DIVIDED {
            let data = DataParallelConfig::new().with_sharding(sharding).with_keep(keep);
            let strategy = Strategy::new().with_dp(2).with_data(data).with_engine(run.engine);
            let model = make(&run.device(rank.device())).materialize().parallelize(&rank, &strategy)?;
            models.push((Some(model), optimizer()));
        }
        let mut times = Vec::new();
        for round in 0..rounds + 1 {
            let mut time = vec![[0.0; 3]; models.len()];
            for turn in 0..models.len() {
                let mode = (turn + round) % models.len();
                let (model, optim) = &mut models[mode];
                let device = DIVIDED[mode].1.device(rank.device());
                rank.barrier()?;
                let (began, worked, mut waited) = (Instant::now(), clock::of_process(), 0.0);
                for _ in 0..STEPS_PER_TURN {
                    if let Some(mut taken) = model.take() {
                        let step = taken.step(inputs(&device), &loss)?;
                        waited += step.counters.waited.as_secs_f64();
                        *model = Some(taken.optimize(optim, 1e-4, step)?);
                    }
                }
                rank.barrier()?;
                let spent = [began.elapsed().as_secs_f64(), clock::of_process() - worked, waited];
                time[mode] = spent.map(|time| time / STEPS_PER_TURN as f64);
            }
            // The first round is for caches, captures and the order of buckets and gathers.
            if round > 0 {
                times.push(time);
            }
        }
        Ok(times)
    });
    measured.expect("a world of threads").swap_remove(0)
}

/// How many threads have wanted a core in the last minute.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn report_divided(figures: &mut Figures, name: &str, times: &[Vec<[f64; 3]>]) {
    for (mode, (what, run, ..)) in DIVIDED.iter().enumerate() {
        let plain = DIVIDED.iter().position(|(_, other, ..)| other == run).unwrap_or_default();
        let of = |which: usize| 1e3 * median(times.iter().map(|round| round[mode][which]));
        let over = |which: usize| median(times.iter().map(|round| round[mode][which] / round[plain][which]));
        println!(
            "{name}: {what}: {:.1} ms a step, processors {:.1} ms, waiting {:.1} ms; over nothing divided {:.3}, \
             processors {:.3}",
            of(0),
            of(1),
            of(2),
            over(0),
            over(1)
        );
        figures.note(format!("{name}: {what}, time"), of(0), "ms");
        figures.note(format!("{name}: {what}, processors"), of(1), "ms");
        figures.note(format!("{name}: {what} over nothing divided, time"), over(0), "ratio");
        figures.note(format!("{name}: {what} over nothing divided, processors"), over(1), "ratio");
    }
    println!("{name}: load of the machine {}", load());
}

fn report_captured(figures: &mut Figures, name: &str, times: &[[[f64; 3]; 3]]) {
    let ways = ["one rank", "two independent", "two replicas"];
    for (mode, way) in ways.into_iter().enumerate() {
        let of = |which: usize| 1e3 * median(times.iter().map(|round| round[mode][which]));
        println!(
            "{name}: captured, {way}: {:.1} ms a step, processor of a rank {:.1} ms, waiting {:.1} ms",
            of(0),
            of(1),
            of(2)
        );
        figures.note(format!("{name}: captured, {way}, time"), of(0), "ms");
        figures.note(format!("{name}: captured, {way}, processor of a rank"), of(1), "ms");
    }
    let over = |a: usize, b: usize, which: usize| median(times.iter().map(|round| round[a][which] / round[b][which]));
    for (a, b, what) in [(2, 1, "replicas over independent"), (1, 0, "independent over one rank")] {
        let [time, processor] = [0, 1].map(|which| over(a, b, which));
        println!("{name}: captured, {what}: time {time:.3}, processor {processor:.3}");
        figures.note(format!("{name}: captured, {what}, time"), time, "ratio");
        figures.note(format!("{name}: captured, {what}, processor"), processor, "ratio");
    }
    println!("{name}: load of the machine {}", load());
}

fn report(figures: &mut Figures, name: &str, times: &[[f64; 3]]) {
    let [alone, independent, replicas] = [0, 1, 2].map(|mode| 1e3 * median(times.iter().map(|time| time[mode])));
    let over = |a: usize, b: usize| median(times.iter().map(|time| time[a] / time[b]));
    println!(
        "{name}: one rank {alone:.1} ms, two independent {independent:.1} ms, two replicas {replicas:.1} ms a step"
    );
    println!("{name}: replicas over independent {:.3}; replicas over one rank {:.3}", over(2, 1), over(2, 0));
    for (way, took) in [("one rank", alone), ("two independent", independent), ("two replicas", replicas)] {
        figures.note(format!("{name}: {way}"), took, "ms");
    }
    figures.note(format!("{name}: replicas over independent"), over(2, 1), "ratio");
    figures.note(format!("{name}: replicas over one rank"), over(2, 0), "ratio");
}

fn main() {
    let (arguments, mut figures) = (figures::arguments(), Figures::of("data_parallel"));
    let wanted =
        |name: &str| !arguments.iter().any(|a| a == "mlp" || a == "gpt") || arguments.iter().any(|a| a == name);
    let number = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(9);
    let [sharded, as_captured] = ["sharded", "captured"].map(|way| arguments.iter().any(|argument| argument == way));
    let device = Device::flex().autodiff();
    if wanted("mlp") {
        let numbers_on = |salt: usize, device: &Device| {
            let values: Vec<f32> = (0..32 * 1024).map(|i| ((i * 7919 + salt) % 1000) as f32 / 500.0 - 1.0).collect();
            Tensor::<2>::from_data(TensorData::new(values, [32, 1024]), device)
        };
        let numbers = |salt| numbers_on(salt, &device);
        let (model, optimizer) = (Mlp::new(&device).materialize(), || SgdConfig::new().init());
        let loss = |model: &Mlp, (x, y)| model.loss(x, y);
        if as_captured {
            let optimizer = || SgdConfig::new().init_fused();
            report_captured(
                &mut figures,
                "mlp",
                &captured(number, model, optimizer, || (numbers(1), numbers(2)), loss),
            );
        } else if sharded {
            let inputs = |device: &Device| (numbers_on(1, device), numbers_on(2, device));
            report_divided(&mut figures, "mlp", &divided(number, Mlp::new, optimizer, inputs, loss));
        } else {
            report(&mut figures, "mlp", &rounds(number, model, optimizer, |model| model.loss(numbers(1), numbers(2))));
        }
    }
    if wanted("gpt") {
        let numbers_on = |salt: usize, device: &Device| {
            let values: Vec<i64> = (0..8 * SEQUENCE).map(|i| ((i * 7919 + salt) % VOCABULARY) as i64).collect();
            Tensor::<2, Int>::from_data(TensorData::new(values, [8, SEQUENCE]), device)
        };
        let numbers = |salt| numbers_on(salt, &device);
        let (model, optimizer) = (Gpt::new(&device).materialize(), || AdamConfig::new().init());
        let (loss, inputs) = (|model: &Gpt, (x, y)| model.loss(x, y), || (numbers(1), numbers(104729)));
        if as_captured {
            let optimizer = || AdamConfig::new().init_fused();
            report_captured(&mut figures, "gpt", &captured(number, model, optimizer, inputs, loss));
        } else if sharded {
            let inputs = |device: &Device| (numbers_on(1, device), numbers_on(104729, device));
            report_divided(&mut figures, "gpt", &divided(number, Gpt::new, optimizer, inputs, loss));
        } else {
            report(
                &mut figures,
                "gpt",
                &rounds(number, model, optimizer, |model| model.loss(numbers(1), numbers(104729))),
            );
        }
    }
    figures.finish();
}
