//! Causal self-attention of grouped queries with rotary positions.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, RmsNorm};
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Device, Int, Tensor};

use super::{Autocast, LlamaConfig};

/// `kv_heads` divides `heads`: so many neighbouring query heads share a key and a value.
#[derive(Module, Debug)]
pub struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    heads: usize,
    kv_heads: usize,
    head_size: usize,
    #[module(skip)]
    autocast: Autocast,
}

/// Where tokens are, for all layers alike.
#[derive(Clone)]
pub struct Places {
    /// `[rows, 1, length, head_size]`
    cos: Tensor<4>,
    sin: Tensor<4>,
    /// `[rows, 1, length, length]`: which tokens (last) a token does not see.
    hidden: Tensor<4, Bool>,
}

impl Places {
    /// # Shapes
    ///
    /// - positions, documents: `[rows, length]`
    pub fn new(
        positions: Tensor<2, Int>,
        documents: Tensor<2, Int>,
        frequencies: &[f32],
        attention_factor: f64,
    ) -> Self {
        let device = positions.device();
        let [_, length] = positions.dims();
        let frequencies = Tensor::<1>::from_floats(frequencies, &device).unsqueeze::<3>();
        let angles = positions.float().unsqueeze_dim::<3>(2) * frequencies;
        let angles = Tensor::cat(vec![angles.clone(), angles], 2).unsqueeze_dim::<4>(1);
        let (mut cos, mut sin) = (angles.clone().cos(), angles.sin());
        if attention_factor != 1.0 {
            (cos, sin) = (cos * attention_factor, sin * attention_factor);
        }
        let of_others = documents.clone().unsqueeze_dim::<3>(2).not_equal(documents.unsqueeze_dim::<3>(1));
        let later = Tensor::<2, Bool>::tril_mask([length, length], 0, &device).unsqueeze::<3>();
        Self { cos, sin, hidden: of_others.bool_or(later).unsqueeze_dim(1) }
    }

    /// Turns the pairs of the first and the second half of the last dim.
    fn turn(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let (first, second) = (x.clone().narrow(3, 0, half), x.clone().narrow(3, half, half));
        let (cos, sin) = (self.cos.clone().cast(x.dtype()), self.sin.clone().cast(x.dtype()));
        x * cos + Tensor::cat(vec![second.neg(), first], 3) * sin
    }
}

impl Attention {
    /// Fresh weights.
    pub fn new(config: &LlamaConfig, device: &Device) -> Self {
        let LlamaConfig { width, heads, kv_heads, head_size, .. } = *config;
        let linear = |takes, gives, bias| config.linear(LinearConfig::new(takes, gives).with_bias(bias)).init(device);
        let norm = || config.qk_norm.then(|| config.norm(head_size).init(device));
        Self {
            q_proj: linear(width, heads * head_size, config.qkv_bias),
            k_proj: linear(width, kv_heads * head_size, config.qkv_bias),
            v_proj: linear(width, kv_heads * head_size, config.qkv_bias),
            o_proj: linear(heads * head_size, width, config.output_bias),
            q_norm: norm(),
            k_norm: norm(),
            heads,
            kv_heads,
            head_size,
            autocast: config.autocast,
        }
    }

    /// # Shapes
    ///
    /// - x, output: `[rows, length, width]`
    pub fn forward(&self, x: Tensor<3>, places: &Places) -> Tensor<3> {
        let Self { heads, kv_heads, head_size, autocast, .. } = *self;
        let [rows, length, _] = x.dims();
        let by_head = |x: Tensor<3>, heads: usize| x.reshape([rows, length, heads, head_size]).swap_dims(1, 2);
        let norm = |x: Tensor<4>, norm: &Option<RmsNorm>| match norm {
            Some(norm) => autocast.narrow(norm.forward(autocast.wide(x))),
            None => x,
        };
        let group = heads / kv_heads;
        let spread = |x: Tensor<4>| match group {
            1 => x,
            _ => {
                let x = x.unsqueeze_dim::<5>(2).expand([rows, kv_heads, group, length, head_size]);
                x.reshape([rows, heads, length, head_size])
            }
        };
        let query = norm(by_head(autocast.linear(&self.q_proj, x.clone()), heads), &self.q_norm);
        let key = norm(by_head(autocast.linear(&self.k_proj, x.clone()), kv_heads), &self.k_norm);
        let value = spread(by_head(autocast.linear(&self.v_proj, x), kv_heads));
        let (query, key) = (places.turn(query), spread(places.turn(key)));

        let scores = autocast.wide(query.matmul(key.transpose())) / (head_size as f64).sqrt();
        // Each token sees itself at least.
        let shares = softmax(scores.mask_fill(places.hidden.clone(), f32::NEG_INFINITY), 3);
        let seen = autocast.narrow(shares).matmul(value);
        let seen = seen.swap_dims(1, 2).reshape([rows, length, heads * head_size]);
        autocast.wide(autocast.linear(&self.o_proj, seen))
    }
}
