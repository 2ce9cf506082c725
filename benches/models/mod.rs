//! The models that strategies are measured with.

use burn::module::Module;
use burn::nn::attention::generate_autoregressive_mask;
use burn::nn::loss::{CrossEntropyLossConfig, MseLoss, Reduction};
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::{Device, Int, Tensor, activation};
use burn_parallel::prelude::*;

pub const SEQUENCE: usize = 128;
pub const VOCABULARY: usize = 4096;

/// 4 blocks of 1024 - 4096 - 1024: 33.6 million parameters, 8 multiplications.
#[derive(Module, Debug)]
pub struct Mlp {
    layers: Vec<Linear>,
}

impl Mlp {
    pub fn new(device: &Device) -> Self {
        let sizes = (0..8).map(|layer| if layer % 2 == 0 { (1024, 4096) } else { (4096, 1024) });
        Self { layers: sizes.map(|(from, to)| LinearConfig::new(from, to).init(device)).collect() }
    }

    pub fn loss(&self, input: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
        let output =
            self.layers.chunks(2).fold(input, |x, block| block[1].forward(activation::relu(block[0].forward(x))));
        MseLoss::new().forward(output, targets, Reduction::Mean)
    }
}

/// 4 layers of width 256, 8 heads, vocabulary 4096: 5.3 million parameters.
#[derive(Module, Debug)]
pub struct Gpt {
    tokens: Embedding,
    positions: Embedding,
    encoder: TransformerEncoder,
    norm: LayerNorm,
    head: Linear,
}

impl Gpt {
    pub fn new(device: &Device) -> Self {
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

    pub fn loss(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let (device, rows) = (tokens.device(), targets.shape().num_elements());
        CrossEntropyLossConfig::new().init(&device).forward(self.logits(tokens), targets.reshape([rows]))
    }

    /// The loss as a sum and the number of tokens it is over.
    pub fn loss_sum(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> Loss {
        let rows = targets.shape().num_elements();
        let nats = activation::log_softmax(self.logits(tokens), 1).gather(1, targets.reshape([rows, 1]));
        Loss::sum(nats.sum().neg(), rows)
    }

    /// `[rows * length, vocabulary]`.
    fn logits(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let (device, [rows, length]) = (tokens.device(), tokens.dims());
        let positions = Tensor::<1, Int>::arange(0..length as i64, &device).reshape([1, length]);
        let x = self.tokens.forward(tokens) + self.positions.forward(positions);
        let mask = generate_autoregressive_mask(rows, length, &device);
        let x = self.encoder.forward(TransformerEncoderInput::new(x).mask_attn(mask));
        self.head.forward(self.norm.forward(x)).reshape([rows * length, VOCABULARY])
    }
}
