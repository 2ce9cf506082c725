//! Convolutional and recurrent models under plans.

use burn::module::Module;
use burn::nn::conv::*;
use burn::nn::pool::*;
use burn::nn::*;
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::prelude::*;

use super::harness::{Axis, Case};
use crate::common::models::{Cnn, Numbers, Rnn, cross_entropy, device, images};

type Images = (Tensor<4>, Tensor<1, Int>);

const CNN: Case<Cnn, Images> =
    Case { make: Cnn::new, batch: |seed| images(4, seed, &device()), loss: |m, (x, t)| m.loss(x, t) };

/// Convolutions of one, two and three dims and their transposes, with biases, groups and pools between them.
#[derive(Module, Debug)]
struct Convolutions {
    one: Conv1d,
    one_back: ConvTranspose1d,
    two: Conv2d,
    grouped: Conv2d,
    two_back: ConvTranspose2d,
    three: Conv3d,
    three_back: ConvTranspose3d,
    head: Linear,
}

impl Convolutions {
    fn new(device: &Device) -> Self {
        Self {
            one: Conv1dConfig::new(4, 8, 3).init(device),
            one_back: ConvTranspose1dConfig::new([8, 4], 3).init(device),
            two: Conv2dConfig::new([4, 8], [2, 2]).init(device),
            grouped: Conv2dConfig::new([8, 8], [1, 1]).with_groups(4).init(device),
            two_back: ConvTranspose2dConfig::new([8, 4], [2, 2]).init(device),
            three: Conv3dConfig::new([4, 8], [1, 2, 2]).init(device),
            three_back: ConvTranspose3dConfig::new([8, 4], [1, 2, 2]).init(device),
            head: LinearConfig::new(4 * 2 * 2, 4).init(device),
        }
    }

    /// From `[4, 4, 64]`.
    fn loss(&self, (x, targets): (Tensor<3>, Tensor<1, Int>)) -> Tensor<1> {
        let x = self.one_back.forward(activation::tanh(self.one.forward(x)));
        let x = MaxPool1dConfig::new(2).with_stride(2).init().forward(x)
            + AvgPool1dConfig::new(2).with_stride(2).init().forward(x_of(&self.one, &self.one_back));
        let x = x.reshape([4, 4, 4, 8]);
        let x = self.grouped.forward(activation::tanh(self.two.forward(x)));
        let x = self.two_back.forward(activation::tanh(x));
        let x = AvgPool2dConfig::new([2, 2]).with_strides([1, 1]).init().forward(x);
        let [b, c, h, w] = x.dims();
        let x = x.reshape([b, c, 1, h, w]);
        let x = self.three_back.forward(activation::tanh(self.three.forward(x))).reshape([b, c, h, w]);
        let x = interpolate::Interpolate2dConfig::new()
            .with_output_size(Some([6, 6]))
            .with_mode(interpolate::InterpolateMode::Linear)
            .init()
            .forward(x);
        let x = AdaptiveAvgPool2dConfig::new([2, 2]).init().forward(x);
        cross_entropy(self.head.forward(x.reshape([4, 16])), targets)
    }
}

fn x_of(_: &Conv1d, back: &ConvTranspose1d) -> Tensor<3> {
    back.weight.val().sum().reshape([1, 1, 1]).expand([4, 4, 64])
}

const CONVOLUTIONS: Case<Convolutions, (Tensor<3>, Tensor<1, Int>)> = Case {
    make: Convolutions::new,
    batch: |seed| {
        let mut numbers = Numbers(seed + 9);
        (numbers.tensor([4, 4, 64], &device()), numbers.classes([4], 4, &device()))
    },
    loss: Convolutions::loss,
};

#[test]
fn batch_norm_over_a_split_batch_and_split_channels() {
    let references = CNN.alone(3);
    for degree in [2, 4] {
        let reports = CNN.compare(&[Axis::batch(degree)], &references).unwrap();
        assert!(reports[0].fallbacks.is_empty(), "{}", reports[0]);
    }
    let channels = Plan::new().shard("first.weight", 0).shard("norm.*", 0).shard("second.weight", 1);
    for degree in [2, 4] {
        let reports = CNN.compare(&[Axis::new("tp", degree, channels.clone())], &references).unwrap();
        assert!(reports[0].fallbacks.is_empty(), "{}", reports[0]);
        // One product forward; the gradients of what is whole on both sides backward.
        assert_eq!(reports[0].collectives.len(), 2, "{}", reports[0]);
    }
    CNN.compare(&[Axis::new("tp", 2, channels), Axis::batch(2)], &references).unwrap();
}

#[test]
fn convolutions_of_all_kinds() {
    let references = CONVOLUTIONS.alone(2);
    let batch = CONVOLUTIONS.compare(&[Axis::batch(2)], &references).unwrap();
    assert!(batch[0].fallbacks.is_empty(), "{}", batch[0]);
    let outputs = Plan::new()
        .shard("one.*", 0)
        .shard("two.*", 0)
        .shard("three.*", 0)
        .shard("*_back.weight", 1)
        .shard("*_back.bias", 0);
    let inputs =
        Plan::new().shard("one.weight", 1).shard("two.weight", 1).shard("three.weight", 1).shard("*_back.weight", 0);
    let pairs = Plan::new().shard("one.*", 0).shard("two.*", 0).shard("three.*", 0).shard("*_back.weight", 0);
    for plan in [outputs, inputs, pairs] {
        for degree in [2, 4] {
            CONVOLUTIONS.compare(&[Axis::new("tp", degree, plan.clone())], &references).unwrap();
        }
        CONVOLUTIONS.compare(&[Axis::new("tp", 2, plan), Axis::batch(2)], &references).unwrap();
    }
}

#[test]
fn recurrence() {
    const RNN: Case<Rnn, (Tensor<2, Int>, Tensor<2, Int>)> = Case {
        make: Rnn::new,
        batch: |seed| {
            let mut numbers = Numbers(seed + 50);
            (numbers.classes([4, 5], 11, &device()), numbers.classes([4, 5], 11, &device()))
        },
        loss: |m, (x, t)| m.loss(x, t),
    };
    let references = RNN.alone(2);
    RNN.compare(&[Axis::batch(2)], &references).unwrap();
    let plan = Plan::new().shard("embedding.weight", 1).shard("*input_transform.weight", 0);
    RNN.compare(&[Axis::new("tp", 2, plan.clone())], &references).unwrap();
    RNN.compare(&[Axis::new("tp", 2, plan), Axis::batch(2)], &references).unwrap();
}
