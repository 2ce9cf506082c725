//! Models of a few layers, each of which is a group of parameters.

use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::prelude::*;

pub const WIDTH: usize = 64;
pub const LAYERS: usize = 6;

#[derive(Module, Debug)]
pub struct Encoder {
    encoder: TransformerEncoder,
}

impl Encoder {
    pub fn new(device: &Device) -> Self {
        Self::of(LAYERS, device)
    }

    pub fn of(layers: usize, device: &Device) -> Self {
        let config = TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 4, layers).with_dropout(0.0).with_norm_first(true);
        Self { encoder: config.init(device) }
    }

    pub fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        let input = TransformerEncoderInput::new(x.unsqueeze());
        self.encoder.forward(input).powi_scalar(2).mean()
    }
}

/// Layers on matrices.
#[derive(Module, Debug)]
pub struct Chain {
    pub layers: Vec<Linear>,
}

impl Chain {
    pub fn new(device: &Device) -> Self {
        let layer = |_| LinearConfig::new(200, 200).with_bias(false).init(device);
        Self { layers: (0..LAYERS).map(layer).collect() }
    }

    /// By their weights.
    pub fn plain(&self, x: Tensor<2>) -> Tensor<1> {
        self.layers.iter().fold(x, |x, layer| layer.forward(x).tanh()).mean()
    }

    /// By views of them.
    pub fn turned(&self, x: Tensor<2>) -> Tensor<1> {
        self.layers.iter().fold(x, |x, layer| x.matmul(layer.weight.val().transpose()).tanh()).mean()
    }
}

/// The table of an embedding, less than what is gathered into memory that stays, and layers behind it.
#[derive(Module, Debug)]
pub struct Worded {
    embedding: Embedding,
    layers: Vec<Linear>,
}

impl Worded {
    pub const WIDTH: usize = 200;
    const WORDS: usize = 300;
    /// The bytes of the table, and those of a layer, which are the largest groups.
    pub const TABLE: isize = (4 * Self::WORDS * Self::WIDTH) as isize;
    pub const LAYER: isize = (4 * Self::WIDTH * (Self::WIDTH + 1)) as isize;

    pub fn of(layers: usize, device: &Device) -> Self {
        let layer = |_| LinearConfig::new(Self::WIDTH, Self::WIDTH).init(device);
        let embedding = EmbeddingConfig::new(Self::WORDS, Self::WIDTH).init(device);
        Self { embedding, layers: (0..layers).map(layer).collect() }
    }

    /// Of the inputs.
    pub fn without_table(&self, x: Tensor<2>) -> Tensor<1> {
        self.behind(x.unsqueeze())
    }

    /// Of rows of the table.
    pub fn with_table(&self, x: Tensor<2>) -> Tensor<1> {
        let words = x.narrow(1, 0, 1).int().swap_dims(0, 1);
        self.behind(self.embedding.forward(words))
    }

    /// Of rows of the table, and of the same again behind the layers.
    pub fn with_table_twice(&self, x: Tensor<2>) -> Tensor<1> {
        let words = || x.clone().narrow(1, 0, 1).int().swap_dims(0, 1);
        let behind = self.behind(self.embedding.forward(words()));
        behind + self.embedding.forward(words()).mean()
    }

    fn behind(&self, x: Tensor<3>) -> Tensor<1> {
        self.layers.iter().fold(x, |x, layer| layer.forward(x).tanh()).mean()
    }
}
