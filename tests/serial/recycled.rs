//! Captured steps make their tensors in memory that the steps before had, and give it back with the model.

use std::sync::atomic::Ordering::Relaxed;

use burn::module::Module;
use burn::nn::attention::generate_autoregressive_mask;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn_parallel::graph::{CustomOps, Executor, capture_step};
use burn_parallel::prelude::*;
use burn_parallel::tensor_parallel::TensorParallelConfig;
use burn_parallel::train::Engine;

use crate::memory::{LARGEST, MOST, Mlp, OF_SIZE, SIZE, WHOLE, held};

/// A weight has 4 MiB, as have the rows: all other tensors are smaller than a row of it.
const ROWS: usize = 1024;

/// What `gemm` packs factors in, some of which it keeps, a panel of 1 MiB in which a product turns one, and what burn
/// keeps for each operation.
const BESIDE: isize = 6 << 20;

fn rows(device: &Device) -> Tensor<2> {
    Tensor::ones([ROWS, 1024], device)
}

#[test]
fn a_step_needs_what_its_plan_says() {
    let _turn = crate::turn();
    let device = Device::flex().autodiff();
    let (model, x) = (Mlp::new(&device).materialize(), rows(&device));
    let loss = |model: &Mlp, x| model.loss(x);
    let graph = capture_step(&model, x.clone(), loss).unwrap();
    let mut executor = Executor::new(graph, CustomOps::new()).unwrap();
    let plan = executor.memory().peak as isize;
    for number in 0..3 {
        let before = held();
        MOST.store(before, Relaxed);
        let outputs = executor.step(&model, x.clone()).unwrap();
        let peak = MOST.load(Relaxed) - before;
        drop(outputs);
        // The first finds nothing yet, the others find what it had.
        let expected = if number == 0 { plan } else { 0 };
        assert!((peak - expected).abs() <= BESIDE, "step {number} took {peak} bytes at most, planned are {plan}");
    }
    let before = held();
    drop(executor);
    assert!((before - held() - plan).abs() <= BESIDE, "{} bytes came back", before - held());
}

const WIDTH: usize = 256;
const VOCABULARY: usize = 2048;
const TOKENS: [usize; 2] = [8, 128];

#[derive(Module, Debug)]
struct Gpt {
    tokens: Embedding,
    encoder: TransformerEncoder,
    head: Linear,
}

impl Gpt {
    fn new(device: &Device) -> Self {
        let encoder = TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 8, 2).with_dropout(0.0).with_norm_first(true);
        Self {
            tokens: EmbeddingConfig::new(VOCABULARY, WIDTH).init(device),
            encoder: encoder.init(device),
            head: LinearConfig::new(WIDTH, VOCABULARY).init(device),
        }
    }

    fn loss(&self, tokens: Tensor<2, Int>) -> Tensor<1> {
        let (device, [rows, length]) = (tokens.device(), tokens.dims());
        let targets = tokens.clone().reshape([rows * length]);
        let mask = generate_autoregressive_mask(rows, length, &device);
        let x = TransformerEncoderInput::new(self.tokens.forward(tokens)).mask_attn(mask);
        let logits = self.head.forward(self.encoder.forward(x)).reshape([rows * length, VOCABULARY]);
        CrossEntropyLossConfig::new().init(&device).forward(logits, targets)
    }
}

#[test]
fn a_transformer_needs_what_its_plan_says_and_less_than_eager_steps() {
    let _turn = crate::turn();
    // On one thread, which has its panels for transposed weights from an executor before.
    let measured = || {
        let device = Device::flex().autodiff();
        let model = Gpt::new(&device).materialize();
        let tokens = Tensor::<1, Int>::arange(0..(TOKENS[0] * TOKENS[1]) as i64, &device).reshape(TOKENS);
        let most = |mut step: Box<dyn FnMut() + '_>| {
            let before = held();
            for _ in 0..2 {
                step();
            }
            // In a later one.
            MOST.store(held(), Relaxed);
            step();
            MOST.load(Relaxed) - before
        };
        let eager = most(Box::new(|| {
            drop(GradientsParams::from_grads(model.loss(tokens.clone()).backward(), &model));
        }));
        let executor = || {
            let graph = capture_step(&model, tokens.clone(), Gpt::loss).unwrap();
            Executor::new(graph, CustomOps::new()).unwrap()
        };
        executor().step(&model, tokens.clone()).unwrap();
        let mut executor = executor();
        let plan = executor.memory().peak as f64;
        let taken = most(Box::new(|| {
            executor.step(&model, tokens.clone()).unwrap();
        })) as f64;
        assert!((taken / plan - 1.0).abs() < 0.02, "{taken} bytes at most, planned are {plan}");
        assert!(taken < 0.7 * eager as f64, "{taken} bytes at most, {eager} in eager steps");
    };
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(measured);
}

#[test]
fn training_asks_for_no_large_memory_after_its_first_steps() {
    let _turn = crate::turn();
    launch::threads(1)
        .run(|rank| {
            let device = rank.device().autodiff();
            let config = TensorParallelConfig::new(Plan::new());
            let mut model = Mlp::new(&device).tensor_parallel(&rank, config)?;
            let mut optim: ModuleOptimizer = SgdConfig::new().init_fused();
            let x = rows(&device);
            for number in 0..4 {
                LARGEST.set(0);
                let step = model.step(x.clone(), |model, x| model.loss(x))?;
                model = model.optimize(&mut optim, 0.01, step)?;
                let largest = LARGEST.get();
                assert!(number < 2 || largest < WHOLE, "step {number} asked for {largest} bytes at once");
            }
            Ok(())
        })
        .unwrap();
}

/// How often any thread asks for memory of this size in each of four steps of two ranks, with or without gradient
/// checkpointing.
fn asked(strategy: &Strategy, checkpoints: bool, optimizer: fn() -> ModuleOptimizer, size: usize) -> Vec<usize> {
    SIZE.store(size, Relaxed);
    let asked = launch::threads(2).threads_per_rank(1).run(|rank| {
        let device = rank.device().autodiff();
        let device = if checkpoints { device.gradient_checkpointing() } else { device };
        let mut model = Mlp::new(&device).parallelize(&rank, strategy)?;
        let mut optim = optimizer();
        let x = rows(&device);
        let mut asked = Vec::new();
        for _ in 0..4 {
            rank.barrier()?;
            let before = OF_SIZE.load(Relaxed);
            rank.barrier()?;
            let step = model.step(x.clone(), |model, x| model.loss(x))?;
            model = model.optimize(&mut optim, 0.01, step)?;
            rank.barrier()?;
            asked.push(OF_SIZE.load(Relaxed) - before);
        }
        Ok(asked)
    });
    SIZE.store(usize::MAX, Relaxed);
    asked.unwrap().swap_remove(0)
}

fn dividing(sharding: Sharding, engine: Engine) -> Strategy {
    let data = DataParallelConfig::new().with_sharding(sharding);
    Strategy::new().with_dp(2).with_data(data).with_engine(engine)
}

/// Products write the gradients of weights into the memory in which a bucket is reduced. With ZeRO parameters are
/// gathered, rows of the sums made and those of parameters updated where those of the step before were: no thread,
/// those that communicate included, asks for memory of that size.
#[test]
fn gradients_are_averaged_without_a_copy() {
    let _turn = crate::turn();
    for sharding in [Sharding::None, Sharding::Optimizer, Sharding::Gradients, Sharding::Parameters] {
        for size in [WHOLE, WHOLE / 2] {
            let strategy = dividing(sharding, Engine::Captured);
            let asked = asked(&strategy, false, || SgdConfig::new().init_fused(), size);
            // Nothing is divided of replicas without ZeRO, nor gathered in their first step.
            let begins = size == WHOLE || sharding != Sharding::None;
            assert!(asked[2..] == [0, 0] && (asked[0] > 0) == begins, "{sharding}: asked for {size} bytes: {asked:?}");
        }
    }
}

/// Nor do eager steps ask for more than burn itself, whose backward makes each gradient anew: not to divide a gradient,
/// nor for the rows that an optimizer updates, nor to gather these, or with ZeRO 3 the parameters for each pass.
#[test]
fn rows_are_updated_where_they_lie() {
    let _turn = crate::turn();
    let optimizers: [fn() -> ModuleOptimizer; 2] = [|| SgdConfig::new().init(), || SgdConfig::new().init_fused()];
    for optimizer in optimizers {
        for size in [WHOLE, WHOLE / 2] {
            let of = |sharding, checkpoints| {
                asked(&dividing(sharding, Engine::Eager), checkpoints, optimizer, size)[2..].to_vec()
            };
            for (sharding, checkpoints) in
                [(Sharding::Optimizer, false), (Sharding::Gradients, false), (Sharding::Parameters, true)]
            {
                let plain = of(Sharding::None, checkpoints);
                assert_eq!(of(sharding, checkpoints), plain, "{sharding}: pieces of {size} bytes in steps");
            }
        }
    }
}
