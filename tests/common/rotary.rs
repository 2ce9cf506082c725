//! A decoder with the names of Llama's whose positions are burn's `RotaryEncoding`: it turns neighbours, where
//! `transformers` turns the halves of a head.

use burn::module::Module;
use burn::nn::attention::generate_autoregressive_mask;
use burn::nn::{
    Embedding, EmbeddingConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig, RotaryEncoding, RotaryEncodingConfig,
};
use burn::prelude::*;
use burn::tensor::activation::{log_softmax, silu, softmax};

use super::llama::LlamaConfig;

#[derive(Module, Debug)]
pub struct Rotary {
    model: Decoder,
    lm_head: Option<Linear>,
}

#[derive(Module, Debug)]
struct Decoder {
    embed_tokens: Embedding,
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
    rotary: RotaryEncoding,
    heads: usize,
    kv_heads: usize,
}

#[derive(Module, Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Rotary {
    pub fn new(config: LlamaConfig, device: &Device) -> Self {
        let LlamaConfig { width, inner, heads, kv_heads, head_size, .. } = config;
        let linear = |takes, gives, bias| LinearConfig::new(takes, gives).with_bias(bias).init(device);
        let norm = || RmsNormConfig::new(width).init(device);
        let layer = |_| Layer {
            input_layernorm: norm(),
            self_attn: Attention {
                q_proj: linear(width, heads * head_size, config.qkv_bias),
                k_proj: linear(width, kv_heads * head_size, config.qkv_bias),
                v_proj: linear(width, kv_heads * head_size, config.qkv_bias),
                o_proj: linear(heads * head_size, width, false),
                rotary: RotaryEncodingConfig::new(config.positions, head_size).init(device),
                heads,
                kv_heads,
            },
            post_attention_layernorm: norm(),
            mlp: Mlp {
                gate_proj: linear(width, inner, false),
                up_proj: linear(width, inner, false),
                down_proj: linear(inner, width, false),
            },
        };
        Self {
            model: Decoder {
                embed_tokens: EmbeddingConfig::new(config.vocab, width).init(device),
                layers: (0..config.layers).map(layer).collect(),
                norm: norm(),
            },
            lm_head: (!config.tied).then(|| linear(width, config.vocab, false)),
        }
    }

    /// The mean loss of every token of the rows but the first.
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

impl Attention {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [rows, length, _] = x.dims();
        let by_head = |x: Tensor<3>, heads: usize| {
            let size = x.dims()[2] / heads;
            x.reshape([rows, length, heads, size]).swap_dims(1, 2)
        };
        let spread = |x: Tensor<4>| match self.heads / self.kv_heads {
            1 => x,
            group => {
                let size = x.dims()[3];
                let x = x.unsqueeze_dim::<5>(2).expand([rows, self.kv_heads, group, length, size]);
                x.reshape([rows, self.heads, length, size])
            }
        };
        let query = self.rotary.forward(by_head(self.q_proj.forward(x.clone()), self.heads));
        let key = spread(self.rotary.forward(by_head(self.k_proj.forward(x.clone()), self.kv_heads)));
        let value = spread(by_head(self.v_proj.forward(x), self.kv_heads));
        let size = query.dims()[3];
        let later = generate_autoregressive_mask(1, length, &query.device()).unsqueeze_dim::<4>(1);
        let scores = query.matmul(key.transpose()) / (size as f64).sqrt();
        let seen = softmax(scores.mask_fill(later, -1e9), 3).matmul(value);
        self.o_proj.forward(seen.swap_dims(1, 2).reshape([rows, length, self.heads * size]))
    }
}
