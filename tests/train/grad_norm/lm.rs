//! A small language model with all that a norm can get wrong: a vocabulary and a width that no number of ranks divides,
//! tied weights, frozen ones, and parameters that stay whole.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::{DType, activation};
use burn_parallel::prelude::*;

use crate::common::fill::{Numbers, cast, filled};
pub use crate::common::models::Tokens as Batch;

pub const WORDS: usize = 13;
const WIDTH: usize = 8;
const INNER: usize = 7;
pub const LAYERS: usize = 3;
pub const ROWS: usize = 9;
const LENGTH: usize = 5;

/// What of a model is chosen.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub tied: bool,
    /// Whether the first layer is not trained.
    pub frozen: bool,
    pub dtype: DType,
}

#[derive(Module, Debug)]
pub struct Lm {
    tokens: Embedding,
    layers: Vec<Layer>,
    norm: LayerNorm,
    head: Option<Linear>,
}

#[derive(Module, Debug)]
struct Layer {
    norm: LayerNorm,
    up: Linear,
    down: Linear,
}

impl Kind {
    pub fn init(self, device: &Device) -> Lm {
        let layer = |_| Layer {
            norm: LayerNormConfig::new(WIDTH).init(device),
            up: LinearConfig::new(WIDTH, INNER).init(device),
            down: LinearConfig::new(INNER, WIDTH).init(device),
        };
        let mut model = filled(Lm {
            tokens: EmbeddingConfig::new(WORDS, WIDTH).init(device),
            layers: (0..LAYERS).map(layer).collect(),
            norm: LayerNormConfig::new(WIDTH).init(device),
            head: (!self.tied).then(|| LinearConfig::new(WIDTH, WORDS).init(device)),
        });
        if self.frozen {
            model.layers[0] = model.layers[0].clone().no_grad();
        }
        cast(model, self.dtype)
    }

    pub fn plan(self) -> Plan {
        let layers =
            Plan::new().shard_padded("*.up.weight", 1).shard_padded("*.up.bias", 0).shard_padded("*.down.weight", 0);
        match self.tied {
            true => layers.shard_padded("tokens.weight", 0),
            false => layers.then(Plan::vocabulary("tokens", "head")),
        }
    }
}

pub fn cut(stages: usize) -> Cut {
    Cut::before((1..stages).map(|stage| format!("layers.{}.*", stage * LAYERS / stages)).collect::<Vec<_>>())
}

/// The batch of a step, of which a replica takes some rows.
pub fn batch(step: usize, device: &Device) -> Batch {
    let mut numbers = Numbers(step as u64 * 77 + 9);
    let mut words = || numbers.classes([ROWS, LENGTH], WORDS, device);
    (words(), words())
}

impl Lm {
    pub fn logits(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let mut x = self.tokens.forward(tokens);
        for layer in &self.layers {
            let h = layer.up.forward(layer.norm.forward(x.clone()));
            x = x + layer.down.forward(activation::gelu(h));
        }
        let x = self.norm.forward(x);
        match &self.head {
            Some(head) => head.forward(x),
            None => x.matmul(self.tokens.weight.val().transpose().unsqueeze()),
        }
    }

    /// The summed loss.
    pub fn summed(&self, (tokens, targets): Batch) -> (Tensor<1>, usize) {
        let [rows, length] = tokens.dims();
        let logits = self.logits(tokens).reshape([rows * length, WORDS]);
        let nats = activation::log_softmax(logits, 1).gather(1, targets.reshape([rows * length, 1]));
        (nats.sum().neg(), rows * length)
    }
}

pub fn loss(model: &Lm, batch: Batch) -> Loss {
    let (sum, items) = model.summed(batch);
    Loss::sum(sum, items)
}
