//! A language model of burn's transformer encoder.

use std::ops::Range;

use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{
    Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, PositionalEncoding,
    PositionalEncodingConfig, attention,
};
use burn::prelude::*;
use burn::tensor::activation::log_softmax;

use super::{Numbers, Tokens, device, seeded, token_cross_entropy};

#[derive(Module, Debug)]
pub struct Lm {
    pub embedding: Embedding,
    pub position: Option<PositionalEncoding>,
    pub encoder: TransformerEncoder,
    pub norm: LayerNorm,
    pub head: Linear,
}

impl Lm {
    /// Two heads, and encodings of positions.
    pub fn new(vocabulary: usize, width: usize, layers: usize, device: &Device) -> Self {
        seeded(Self::lazy(vocabulary, width, layers, device))
    }

    /// [`Self::new`], of parameters that are not made yet.
    pub fn lazy(vocabulary: usize, width: usize, layers: usize, device: &Device) -> Self {
        let encoder = TransformerEncoderConfig::new(width, 4 * width, 2, layers).with_dropout(0.0);
        let position = PositionalEncodingConfig::new(width).with_max_sequence_size(64).init(device);
        Self { position: Some(position), ..Self::of(vocabulary, &encoder, vocabulary, device) }
    }

    /// Heads and widths that 2, 3 and 4 ranks divide, with dropout if asked for; no encodings of positions.
    pub fn wide(vocabulary: usize, dropout: f64, norm_first: bool, layers: usize, device: &Device) -> Self {
        let encoder = TransformerEncoderConfig::new(24, 48, 12, layers);
        Self::of(vocabulary, &encoder.with_dropout(dropout).with_norm_first(norm_first), vocabulary, device)
    }

    /// Of this encoder, and without encodings of positions.
    pub fn of(vocabulary: usize, encoder: &TransformerEncoderConfig, outputs: usize, device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(vocabulary, encoder.d_model).init(device),
            position: None,
            encoder: encoder.init(device),
            norm: LayerNormConfig::new(encoder.d_model).init(device),
            head: LinearConfig::new(encoder.d_model, outputs).init(device),
        }
    }

    /// Tokens at their positions, as the encoder takes them.
    pub fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let x = self.embedding.forward(tokens);
        match &self.position {
            Some(position) => position.forward(x),
            None => x,
        }
    }

    /// What every token sees, later ones too.
    pub fn logits(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let x = self.encoder.forward(TransformerEncoderInput::new(self.embed(tokens)));
        self.head.forward(self.norm.forward(x))
    }

    /// The loss of each token of [`Self::logits`], `[rows * length, 1]`.
    pub fn token_losses(&self, (tokens, targets): Tokens) -> Tensor<2> {
        let [rows, length] = tokens.dims();
        let logits = self.logits(tokens).flatten::<2>(0, 1);
        log_softmax(logits, 1).gather(1, targets.reshape([rows * length, 1])).neg()
    }

    /// The mean loss of tokens that see earlier ones only.
    pub fn loss(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let [rows, length] = tokens.dims();
        let mask = attention::generate_autoregressive_mask(rows, length, &tokens.device());
        let input = TransformerEncoderInput::new(self.embed(tokens)).mask_attn(mask);
        let logits = self.head.forward(self.norm.forward(self.encoder.forward(input)));
        token_cross_entropy(logits, targets)
    }
}

/// Some of the 9 rows of the batch of a step, each of 5 tokens out of 11.
pub fn token_rows(step: usize, rows: Range<usize>) -> Tokens {
    let mut numbers = Numbers(step as u64 * 77 + 9);
    let (tokens, targets) = (numbers.classes([9, 5], 11, &device()), numbers.classes([9, 5], 11, &device()));
    (tokens.slice([rows.clone()]), targets.slice([rows]))
}
