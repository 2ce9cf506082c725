//! A tensor-parallel step against one rank: eager burn, its captured graph with operations one by one and fused, and
//! the graph split over two ranks; and that of two replicas, captured.
//!
//! The five take turns within one run, round by round, and what counts is the median over rounds of their ratio: a
//! machine that is slower for a while is slower for all of them. The first steps of a turn do not count. Every rank
//! computes with one thread. All steps are whole: forward, backward and optimizer, which is fused where the operations
//! are. On a machine with other work to do, ranks wait for each other's turns; so beside the time of a step there is,
//! on Unix, the time that the busier rank's core worked for it.
//!
//! Before that, how long it takes to capture, compile (fuse and plan) and partition a transformer of 24 layers.
//!
//! With `fused`, instead: the split step with its products and collectives as one operation against the same without.
//!
//! `cargo bench --bench tensor_parallel -- [mlp|gpt] [fused] [ROUNDS]`

mod figures;
#[allow(dead_code)]
mod models;

use std::time::Instant;

use burn::module::Module;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_parallel::graph::{CustomOps, Executor, TensorTree, capture_step, counter_based_rng};
use burn_parallel::partition::{
    PartitionOptions, bucket_reductions, fuse_products, overlap, partition, register_collectives,
};
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::{Sharded, TensorParallelConfig};
use burn_parallel::train::Engine;
use figures::{Figures, clock, median};
use models::{Gpt, Mlp, SEQUENCE, VOCABULARY};

/// Steps of a turn that are not counted: what is in the caches is of whoever had the turn before. PyTorch's, of
/// scripts/torch_step.py, are as many.
const UNCOUNTED: usize = 3;
const STEPS_PER_TURN: usize = 4;

/// How many ways there are.
const WAYS: usize = 5;

/// Seconds a step of one rank eagerly, of one rank from the graph, operation by operation and fused, of two ranks, and
/// of two replicas, by round; then those of work.
fn rounds<M: Module + Sync, I: TensorTree + Clone + Sync>(
    rounds: usize,
    model: M,
    plan: &Plan,
    optimizer: impl Fn(bool) -> ModuleOptimizer + Sync,
    inputs: impl Fn() -> I + Sync,
    loss: impl Fn(&M, I) -> Tensor<1> + Sync,
) -> Vec<[f64; 2 * WAYS]> {
    let measured = launch::threads(2).threads_per_rank(1).run(|rank| {
        let device = rank.device().autodiff();
        let alone = rank.split(rank.rank() as u64, 0)?;
        let mut eager = Some(model.clone().fork(&device));
        let captured = |fusion| {
            let config = TensorParallelConfig::new(Plan::new()).with_fusion(fusion);
            model.clone().fork(&device).tensor_parallel(&alone, config).map(Some)
        };
        let (mut single, mut graph) = (captured(false)?, captured(true)?);
        let mut split = Some(model.clone().fork(&device).tensor_parallel(&rank, plan)?);
        let captured = Strategy::new().with_dp(2).with_engine(Engine::Captured);
        let mut replica = Some(model.clone().fork(&device).parallelize(&rank, &captured)?);
        let mut optims = [false, false, true, true, true].map(&optimizer);
        // Models go through the optimizer by value, so that it can update them in place.
        let step = |model: &mut Option<Sharded<M>>, optim: &mut ModuleOptimizer| -> Result<(), Error> {
            if let Some(mut taken) = model.take() {
                let grads = taken.step(inputs(), &loss)?.grads;
                *model = Some(optim.step(1e-4, taken, grads));
            }
            Ok(())
        };
        let mut times = Vec::new();
        for round in 0..rounds + 1 {
            let mut time = [0.0; 2 * WAYS];
            for mode in 0..WAYS {
                let (mut began, mut worked) = (Instant::now(), clock::of_thread());
                for number in 0..UNCOUNTED + STEPS_PER_TURN {
                    if number == UNCOUNTED {
                        rank.barrier()?;
                        (began, worked) = (Instant::now(), clock::of_thread());
                    }
                    match mode {
                        0..3 if rank.rank() > 0 => {}
                        0 => {
                            if let Some(taken) = eager.take() {
                                let grads = GradientsParams::from_grads(loss(&taken, inputs()).backward(), &taken);
                                eager = Some(optims[0].step(1e-4, taken, grads));
                            }
                        }
                        1 => step(&mut single, &mut optims[1])?,
                        2 => step(&mut graph, &mut optims[2])?,
                        3 => step(&mut split, &mut optims[3])?,
                        _ => {
                            if let Some(mut taken) = replica.take() {
                                let done = taken.step(inputs(), &loss)?;
                                replica = Some(taken.optimize(&mut optims[4], 1e-4, done)?);
                            }
                        }
                    }
                }
                time[mode] = began.elapsed().as_secs_f64() / STEPS_PER_TURN as f64;
                time[mode + WAYS] = (clock::of_thread() - worked) / STEPS_PER_TURN as f64;
            }
            let slowest = rank.all_reduce(time.to_vec(), ReduceOp::Max)?;
            // The first round captures, and is for caches and lazy initialisation.
            if round > 0 {
                times.push(std::array::from_fn(|mode| slowest[mode]));
            }
        }
        Ok(times)
    });
    measured.expect("a world of threads").swap_remove(0)
}

/// The split step on two ranks without and with fused products: the ratio of their times by round, that of the slower
/// rank.
fn fused<M: Module + Sync, I: TensorTree + Clone + Sync>(
    rounds: usize,
    model: M,
    plan: &Plan,
    inputs: impl Fn() -> I + Sync,
    loss: impl Fn(&M, I) -> Tensor<1> + Sync,
) -> Vec<[f64; 2]> {
    let measured = launch::threads(2).threads_per_rank(1).run(|rank| {
        let whole = model.clone().fork(&rank.device().autodiff());
        let captured = capture_step(&whole, inputs(), &loss)?;
        let layouts: Vec<Layout> = captured.params.iter().map(|param| plan.layout(&param.path)).collect();
        let options = PartitionOptions::new("tp", 2, rank.rank());
        let split = whole.tensor_parallel(&rank, plan)?;
        let executor = |fuse: bool| {
            let whole_inputs = vec![Layout::Replicated; captured.inputs.len()];
            let (mut graph, _) = partition(&captured, &layouts, &whole_inputs, &options)?;
            if fuse {
                fuse_products(&mut graph);
            }
            bucket_reductions(&mut graph, 4 << 20);
            overlap(&mut graph);
            let mut ops = CustomOps::new();
            register_collectives(&mut ops, "tp", &rank);
            Executor::new(graph, ops)
        };
        let mut executors = [executor(false)?, executor(true)?];
        let mut times = Vec::new();
        for round in 0..rounds + 1 {
            let mut time = [0.0; 2];
            // In changing order.
            for mode in [round % 2, 1 - round % 2] {
                rank.barrier()?;
                let began = Instant::now();
                for _ in 0..STEPS_PER_TURN {
                    executors[mode].step(split.local(), inputs())?;
                }
                time[mode] = began.elapsed().as_secs_f64() / STEPS_PER_TURN as f64;
            }
            let slowest = rank.all_reduce(time.to_vec(), ReduceOp::Max)?;
            if round > 0 {
                times.push([slowest[0], slowest[1]]);
            }
        }
        Ok(times)
    });
    measured.expect("a world of threads").swap_remove(0)
}

fn report_fused(figures: &mut Figures, name: &str, times: &[[f64; 2]]) {
    let [apart, together] = [0, 1].map(|mode| 1e3 * median(times.iter().map(|time| time[mode])));
    let ratio = median(times.iter().map(|time| time[0] / time[1]));
    println!("{name}: forward and backward of two ranks {apart:.1} ms, with fused products {together:.1} ms");
    println!("{name}: speed with fused products over without {ratio:.3}");
    figures.note(format!("{name}: two ranks, fused products over without, time"), 1.0 / ratio, "ratio");
}

fn report(figures: &mut Figures, name: &str, times: &[[f64; 2 * WAYS]]) {
    let [eager, single, graph, split] = [0, 1, 2, 3].map(|mode| 1e3 * median(times.iter().map(|time| time[mode])));
    let over = |a: usize, b: usize| median(times.iter().map(|time| time[a] / time[b]));
    let replicas = 1e3 * median(times.iter().map(|time| time[4]));
    println!("{name}: eager {eager:.1} ms, graph {single:.1} ms, fused {graph:.1} ms, two ranks {split:.1} ms a step");
    println!("{name}: two replicas {replicas:.1} ms");
    println!(
        "{name}: speed of the fused graph over eager {:.3}; of two ranks over one, both fused, {:.3}",
        over(0, 2),
        over(2, 3)
    );
    let [eager, single, graph, split] =
        [WAYS, WAYS + 1, WAYS + 2, WAYS + 3].map(|mode| 1e3 * median(times.iter().map(|time| time[mode])));
    println!("{name}: work {eager:.1} ms, graph {single:.1} ms, fused {graph:.1} ms, each of two ranks {split:.1} ms");
    println!(
        "{name}: work of the graph over that of eager burn {:.3}; fused over eager {:.3}, over one by one {:.3}",
        over(WAYS + 1, WAYS),
        over(WAYS + 2, WAYS),
        over(WAYS + 2, WAYS + 1)
    );
    println!("{name}: work of one rank over that of each of two {:.3}", over(WAYS + 2, WAYS + 3));
    let ways = ["eager", "captured, one by one", "captured, fused", "two ranks, fused", "two replicas, fused"];
    for (mode, way) in ways.iter().enumerate() {
        figures.note(format!("{name}: {way}, time"), 1e3 * median(times.iter().map(|time| time[mode])), "ms");
        figures.note(format!("{name}: {way}, work"), 1e3 * median(times.iter().map(|time| time[mode + WAYS])), "ms");
    }
    figures.note(format!("{name}: fused over eager, work"), over(WAYS + 2, WAYS), "ratio");
    figures.note(format!("{name}: fused over one by one, work"), over(WAYS + 2, WAYS + 1), "ratio");
    figures.note(format!("{name}: one rank over each of two, time"), over(2, 3), "ratio");
    figures.note(format!("{name}: one rank over each of two, work"), over(WAYS + 2, WAYS + 3), "ratio");
}

/// burn's own, or the same in one pass.
fn sgd(fused: bool) -> ModuleOptimizer {
    let config = SgdConfig::new();
    if fused { config.init_fused() } else { config.init() }
}

fn adam(fused: bool) -> ModuleOptimizer {
    let config = AdamConfig::new();
    if fused { config.init_fused() } else { config.init() }
}

fn capture(figures: &mut Figures) {
    let model = TransformerEncoderConfig::new(64, 256, 8, 24).init(&Device::flex().autodiff());
    let loss = |model: &TransformerEncoder, x| model.forward(TransformerEncoderInput::new(x)).powi_scalar(2).mean();
    let began = Instant::now();
    let mut graph = capture_step(&model, Tensor::<3>::zeros([4, 32, 64], &Device::flex()), loss).expect("a step");
    let captured = began.elapsed();
    let executor = Executor::new(graph.clone(), CustomOps::new()).expect("a step");
    let (compiled, memory) = (began.elapsed() - captured, executor.memory());
    let began = Instant::now();
    counter_based_rng(&mut graph);
    let params: Vec<Layout> = graph.params.iter().map(|param| Plan::megatron().layout(&param.path)).collect();
    let options = PartitionOptions::new("tp", 2, 0).with_sequence_dim(1);
    let (local, _) = partition(&graph, &params, &[Layout::Replicated], &options).expect("a partition");
    let partitioned = began.elapsed();
    println!(
        "24 layers: captured in {captured:.1?}, partitioned in {partitioned:.1?}: {} operations become {}",
        graph.operations.len(),
        local.operations.len()
    );
    println!("24 layers: fused and its memory planned in {compiled:.1?}, {} bytes at most", memory.peak);
    for (what, took) in [("captured", captured), ("partitioned", partitioned), ("compiled", compiled)] {
        figures.note(format!("24 layers {what}"), 1e3 * took.as_secs_f64(), "ms");
    }
}

fn main() {
    let (arguments, mut figures) = (figures::arguments(), Figures::of("tensor_parallel"));
    let wanted =
        |name: &str| !arguments.iter().any(|a| a == "mlp" || a == "gpt") || arguments.iter().any(|a| a == name);
    let number = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(9);
    let against = arguments.iter().any(|argument| argument == "fused");
    if !against {
        capture(&mut figures);
    }
    let device = Device::flex().autodiff();
    if wanted("mlp") {
        let numbers = |salt: usize| {
            let values: Vec<f32> = (0..32 * 1024).map(|i| ((i * 7919 + salt) % 1000) as f32 / 500.0 - 1.0).collect();
            Tensor::<2>::from_data(TensorData::new(values, [32, 1024]), &Device::flex().autodiff())
        };
        // Of each block the first layer by columns, the second by rows.
        let plan = (0..8).fold(Plan::new(), |plan, layer| match layer % 2 {
            0 => plan.shard(format!("layers.{layer}.weight"), 1).shard(format!("layers.{layer}.bias"), 0),
            _ => plan.shard(format!("layers.{layer}.weight"), 0),
        });
        let inputs = || (numbers(1), numbers(2));
        let loss = |model: &Mlp, (input, targets)| model.loss(input, targets);
        let model = Mlp::new(&device).materialize();
        match against {
            true => report_fused(&mut figures, "mlp", &fused(number, model, &plan, inputs, loss)),
            false => report(&mut figures, "mlp", &rounds(number, model, &plan, sgd, inputs, loss)),
        }
    }
    if wanted("gpt") {
        let numbers = |salt: usize| {
            let values: Vec<i64> = (0..8 * SEQUENCE).map(|i| ((i * 7919 + salt) % VOCABULARY) as i64).collect();
            Tensor::<2, Int>::from_data(TensorData::new(values, [8, SEQUENCE]), &Device::flex().autodiff())
        };
        let plan = Plan::megatron().shard("tokens.weight", 0).shard("head.weight", 1).shard("head.bias", 0);
        let inputs = || (numbers(1), numbers(104729));
        let loss = |model: &Gpt, (tokens, targets)| model.loss(tokens, targets);
        let model = Gpt::new(&device).materialize();
        match against {
            true => report_fused(&mut figures, "gpt", &fused(number, model, &plan, inputs, loss)),
            false => report(&mut figures, "gpt", &rounds(number, model, &plan, adam, inputs, loss)),
        }
    }
    figures.finish();
}
