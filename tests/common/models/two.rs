//! Two layers.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation;

use super::device;
use crate::common::reference::filled;

#[derive(Module, Debug)]
pub struct Two {
    pub first: Linear,
    pub second: Linear,
}

/// From six features to three.
pub fn two() -> Two {
    let linear = |takes, gives| LinearConfig::new(takes, gives).init(&device());
    filled(Two { first: linear(6, 8), second: linear(8, 3) })
}

impl Two {
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.second.forward(activation::tanh(self.first.forward(x)))
    }
}
