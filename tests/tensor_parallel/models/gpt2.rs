//! A decoder in the manner of GPT-2: query, key and value from one layer, learnt positions, an output tied to the
//! embedding.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation::{gelu, log_softmax, softmax};

const HEADS: usize = 12;

#[derive(Module, Debug)]
pub struct Gpt2 {
    wte: Embedding,
    wpe: Embedding,
    h: Vec<Block>,
    ln_f: LayerNorm,
}

#[derive(Module, Debug)]
struct Block {
    ln_1: LayerNorm,
    attn: Attention,
    ln_2: LayerNorm,
    mlp: Mlp,
}

/// One layer for query, key and value, either three thirds or the three of a head side by side.
#[derive(Module, Debug)]
struct Attention {
    c_attn: Linear,
    c_proj: Linear,
    by_head: bool,
}

#[derive(Module, Debug)]
struct Mlp {
    c_fc: Linear,
    c_proj: Linear,
}

pub fn init(words: usize, width: usize, by_head: bool, device: &Device) -> Gpt2 {
    let linear = |takes, gives| LinearConfig::new(takes, gives).init(device);
    let norm = || LayerNormConfig::new(width).init(device);
    let block = |_| Block {
        ln_1: norm(),
        attn: Attention { c_attn: linear(width, 3 * width), c_proj: linear(width, width), by_head },
        ln_2: norm(),
        mlp: Mlp { c_fc: linear(width, 4 * width), c_proj: linear(4 * width, width) },
    };
    Gpt2 {
        wte: EmbeddingConfig::new(words, width).init(device),
        wpe: EmbeddingConfig::new(128, width).init(device),
        h: (0..2).map(block).collect(),
        ln_f: norm(),
    }
}

impl Attention {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [rows, length, width] = x.dims();
        let size = width / HEADS;
        let all = self.c_attn.forward(x);
        let [query, key, value] = match self.by_head {
            true => {
                let all = all.reshape([rows, length, HEADS, 3, size]);
                [0, 1, 2].map(|which| all.clone().narrow(3, which, 1).squeeze_dim::<4>(3).swap_dims(1, 2))
            }
            false => [0, 1, 2].map(|which| {
                let one = all.clone().narrow(2, which * width, width);
                one.reshape([rows, length, HEADS, size]).swap_dims(1, 2)
            }),
        };
        let later = Tensor::<2, Bool>::tril_mask([length, length], 0, &query.device()).unsqueeze::<4>();
        let scores = query.matmul(key.transpose()) / (size as f64).sqrt();
        let seen = softmax(scores.mask_fill(later, -1e9), 3).matmul(value);
        self.c_proj.forward(seen.swap_dims(1, 2).reshape([rows, length, width]))
    }
}

impl Gpt2 {
    pub fn loss(&self, tokens: Tensor<2, Int>) -> Tensor<1> {
        let [rows, length] = tokens.dims();
        let length = length - 1;
        let places = Tensor::<1, Int>::arange(0..length as i64, &tokens.device()).unsqueeze::<2>();
        let mut x = self.wte.forward(tokens.clone().narrow(1, 0, length)) + self.wpe.forward(places);
        for block in &self.h {
            x = x.clone() + block.attn.forward(block.ln_1.forward(x));
            x = x.clone() + block.mlp.c_proj.forward(gelu(block.mlp.c_fc.forward(block.ln_2.forward(x))));
        }
        let logits = self.ln_f.forward(x).matmul(self.wte.weight.val().transpose().unsqueeze());
        let targets = tokens.narrow(1, 1, length).reshape([rows * length, 1]);
        log_softmax(logits.flatten::<2>(0, 1), 1).gather(1, targets).mean().neg()
    }
}
