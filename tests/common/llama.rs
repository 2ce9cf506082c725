//! The model of `examples/finetune`, in sizes for tests.

use burn::prelude::*;

pub use super::finetune::model::{Autocast, Batch, Llama, LlamaConfig, Rope, Scaling};

pub const LLAMA: LlamaConfig = LlamaConfig {
    vocab: 1200,
    width: 192,
    inner: 528,
    layers: 2,
    heads: 12,
    kv_heads: 12,
    head_size: 16,
    epsilon: 1e-5,
    tied: false,
    qkv_bias: false,
    output_bias: false,
    mlp_bias: false,
    qk_norm: false,
    rope: Rope { theta: 10_000.0, scaling: Scaling::None },
    positions: 128,
    autocast: Autocast(None),
};
pub const QWEN2: LlamaConfig = LlamaConfig { kv_heads: 6, qkv_bias: true, tied: true, ..LLAMA };

/// Small enough to be trained in a test.
pub fn small(config: LlamaConfig) -> LlamaConfig {
    LlamaConfig { vocab: 36, width: 48, inner: 60, head_size: 4, ..config }
}

/// The mean loss of every token of the rows but the first.
pub fn loss(model: &Llama, tokens: Tensor<2, Int>) -> Tensor<1> {
    model.losses(Batch::of_documents(tokens)).mean()
}
