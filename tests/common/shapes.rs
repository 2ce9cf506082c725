//! A small model that is trained on batches of many shapes, for tests of how many captured graphs are kept.

use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;

pub fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

pub type Model = (Linear, Linear);

pub fn model() -> Model {
    let device = Device::flex().autodiff();
    let layer = |inputs, outputs| {
        let layer: Linear = LinearConfig::new(inputs, outputs).init(&device);
        layer
    };
    (layer(4, 6), layer(6, 2))
}

pub fn loss(model: &Model, rows: Tensor<2>) -> Tensor<1> {
    model.1.forward(model.0.forward(rows).tanh()).powf_scalar(2.0).mean()
}

pub fn forward(model: &Model, rows: Tensor<2>) -> Tensor<2> {
    model.1.forward(model.0.forward(rows).tanh())
}

pub fn rows(count: usize) -> Tensor<2> {
    let numbers = Tensor::<1, Int>::arange(0..4 * count as i64, &Device::flex().autodiff());
    numbers.float().mul_scalar(0.01).sin().reshape([count, 4])
}

/// Shapes that come and go: more than are kept, some of them again.
pub const SHAPES: [usize; 14] = [4, 5, 6, 7, 8, 4, 9, 5, 10, 11, 4, 4, 12, 6];
