//! The model.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm};
use burn::tensor::activation::{log_softmax, silu};
use burn::tensor::{DType, Device, Int, Tensor};
use burn_parallel::prelude::*;

use super::attention::{Attention, Places};
use super::{Autocast, Batch, LlamaConfig};

/// A decoder with the layer that makes logits of what it gives.
#[derive(Module, Debug)]
pub struct Llama {
    model: Decoder,
    /// None if that is the embedding once more.
    lm_head: Option<Linear>,
}

#[derive(Module, Debug)]
struct Decoder {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    #[module(skip)]
    frequencies: Vec<f32>,
    attention_factor: f64,
    #[module(skip)]
    autocast: Autocast,
}

#[derive(Module, Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

/// A gated feed-forward: SwiGLU.
#[derive(Module, Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    #[module(skip)]
    autocast: Autocast,
}

impl LlamaConfig {
    /// A model with fresh weights, which are drawn when they are used for the first time: one that is loaded draws
    /// none.
    pub fn init(&self, device: &Device) -> Llama {
        let linear = |takes, gives, bias| self.linear(LinearConfig::new(takes, gives).with_bias(bias)).init(device);
        let norm = || self.norm(self.width).init(device);
        let layer = |_| Layer {
            input_layernorm: norm(),
            self_attn: Attention::new(self, device),
            post_attention_layernorm: norm(),
            mlp: Mlp {
                gate_proj: linear(self.width, self.inner, self.mlp_bias),
                up_proj: linear(self.width, self.inner, self.mlp_bias),
                down_proj: linear(self.inner, self.width, self.mlp_bias),
                autocast: self.autocast,
            },
        };
        let embedding = EmbeddingConfig::new(self.vocab, self.width).with_initializer(Self::INITIAL);
        Llama {
            model: Decoder {
                embed_tokens: embedding.init(device),
                layers: (0..self.layers).map(layer).collect(),
                norm: norm(),
                frequencies: self.rope.frequencies(self.head_size),
                attention_factor: self.rope.attention_factor(),
                autocast: self.autocast,
            },
            lm_head: (!self.tied).then(|| linear(self.width, self.vocab, false)),
        }
    }
}

impl Llama {
    /// The logits of the token after each.
    ///
    /// # Shapes
    ///
    /// - tokens, positions, documents: `[rows, length]`, as of a [`Batch`]
    /// - output: `[rows, length, vocab]`
    pub fn forward(&self, tokens: Tensor<2, Int>, positions: Tensor<2, Int>, documents: Tensor<2, Int>) -> Tensor<3> {
        self.logits(self.decode(tokens, positions, documents))
    }

    /// The logits of the token after one of each row.
    ///
    /// # Shapes
    ///
    /// - tokens, positions, documents: `[rows, length]`
    /// - last: `[rows, 1]`: which token of each row
    /// - output: `[rows, vocab]`
    pub fn next(
        &self,
        tokens: Tensor<2, Int>,
        positions: Tensor<2, Int>,
        documents: Tensor<2, Int>,
        last: Tensor<2, Int>,
    ) -> Tensor<2> {
        let x = self.decode(tokens, positions, documents);
        let [rows, _, width] = x.dims();
        let last = last.unsqueeze_dim::<3>(2).expand([rows, 1, width]);
        self.logits(x.gather(1, last)).squeeze_dim(1)
    }

    /// The cross entropy of all targets that are trained on, in nats: their sum, over their number.
    pub fn loss(&self, batch: Batch) -> Loss {
        let count = batch.weights.clone().sum();
        Loss::sum(self.losses(batch).sum(), count)
    }

    /// The cross entropy of each target in nats, times its weight.
    ///
    /// # Shapes
    ///
    /// - output: `[rows, length]`
    pub fn losses(&self, batch: Batch) -> Tensor<2> {
        let Batch { tokens, targets, weights, positions, documents } = batch;
        let [rows, length] = tokens.dims();
        let logits: Tensor<2> = self.forward(tokens, positions, documents).flatten(0, 1);
        let chosen = log_softmax(logits.cast(DType::F32), 1).gather(1, targets.reshape([rows * length, 1]));
        chosen.neg().reshape([rows, length]) * weights
    }

    fn decode(&self, tokens: Tensor<2, Int>, positions: Tensor<2, Int>, documents: Tensor<2, Int>) -> Tensor<3> {
        let Decoder { embed_tokens, layers, norm, frequencies, attention_factor, .. } = &self.model;
        let places = Places::new(positions, documents, frequencies, *attention_factor);
        let mut x = embed_tokens.forward(tokens);
        for layer in layers {
            x = x.clone() + layer.self_attn.forward(layer.input_layernorm.forward(x), &places);
            x = x.clone() + layer.mlp.forward(layer.post_attention_layernorm.forward(x));
        }
        norm.forward(x)
    }

    fn logits(&self, x: Tensor<3>) -> Tensor<3> {
        let autocast = self.model.autocast;
        let head = || autocast.narrow(self.model.embed_tokens.weight.val());
        autocast.wide(match &self.lm_head {
            Some(layer) => autocast.linear(layer, x),
            None => autocast.narrow(x).matmul(head().transpose().unsqueeze()),
        })
    }
}

impl Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let Self { gate_proj, up_proj, down_proj, autocast } = self;
        let inner = silu(autocast.linear(gate_proj, x.clone())) * autocast.linear(up_proj, x);
        autocast.wide(autocast.linear(down_proj, inner))
    }
}
