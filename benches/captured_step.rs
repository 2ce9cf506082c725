//! What a captured step costs beside its operations, in time on the host and in memory.
//!
//! `host`: chains of tiny products and views, called directly on the device, captured and run one by one, and captured
//! with the products of this crate; what is more than the direct calls, for each operation. And steps of a model of
//! many tiny layers, which is walked over to read its parameters: forward and backward, and whole, with wrapper and
//! optimizer.
//!
//! `memory`: the most bytes that the process holds in the third step, forward and backward, and with the optimizer,
//! beside model and moments and with what steps keep: eager burn, captured one by one, and captured with fused
//! operations in planned memory; and what the plan says.
//!
//! `compile`: how much longer the first step of a transformer of 24 layers takes than the second, where it is captured
//! and compiled: on one rank, and on two with each strategy.
//!
//! `cargo bench --bench captured_step -- [host|memory|compile] [ROUNDS]`

mod figures;
#[allow(dead_code)]
mod models;

use std::alloc::{GlobalAlloc, Layout as Allocation, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};
use std::time::Instant;

use burn::module::Module;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_parallel::graph::{CustomOps, Executor, Forward, TensorTree, capture_forward, capture_step};
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::TensorParallelConfig;
use burn_parallel::train::Engine;
use figures::{Figures, median};
use models::{Gpt, Mlp, SEQUENCE, VOCABULARY};

/// Counts the bytes that the process holds.
struct Counting;

static HELD: AtomicIsize = AtomicIsize::new(0);
static MOST: AtomicIsize = AtomicIsize::new(0);

fn change(by: isize) {
    MOST.fetch_max(HELD.fetch_add(by, Relaxed) + by, Relaxed);
}

// SAFETY: the system's allocator does it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Allocation) -> *mut u8 {
        change(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Allocation) -> *mut u8 {
        change(layout.size() as isize);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Allocation) {
        change(-(layout.size() as isize));
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Allocation, size: usize) -> *mut u8 {
        change(size as isize - layout.size() as isize);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const OPERATIONS: usize = 1000;

/// Pairs of a product and a view.
fn chain(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    (0..OPERATIONS / 2).fold(x, |x, _| x.matmul(weight.clone()).swap_dims(0, 1))
}

/// Microseconds an operation of each way, by turns.
fn by_turns<const WAYS: usize>(
    rounds: usize,
    operations: usize,
    mut ways: [Box<dyn FnMut() + '_>; WAYS],
) -> [f64; WAYS] {
    let mut times = [const { Vec::new() }; WAYS];
    for round in 0..=rounds {
        for (way, times) in ways.iter_mut().zip(&mut times) {
            let began = Instant::now();
            way();
            if round > 0 {
                times.push(1e6 * began.elapsed().as_secs_f64() / operations as f64);
            }
        }
    }
    times.map(median)
}

fn host(figures: &mut Figures, rounds: usize) -> Result<(), Error> {
    let device = Device::flex();
    let model = LinearConfig::new(1, 1).init(&device);
    let (x, weight) = (Tensor::<2>::ones([4, 4], &device), Tensor::<2>::eye(4, &device));
    let run = |_: &Linear, (x, weight): (Tensor<2>, Tensor<2>)| chain(x, weight);
    let forward = |fusion| {
        let captured = capture_forward(&model, (x.clone(), weight.clone()), run)?;
        Forward::new(captured, CustomOps::new().with_fusion(fusion))
    };
    let (mut plain, mut fused) = (forward(false)?, forward(true)?);
    let inputs = || (x.clone(), weight.clone());
    let [direct, plain, fused] = by_turns(
        rounds,
        OPERATIONS,
        [
            Box::new(|| drop(black_box(chain(x.clone(), weight.clone())))),
            Box::new(|| drop(black_box(plain.run(&model, inputs()).expect("a forward")))),
            Box::new(|| drop(black_box(fused.run(&model, inputs()).expect("a forward")))),
        ],
    );
    println!(
        "tiny operations, us each: called {direct:.3}, captured {plain:.3}, with products of this crate {fused:.3}"
    );
    println!(
        "  beside the operations: captured {:.3} us, with products of this crate {:.3} us",
        plain - direct,
        fused - direct
    );
    for (way, took) in [("called", direct), ("captured", plain), ("captured, products of this crate", fused)] {
        figures.note(format!("tiny operation, {way}"), took, "us");
    }
    figures.note("host time beside a captured operation", plain - direct, "us");

    let device = device.autodiff();
    let layers: Vec<Linear> = (0..200).map(|_| LinearConfig::new(4, 4).init(&device)).collect();
    let loss = |layers: &Vec<Linear>, x: Tensor<2>| layers.iter().fold(x, |x, layer| layer.forward(x).tanh()).mean();
    let x = Tensor::<2>::ones([4, 4], &device);
    let graph = capture_step(&layers, x.clone(), loss)?;
    let operations = graph.operations.len();
    let mut executor = Executor::new(graph, CustomOps::new())?;
    let [eager, captured] = by_turns(
        rounds,
        operations,
        [
            Box::new(|| drop(black_box(loss(&layers, x.clone()).backward()))),
            Box::new(|| drop(black_box(executor.step(&layers, x.clone()).expect("a step")))),
        ],
    );
    println!(
        "200 tiny layers, us for each of {operations} operations: eager {eager:.3}, captured and fused {captured:.3}"
    );
    figures.note("200 tiny layers, eager, an operation", eager, "us");
    figures.note("200 tiny layers, captured, an operation", captured, "us");

    let [eager, wrapped] = launch::threads(1).threads_per_rank(1).run(|rank| {
        let config = SgdConfig::new();
        let (mut plain, mut burns): (_, ModuleOptimizer) = (Some(layers.clone().fork(&device)), config.init());
        let wrapped = layers.clone().fork(&device).tensor_parallel(&rank, TensorParallelConfig::new(Plan::new()))?;
        let (mut wrapped, mut fused) = (Some(wrapped), config.init_fused());
        Ok(by_turns(
            rounds,
            operations,
            [
                Box::new(|| {
                    let model = plain.take().expect("the step before has given it back");
                    let gradients = GradientsParams::from_grads(loss(&model, x.clone()).backward(), &model);
                    plain = Some(burns.step(1e-4, model, gradients));
                }),
                Box::new(|| {
                    let mut model = wrapped.take().expect("the step before has given it back");
                    let step = model.step(x.clone(), loss).expect("a step");
                    wrapped = Some(model.optimize(&mut fused, 1e-4, step).expect("a step of the optimizer"));
                }),
            ],
        ))
    })?[0];
    println!("  whole steps, with SGD: eager {eager:.3}, wrapped and captured {wrapped:.3}");
    figures.note("200 tiny layers, eager and optimizer, an operation", eager, "us");
    figures.note("200 tiny layers, wrapped and optimizer, an operation", wrapped, "us");
    Ok(())
}

/// The most bytes in the third step beside model and moments, forward and backward, and with the optimizer: eagerly,
/// one by one, and fused; and those of the plan.
fn memory<M: Module + Sync, I: TensorTree + Clone + Sync>(
    model: impl Fn(&Device) -> M + Sync,
    moments: usize,
    optimizer: impl Fn(bool) -> ModuleOptimizer + Sync,
    inputs: impl Fn() -> I + Sync,
    loss: impl Fn(&M, I) -> Tensor<1> + Sync,
) -> Result<[[f64; 2]; 4], Error> {
    let measured = launch::threads(1).threads_per_rank(1).run(|rank| {
        let device = rank.device().autodiff();
        let mut found = [[0.0; 2]; 4];
        for (mode, found) in found.iter_mut().enumerate().take(3) {
            let before = HELD.load(Relaxed);
            let model = model(&device).materialize();
            // Parameters are made when they are first read.
            let own = 4 * model.num_params() as isize;
            let mut optim = optimizer(mode == 2);
            let mut eager = (mode == 0).then(|| model.clone());
            let config = TensorParallelConfig::new(Plan::new()).with_fusion(mode == 2);
            let mut captured = if mode > 0 {
                Some(model.tensor_parallel(&rank, config)?)
            } else {
                drop(model);
                None
            };
            let beside = || (MOST.load(Relaxed) - before - own * (1 + moments as isize)) as f64 / 1e6;
            for _ in 0..3 {
                MOST.store(HELD.load(Relaxed), Relaxed);
                if let Some(taken) = eager.take() {
                    let gradients = GradientsParams::from_grads(loss(&taken, inputs()).backward(), &taken);
                    found[0] = beside();
                    eager = Some(optim.step(1e-4, taken, gradients));
                }
                if let Some(mut taken) = captured.take() {
                    let gradients = taken.step(inputs(), &loss)?.grads;
                    found[0] = beside();
                    captured = Some(optim.step(1e-4, taken, gradients));
                }
                found[1] = beside();
            }
        }
        let model = model(&device).materialize();
        let graph = capture_step(&model, inputs(), &loss)?;
        found[3] = [Executor::new(graph, CustomOps::new())?.memory().peak as f64 / 1e6; 2];
        Ok(found)
    })?;
    Ok(measured[0])
}

fn report(figures: &mut Figures, name: &str, found: [[f64; 2]; 4]) {
    for (number, what) in ["forward and backward", "with the optimizer"].into_iter().enumerate() {
        let [eager, plain, fused, planned] = found.map(|bytes| bytes[number]);
        println!(
            "{name}, {what}: eager {eager:.1} MB, one by one {plain:.1} MB, fused {fused:.1} MB, planned {planned:.1} MB"
        );
        println!("{name}, {what}: fused over eager {:.3}, over its plan {:.3}", fused / eager, fused / planned);
        for (way, bytes) in [("eager", eager), ("captured, one by one", plain), ("captured, fused", fused)] {
            figures.note(format!("{name}, {what}: {way}, memory"), bytes, "MB");
        }
        figures.note(format!("{name}, {what}: fused over eager, memory"), fused / eager, "ratio");
    }
    let [_, _, [fused, _], [planned, _]] = found;
    figures.note(format!("{name}: memory of a step over its plan"), fused / planned, "ratio");
}

/// Seconds that the first step takes beyond the second, on the slowest rank.
fn compile(figures: &mut Figures) -> Result<(), Error> {
    let captured = || Strategy::new().with_engine(Engine::Captured);
    let sharded = DataParallelConfig::new().with_sharding(Sharding::Parameters);
    let ways = [
        ("one rank", 1, captured()),
        ("tp 2", 2, captured().with_tp(2, Plan::megatron())),
        ("pp 2", 2, captured().with_pp(2, PipelineConfig::new(4))),
        ("ZeRO 3, dp 2", 2, captured().with_dp(2).with_data(sharded)),
    ];
    for (name, ranks, strategy) in ways {
        let took = launch::threads(ranks).threads_per_rank(1).run(|rank| {
            let device = rank.device().autodiff();
            let model = TransformerEncoderConfig::new(64, 256, 8, 24).with_dropout(0.0).init(&device);
            let mut model = model.parallelize(&rank, &strategy)?;
            let x = Tensor::<3>::ones([4, 32, 64], &device);
            let loss =
                |model: &TransformerEncoder, x| model.forward(TransformerEncoderInput::new(x)).powi_scalar(2).mean();
            let mut times = [0.0; 2];
            for time in &mut times {
                let began = Instant::now();
                model.step(x.clone(), loss)?;
                *time = began.elapsed().as_secs_f64();
            }
            Ok(rank.all_reduce(vec![times[0] - times[1]], ReduceOp::Max)?[0])
        })?[0];
        println!("24 layers, {name}: captured and compiled in {took:.3} s");
        figures.note(format!("24 layers, {name}: captured and compiled"), took, "s");
    }
    Ok(())
}

fn main() -> Result<(), Error> {
    let (arguments, mut figures) = (figures::arguments(), Figures::of("captured_step"));
    let wanted = |name: &str| {
        let named = |argument: &String| ["host", "memory", "compile"].contains(&argument.as_str());
        !arguments.iter().any(named) || arguments.iter().any(|argument| argument == name)
    };
    if wanted("host") {
        host(&mut figures, arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(31))?;
    }
    if wanted("compile") {
        compile(&mut figures)?;
    }
    if wanted("memory") {
        let device = Device::flex().autodiff();
        let numbers = |salt: usize| {
            let values: Vec<f32> = (0..32 * 1024).map(|i| ((i * 7919 + salt) % 1000) as f32 / 500.0 - 1.0).collect();
            Tensor::<2>::from_data(TensorData::new(values, [32, 1024]), &device)
        };
        let sgd = |fused| if fused { SgdConfig::new().init_fused() } else { SgdConfig::new().init() };
        let loss = |model: &Mlp, (input, targets)| model.loss(input, targets);
        report(&mut figures, "mlp", memory(Mlp::new, 0, sgd, || (numbers(1), numbers(2)), loss)?);
        let numbers = |salt: usize| {
            let values: Vec<i64> = (0..8 * SEQUENCE).map(|i| ((i * 7919 + salt) % VOCABULARY) as i64).collect();
            Tensor::<2, Int>::from_data(TensorData::new(values, [8, SEQUENCE]), &device)
        };
        let adam = |fused| if fused { AdamConfig::new().init_fused() } else { AdamConfig::new().init() };
        let loss = |model: &Gpt, (tokens, targets)| model.loss(tokens, targets);
        report(&mut figures, "gpt", memory(Gpt::new, 2, adam, || (numbers(1), numbers(104729)), loss)?);
    }
    figures.finish();
    Ok(())
}
