//! An LSTM over tokens.

use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, Lstm, LstmConfig};
use burn::prelude::*;

use super::{seeded, token_cross_entropy};

#[derive(Module, Debug)]
pub struct Rnn {
    pub embedding: Embedding,
    pub lstm: Lstm,
    pub head: Linear,
}

impl Rnn {
    /// A language model of 11 words.
    pub fn new(device: &Device) -> Self {
        seeded(Self::of(11, 11, device))
    }

    pub fn of(vocabulary: usize, outputs: usize, device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(vocabulary, 6).init(device),
            lstm: LstmConfig::new(6, 7, true).init(device),
            head: LinearConfig::new(7, outputs).init(device),
        }
    }

    /// What the head makes of the state behind the last token.
    pub fn last(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let (_, state) = self.lstm.forward(self.embedding.forward(tokens), None);
        self.head.forward(state.hidden)
    }

    pub fn loss(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let (x, _) = self.lstm.forward(self.embedding.forward(tokens), None);
        token_cross_entropy(self.head.forward(x), targets)
    }
}
