//! A small GPT, as anyone would write it with `burn::nn`: this file knows nothing of ranks.

use burn::config::Config;
use burn::module::Module;
use burn::nn::attention::generate_autoregressive_mask;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::{Device, Int, Tensor, activation};

/// The sizes of a [`Gpt`].
#[derive(Config, Debug)]
pub struct GptConfig {
    /// How many different tokens there are.
    pub vocab: usize,
    /// The longest sequence, in tokens.
    pub seq: usize,
    /// The width of the residual stream.
    pub d_model: usize,
    /// The attention heads of each layer; they divide `d_model`.
    pub heads: usize,
    /// The number of transformer layers.
    pub layers: usize,
    /// The dropout rate.
    #[config(default = 0.0)]
    pub dropout: f64,
}

/// A decoder-only transformer with learned positions and the normalisation before each block.
#[derive(Module, Debug)]
pub struct Gpt {
    tokens: Embedding,
    positions: Embedding,
    layers: TransformerEncoder,
    norm: LayerNorm,
    output: Linear,
}

impl GptConfig {
    /// Makes the model with fresh weights, drawn now from the random numbers of the device.
    pub fn init(&self, device: &Device) -> Gpt {
        let small = Initializer::Normal { mean: 0.0, std: 0.02 };
        let embedding = |n| EmbeddingConfig::new(n, self.d_model).with_initializer(small.clone()).init(device);
        Gpt {
            tokens: embedding(self.vocab),
            positions: embedding(self.seq),
            layers: TransformerEncoderConfig::new(self.d_model, 4 * self.d_model, self.heads, self.layers)
                .with_dropout(self.dropout)
                .with_norm_first(true)
                .init(device),
            norm: LayerNormConfig::new(self.d_model).init(device),
            output: LinearConfig::new(self.d_model, self.vocab).with_bias(false).init(device),
        }
        .materialize()
    }
}

impl Gpt {
    /// The longest sequence that the model takes, in tokens.
    pub fn context(&self) -> usize {
        self.positions.weight.dims()[0]
    }

    /// The logits of the token after each position.
    ///
    /// # Shapes
    ///
    /// - tokens: `[batch, seq]`
    /// - output: `[batch, seq, vocab]`
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let device = tokens.device();
        let [_, seq] = tokens.dims();
        let positions = Tensor::arange(0..seq as i64, &device).reshape([1, seq]);
        let x = self.tokens.forward(tokens) + self.positions.forward(positions);
        // One mask serves every row: it broadcasts over the batch.
        let causal = generate_autoregressive_mask(1, seq, &device);
        let x = self.layers.forward(TransformerEncoderInput::new(x).mask_attn(causal));
        self.output.forward(self.norm.forward(x))
    }

    /// The sum of the losses of all targets in nats, and how many targets there are.
    ///
    /// # Shapes
    ///
    /// - tokens, targets: `[batch, seq]`
    /// - output: `[1]`
    pub fn loss_sum(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> (Tensor<1>, usize) {
        let [batch, seq] = targets.dims();
        let count = batch * seq;
        let logits: Tensor<2> = self.forward(tokens).flatten(0, 1);
        let nats = activation::log_softmax(logits, 1).gather(1, targets.reshape([count, 1])).sum().neg();
        (nats, count)
    }
}
