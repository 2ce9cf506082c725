//! Ordinary burn models, a file for each kind, and eager steps to compare with.
#![allow(unused_imports, reason = "each test binary uses the part that it needs")]

mod cnn;
mod lm;
mod mlp;
mod rnn;
mod tied;
mod two;

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::GradientsParams;
use burn::prelude::*;

pub use self::cnn::{Cnn, Residual, images};
pub use self::lm::{Lm, token_rows};
pub use self::mlp::Mlp;
pub use self::rnn::Rnn;
pub use self::tied::Tied;
pub use self::two::{Two, two};
pub use super::fill::{Numbers, seeded};

/// Tokens, and what follows them.
pub type Tokens = (Tensor<2, Int>, Tensor<2, Int>);

pub fn device() -> Device {
    Device::flex().autodiff()
}

pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    CrossEntropyLossConfig::new().init(&logits.device()).forward(logits, targets)
}

/// [`cross_entropy`] of every token of every row.
fn token_cross_entropy(logits: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
    let [rows, length, vocabulary] = logits.dims();
    cross_entropy(logits.reshape([rows * length, vocabulary]), targets.reshape([rows * length]))
}

pub fn scalar(loss: Tensor<1>) -> f32 {
    loss.inner().into_scalar::<f32>()
}

pub fn eager<M: Module>(model: &M, loss: impl FnOnce(&M) -> Tensor<1>) -> (f32, GradientsParams) {
    let loss = loss(model);
    let gradients = loss.backward();
    (scalar(loss), GradientsParams::from_grads(gradients, model))
}
