//! A model whose embedding is also its head.

use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation::tanh;

use super::{cross_entropy, seeded};

/// The embedding is also the head: one parameter, used twice.
#[derive(Module, Debug)]
pub struct Tied {
    pub embedding: Embedding,
    pub inner: Linear,
}

impl Tied {
    pub fn new(device: &Device) -> Self {
        seeded(Self::of(11, 6, device))
    }

    pub fn of(vocabulary: usize, width: usize, device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(vocabulary, width).init(device),
            inner: LinearConfig::new(width, width).init(device),
        }
    }

    pub fn loss(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let x = tanh(self.inner.forward(self.embedding.forward(tokens)));
        let [b, s, width] = x.dims();
        let x = x.reshape([b * s, width]);
        cross_entropy(x.matmul(self.embedding.weight.val().transpose()), targets.reshape([b * s]))
    }
}
