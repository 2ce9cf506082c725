//! Linear layers with GELU between them, and dropout behind the first.

use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation::gelu;

use super::{cross_entropy, seeded};

#[derive(Module, Debug)]
pub struct Mlp {
    pub first: Linear,
    pub dropout: Dropout,
    /// Between the first and the second, in models of more layers than these.
    pub between: Vec<Linear>,
    pub second: Linear,
}

impl Mlp {
    /// Two layers, from 6 features to 4 classes.
    pub fn new(dropout: f64, device: &Device) -> Self {
        let model = Self::of(&[6, 16, 4], device);
        seeded(Self { dropout: DropoutConfig::new(dropout).init(), ..model })
    }

    /// Layers of these widths, of which the first takes the features and the last gives the output.
    pub fn of(widths: &[usize], device: &Device) -> Self {
        let layer = |pair: &[usize]| LinearConfig::new(pair[0], pair[1]).init(device);
        let mut layers: Vec<Linear> = widths.windows(2).map(layer).collect();
        let second = layers.pop().expect("two layers at least");
        let first = layers.remove(0);
        Self { first, dropout: DropoutConfig::new(0.0).init(), between: layers, second }
    }

    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = self.dropout.forward(gelu(self.first.forward(x)));
        self.second.forward(self.between.iter().fold(x, |x, layer| gelu(layer.forward(x))))
    }

    pub fn loss(&self, x: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
        cross_entropy(self.forward(x), targets)
    }
}
