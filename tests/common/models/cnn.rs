//! Convolutional nets, and images for them.

use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::pool::{AdaptiveAvgPool2dConfig, MaxPool2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::prelude::*;
use burn::tensor::activation::{relu, tanh};

use super::{Numbers, cross_entropy, seeded};

/// Two convolutions, with a batch norm before the first and one behind each, or without some of these.
#[derive(Module, Debug)]
pub struct Cnn {
    pub input_norm: Option<BatchNorm>,
    pub first: Conv2d,
    pub norm: Option<BatchNorm>,
    pub second: Conv2d,
    pub second_norm: Option<BatchNorm>,
    pub head: Linear,
}

impl Cnn {
    /// With all batch norms, for [`images`].
    pub fn new(device: &Device) -> Self {
        let mut model = Self::of([2, 3], [true; 3], device);
        model.second_norm = Some(BatchNormConfig::new(5).with_momentum(0.3).init(device));
        seeded(model)
    }

    /// From so many channels to so many outputs, with the first batch norm, the second, the third.
    pub fn of([channels, outputs]: [usize; 2], norms: [bool; 3], device: &Device) -> Self {
        let norm = |place: usize, width| norms[place].then(|| BatchNormConfig::new(width).init(device));
        Self {
            input_norm: norm(0, channels),
            // A bias before a batch norm, or without padding a shift before it, has the gradient 0, of which every run
            // computes other digits, which Adam blows up to the size of the learning rate.
            first: Conv2dConfig::new([channels, 4], [3, 3])
                .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                .with_bias(!norms[1])
                .init(device),
            norm: norm(1, 4),
            second: Conv2dConfig::new([4, 5], [2, 2]).with_bias(!norms[2]).init(device),
            second_norm: norm(2, 5),
            head: LinearConfig::new(5 * 4, outputs).init(device),
        }
    }

    /// What the first convolution gives, normalised.
    pub fn first_layer(&self, images: Tensor<4>) -> Tensor<4> {
        normalised(&self.norm, self.first.forward(normalised(&self.input_norm, images)))
    }

    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = MaxPool2dConfig::new([2, 2]).init().forward(relu(self.first_layer(images)));
        let x = relu(normalised(&self.second_norm, self.second.forward(x)));
        let x = AdaptiveAvgPool2dConfig::new([2, 2]).init().forward(x);
        let batch = x.dims()[0];
        self.head.forward(x.reshape([batch, 20]))
    }

    pub fn loss(&self, images: Tensor<4>, targets: Tensor<1, Int>) -> Tensor<1> {
        cross_entropy(self.forward(images), targets)
    }
}

fn normalised(norm: &Option<BatchNorm>, x: Tensor<4>) -> Tensor<4> {
    match norm {
        Some(norm) => norm.forward(x),
        None => x,
    }
}

/// Two batch norms whose outputs are added, so that both get the same gradient.
#[derive(Module, Debug)]
pub struct Residual {
    pub main: BatchNorm,
    pub conv: Conv2d,
    pub shortcut: BatchNorm,
    pub head: Linear,
}

impl Residual {
    pub fn new(device: &Device) -> Self {
        seeded(Self {
            main: BatchNormConfig::new(2).init(device),
            conv: Conv2dConfig::new([2, 2], [1, 1]).with_bias(false).init(device),
            shortcut: BatchNormConfig::new(2).init(device),
            head: LinearConfig::new(128, 3).init(device),
        })
    }

    pub fn loss(&self, images: Tensor<4>, targets: Tensor<1, Int>) -> Tensor<1> {
        let batch = images.dims()[0];
        let main = self.main.forward(tanh(self.conv.forward(images.clone())));
        let x = relu(main + self.shortcut.forward(images));
        cross_entropy(self.head.forward(x.reshape([batch, 128])), targets)
    }
}

/// Images of two channels and 8 x 8 points, and their classes, out of 3.
pub fn images(batch: usize, seed: u64, device: &Device) -> (Tensor<4>, Tensor<1, Int>) {
    let mut numbers = Numbers(seed);
    (numbers.tensor([batch, 2, 8, 8], device) * 2.0 + 0.5, numbers.classes([batch], 3, device))
}
