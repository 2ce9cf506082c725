//! An ordinary burn model with the paths of Hugging Face's: a decoder in the manner of Llama and Qwen2, of root mean
//! square norms, rotary positions, grouped queries and a gated feed-forward.

use burn::module::Module;
use burn::nn::{
    Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig, RotaryEncoding, RotaryEncodingConfig,
};
use burn::prelude::*;
use burn::tensor::activation::{log_softmax, silu, softmax};

/// What of a decoder is chosen.
#[derive(Clone, Copy)]
pub struct Config {
    pub words: usize,
    pub width: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// Whether query, key and value have a bias, as in Qwen2.
    pub bias: bool,
    /// Whether the output layer is the embedding.
    pub tied: bool,
    /// Whether positions are burn's `RotaryEncoding`; else halves are rotated by hand.
    pub burns_rotary: bool,
}

impl Config {
    pub const LLAMA: Self = Self {
        words: 1200,
        width: 192,
        inner: 528,
        layers: 2,
        heads: 12,
        kv_heads: 12,
        bias: false,
        tied: false,
        burns_rotary: false,
    };
    pub const QWEN2: Self = Self { kv_heads: 6, bias: true, tied: true, ..Self::LLAMA };

    /// Small enough to be trained in a test.
    pub fn small(self) -> Self {
        Self { words: 36, width: 48, inner: 60, ..self }
    }

    pub fn init(self, device: &Device) -> CausalLm {
        let linear = |takes, gives, bias| LinearConfig::new(takes, gives).with_bias(bias).init(device);
        let norm = || RmsNormConfig::new(self.width).init(device);
        let size = self.width / self.heads;
        let layer = |_| Layer {
            input_layernorm: norm(),
            self_attn: Attention {
                q_proj: linear(self.width, self.width, self.bias),
                k_proj: linear(self.width, self.kv_heads * size, self.bias),
                v_proj: linear(self.width, self.kv_heads * size, self.bias),
                o_proj: linear(self.width, self.width, false),
                rotary: self.burns_rotary.then(|| RotaryEncodingConfig::new(128, size).init(device)),
                heads: self.heads,
                kv_heads: self.kv_heads,
            },
            post_attention_layernorm: norm(),
            mlp: Mlp {
                gate_proj: linear(self.width, self.inner, false),
                up_proj: linear(self.width, self.inner, false),
                down_proj: linear(self.inner, self.width, false),
            },
        };
        CausalLm {
            model: Decoder {
                embed_tokens: EmbeddingConfig::new(self.words, self.width).init(device),
                layers: (0..self.layers).map(layer).collect(),
                norm: norm(),
            },
            lm_head: (!self.tied).then(|| linear(self.width, self.words, false)),
        }
    }
}

#[derive(Module, Debug)]
pub struct CausalLm {
    pub model: Decoder,
    pub lm_head: Option<Linear>,
}

#[derive(Module, Debug)]
pub struct Decoder {
    pub embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
}

#[derive(Module, Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

#[derive(Module, Debug)]
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    rotary: Option<RotaryEncoding>,
    heads: usize,
    kv_heads: usize,
}

#[derive(Module, Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// Turns the pairs of the first and the second half of the last dim by an angle that grows with the position.
fn rotated(x: Tensor<4>) -> Tensor<4> {
    let [_, _, length, size] = x.dims();
    let device = x.device();
    let places = Tensor::<1, Int>::arange(0..length as i64, &device).float().unsqueeze_dim::<2>(1);
    let pair = Tensor::<1, Int>::arange(0..(size / 2) as i64, &device).float();
    let speed = (pair * (-2.0 * 10_000f64.ln() / size as f64)).exp().unsqueeze_dim::<2>(0);
    let angles = places * speed;
    let angles = Tensor::cat(vec![angles.clone(), angles], 1).unsqueeze::<4>();
    let (first, second) = (x.clone().narrow(3, 0, size / 2), x.clone().narrow(3, size / 2, size / 2));
    x * angles.clone().cos() + Tensor::cat(vec![second.neg(), first], 3) * angles.sin()
}

impl Attention {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [rows, length, width] = x.dims();
        let size = width / self.heads;
        let heads = |x: Tensor<3>, number: usize| x.reshape([rows, length, number, size]).swap_dims(1, 2);
        let turn = |x: Tensor<4>| match &self.rotary {
            Some(rotary) => rotary.forward(x),
            None => rotated(x),
        };
        let group = self.heads / self.kv_heads;
        let spread = |x: Tensor<4>| match group {
            1 => x,
            _ => {
                let x = x.unsqueeze_dim::<5>(2).expand([rows, self.kv_heads, group, length, size]);
                x.reshape([rows, self.heads, length, size])
            }
        };
        let query = turn(heads(self.q_proj.forward(x.clone()), self.heads));
        let key = spread(turn(heads(self.k_proj.forward(x.clone()), self.kv_heads)));
        let value = spread(heads(self.v_proj.forward(x), self.kv_heads));
        let later = Tensor::<2, Bool>::tril_mask([length, length], 0, &query.device()).unsqueeze::<4>();
        let scores = query.matmul(key.transpose()) / (size as f64).sqrt();
        let seen = softmax(scores.mask_fill(later, -1e9), 3).matmul(value);
        self.o_proj.forward(seen.swap_dims(1, 2).reshape([rows, length, width]))
    }
}

impl CausalLm {
    pub fn loss(&self, tokens: Tensor<2, Int>) -> Tensor<1> {
        let [rows, length] = tokens.dims();
        let mut x = self.model.embed_tokens.forward(tokens.clone().narrow(1, 0, length - 1));
        for layer in &self.model.layers {
            x = x.clone() + layer.self_attn.forward(layer.input_layernorm.forward(x));
            let h = layer.post_attention_layernorm.forward(x.clone());
            let Mlp { gate_proj, up_proj, down_proj } = &layer.mlp;
            x = x + down_proj.forward(silu(gate_proj.forward(h.clone())) * up_proj.forward(h));
        }
        let x = self.model.norm.forward(x);
        let logits = match &self.lm_head {
            Some(head) => head.forward(x),
            None => x.matmul(self.model.embed_tokens.weight.val().transpose().unsqueeze()),
        };
        let targets = tokens.narrow(1, 1, length - 1).reshape([rows * (length - 1), 1]);
        log_softmax(logits.flatten::<2>(0, 1), 1).gather(1, targets).mean().neg()
    }
}
