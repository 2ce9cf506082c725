//! A data-parallel step against one rank alone and against two ranks that do not talk to each other.
//!
//! The three take turns within one run, round by round, and what counts is the median over rounds of their ratio: a
//! machine that is slower for a while is slower for all of them. That is why this is a loop of its own and not criterion's.
//!
//! `cargo bench --bench data_parallel -- [mlp|gpt] [ROUNDS]`

use std::time::Instant;

use burn::module::Module;
use burn::nn::attention::generate_autoregressive_mask;
use burn::nn::loss::{CrossEntropyLossConfig, MseLoss, Reduction};
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use burn_parallel::prelude::*;

const STEPS_PER_TURN: usize = 2;

/// 4 blocks of 1024 - 4096 - 1024: 33.6 million parameters, 8 multiplications.
#[derive(Module, Debug)]
struct Mlp {
    layers: Vec<Linear>,
}

impl Mlp {
    fn new(device: &Device) -> Self {
        let sizes = (0..8).map(|layer| if layer % 2 == 0 { (1024, 4096) } else { (4096, 1024) });
        Self { layers: sizes.map(|(from, to)| LinearConfig::new(from, to).init(device)).collect() }
    }

    fn loss(&self, input: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
        let output =
            self.layers.chunks(2).fold(input, |x, block| block[1].forward(activation::relu(block[0].forward(x))));
        MseLoss::new().forward(output, targets, Reduction::Mean)
    }
}

/// 4 layers of width 256, 8 heads, vocabulary 4096: 5.3 million parameters.
#[derive(Module, Debug)]
struct Gpt {
    tokens: Embedding,
    positions: Embedding,
    encoder: TransformerEncoder,
    norm: LayerNorm,
    head: Linear,
}

const SEQUENCE: usize = 128;
const VOCABULARY: usize = 4096;

impl Gpt {
    fn new(device: &Device) -> Self {
        Self {
            tokens: EmbeddingConfig::new(VOCABULARY, 256).init(device),
            positions: EmbeddingConfig::new(SEQUENCE, 256).init(device),
            encoder: TransformerEncoderConfig::new(256, 1024, 8, 4)
                .with_dropout(0.0)
                .with_norm_first(true)
                .init(device),
            norm: LayerNormConfig::new(256).init(device),
            head: LinearConfig::new(256, VOCABULARY).init(device),
        }
    }

    fn loss(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let (device, [rows, length]) = (tokens.device(), tokens.dims());
        let positions = Tensor::<1, Int>::arange(0..length as i64, &device).reshape([1, length]);
        let x = self.tokens.forward(tokens) + self.positions.forward(positions);
        let mask = generate_autoregressive_mask(rows, length, &device);
        let x = self.encoder.forward(TransformerEncoderInput::new(x).mask_attn(mask));
        let logits = self.head.forward(self.norm.forward(x)).reshape([rows * length, VOCABULARY]);
        CrossEntropyLossConfig::new().init(&device).forward(logits, targets.reshape([rows * length]))
    }
}

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
