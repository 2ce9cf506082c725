//! What the measurements share: sizes, the model, a loss, an optimizer.

use burn::module::Module;
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::tensor::{Device, Int, Tensor};
use burn_parallel::batch::AdamSettings;
use burn_parallel::prelude::*;

use crate::gpt::{Gpt, GptConfig};
use crate::text::{Text, VOCAB, tensors};

/// How much is measured.
pub struct Sizes {
    /// Tokens of a row.
    pub seq: usize,
    /// The model of the strategies: width and layers.
    pub wide: [usize; 2],
    /// Rounds of the strategies, of which medians are taken.
    pub rounds: usize,
    /// The model of the curves.
    pub small: [usize; 2],
    /// Rows of a step of each curve.
    pub batches: Vec<usize>,
    /// Rows that each curve sees.
    pub rows: usize,
    /// Rows that the branches see.
    pub branch_rows: usize,
}

impl Sizes {
    pub fn full() -> Self {
        let (seq, wide, small) = (32, [128, 4], [32, 2]);
        Self { seq, wide, rounds: 9, small, batches: vec![4, 16, 64], rows: 24_576, branch_rows: 4096 }
    }

    pub fn quick() -> Self {
        let (seq, wide, small) = (8, [16, 2], [8, 1]);
        Self { seq, wide, rounds: 1, small, batches: vec![2, 4], rows: 16, branch_rows: 32 }
    }
}

/// A model of a width and so many layers, the same for a seed.
pub fn model([width, layers]: [usize; 2], seq: usize, seed: u64) -> Gpt {
    let device = Device::flex();
    device.seed(seed);
    GptConfig::new(VOCAB, seq, width, 2, layers).init(&device.autodiff())
}

/// The summed loss of some rows, over their tokens.
pub fn loss(model: &Gpt, (tokens, targets): (Tensor<2, Int>, Tensor<2, Int>)) -> Loss {
    let (nats, count) = model.loss_sum(tokens, targets);
    Loss::sum(nats, count)
}

/// The rows of the smallest batch, for which the settings of Adam are these.
pub const BASE_ROWS: usize = 4;

/// The settings of Adam for a batch of so many rows: by the square-root rule.
pub fn settings(rows: usize) -> Result<AdamSettings, Error> {
    let base = AdamSettings { lr: 1e-3, beta_1: 0.975, beta_2: 0.999, epsilon: 1e-8 };
    base.for_batch(rows as f64 / BASE_ROWS as f64)
}

pub fn optimizer(settings: AdamSettings) -> ModuleOptimizer {
    let AdamSettings { beta_1, beta_2, epsilon, .. } = settings;
    let config = AdamWConfig::new().with_beta_1(beta_1 as f32).with_beta_2(beta_2 as f32);
    config.with_epsilon(epsilon as f32).with_weight_decay(0.0).init()
}

/// The mean loss over some rows, in nats per token.
pub fn mean_loss(model: &Gpt, rows: &[&[u8]]) -> f64 {
    let model = model.valid();
    let (mut nats, mut tokens) = (0.0, 0);
    for rows in rows.chunks(32) {
        let (inputs, targets) = tensors(rows, &Device::flex());
        let (sum, count) = model.loss_sum(inputs, targets);
        nats += sum.into_scalar::<f64>();
        tokens += count;
    }
    nats / tokens as f64
}

/// Rows of the text that is learned from, to be compared with those held out.
pub fn learned(text: &Text, rows: usize) -> Vec<&[u8]> {
    text.rows(u64::MAX, 0, rows, 0, 1)
}
