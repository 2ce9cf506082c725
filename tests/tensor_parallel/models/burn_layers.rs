//! A language model of burn's own layers.

use burn::module::Module;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, SwiGlu, SwiGluConfig, attention};
use burn::prelude::*;
use burn::tensor::activation::log_softmax;

const WORDS: usize = 1200;
const WIDTH: usize = 192;

#[derive(Module, Debug)]
pub struct Lm {
    tokens: Embedding,
    encoder: TransformerEncoder,
    gate: SwiGlu,
    down: Linear,
    head: Linear,
}

pub fn init(device: &Device) -> Lm {
    Lm {
        tokens: EmbeddingConfig::new(WORDS, WIDTH).init(device),
        encoder: TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 12, 2).with_dropout(0.1).init(device),
        gate: SwiGluConfig::new(WIDTH, 528).init(device),
        down: LinearConfig::new(528, WIDTH).init(device),
        head: LinearConfig::new(WIDTH, WORDS).init(device),
    }
}

impl Lm {
    pub fn loss(&self, tokens: Tensor<2, Int>) -> Tensor<1> {
        let [rows, length] = tokens.dims();
        let length = length - 1;
        let mask = attention::generate_autoregressive_mask(rows, length, &tokens.device());
        let x = self.tokens.forward(tokens.clone().narrow(1, 0, length));
        let x = self.encoder.forward(TransformerEncoderInput::new(x).mask_attn(mask));
        let x = x.clone() + self.down.forward(self.gate.forward(x));
        let targets = tokens.narrow(1, 1, length).reshape([rows * length, 1]);
        log_softmax(self.head.forward(x).flatten::<2>(0, 1), 1).gather(1, targets).mean().neg()
    }
}
