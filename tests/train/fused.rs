//! Fused optimizers have the bits of burn's own.

use burn::grad_clipping::GradientClippingConfig;
use burn::module::{Param, ParamId};
use burn::nn::Linear;
use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamConfig, AdamWConfig, GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::{DType, Tensor};
use burn_parallel::prelude::*;

use crate::common::models::{Numbers, device};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];
const RATE: f64 = 0.037;

/// Each by burn, and fused.
fn all() -> Vec<(&'static str, ModuleOptimizer, ModuleOptimizer)> {
    let momentum = |nesterov| Some(MomentumConfig { momentum: 0.9, dampening: 0.3, nesterov });
    let decay = || Some(WeightDecayConfig::new(0.013));
    let clipping = || Some(GradientClippingConfig::Value(0.3));
    macro_rules! pairs {
        ($($name:literal: $config:expr),* $(,)?) => { vec![$(($name, $config.init(), $config.init_fused())),*] };
    }
    pairs![
        "sgd": SgdConfig::new(),
        "sgd with decay": SgdConfig::new().with_weight_decay(decay()),
        "sgd with momentum": SgdConfig::new().with_momentum(momentum(false)),
        "sgd, nesterov": SgdConfig::new().with_momentum(momentum(true)).with_weight_decay(decay()),
        "sgd, clipped": SgdConfig::new().with_gradient_clipping(clipping()),
        "adam": AdamConfig::new(),
        "adam with decay": AdamConfig::new().with_weight_decay(decay()).with_beta_1(0.8).with_grad_clipping(clipping()),
        "amsgrad": AdamConfig::new().with_amsgrad(true).with_beta_2(0.9),
        "adamw": AdamWConfig::new().with_weight_decay(0.1).with_beta_2(0.95).with_grad_clipping(clipping()),
        "adamw without decay": AdamWConfig::new().with_weight_decay(0.0).with_epsilon(1e-3),
        "cautious adamw": AdamWConfig::new().with_weight_decay(0.1).with_cautious_weight_decay(true),
        "adamw, amsgrad": AdamWConfig::new().with_amsgrad(true).with_cautious_weight_decay(true).with_weight_decay(0.2),
    ]
}

/// A weight of some dims, and a bias of an odd number of elements.
fn model(dims: [usize; 2], dtype: DType) -> Linear {
    let mut numbers = Numbers(3);
    let param = |id: u64, tensor: Tensor<1>| Param::initialized(ParamId::from(id), tensor.cast(dtype).require_grad());
    let bias = param(2, numbers.tensor([dims[1] + 1], &device()));
    let weight = numbers.tensor(dims, &device()).cast(dtype).require_grad();
    Linear { weight: Param::initialized(ParamId::from(1), weight), bias: Some(bias) }
}

/// Gradients, in which every number of another kind occurs.
fn gradients(dims: [usize; 2], dtype: DType, seed: u64, odd: bool) -> GradientsParams {
    let flex = device().inner();
    let mut numbers = Numbers(seed);
    let mut values: Vec<f32> = (0..dims[0] * dims[1]).map(|_| numbers.next()).collect();
    let kinds = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-30, -1e-42, 3e38, 6e4];
    if odd {
        values.iter_mut().skip(5).step_by(7).zip(kinds).for_each(|(value, kind)| *value = kind);
    }
    let mut grads = GradientsParams::new();
    let weight = Tensor::<1>::from_data(values.as_slice(), &flex).reshape(dims).cast(dtype);
    grads.register(ParamId::from(1), weight);
    grads.register(ParamId::from(2), numbers.tensor([dims[1] + 1], &flex).cast(dtype));
    grads
}

/// The bits of all values; any NaN is one.
fn bits(model: &Linear) -> Vec<u64> {
    let weight = model.weight.val().inner().cast(DType::F64).into_data();
    let bias = model.bias.as_ref().unwrap().val().inner().cast(DType::F64).into_data();
    let bits = |value: f64| if value.is_nan() { u64::MAX } else { value.to_bits() };
    weight.iter::<f64>().chain(bias.iter::<f64>()).map(bits).collect()
}

fn compare(dims: [usize; 2], dtypes: &[DType], odd: bool) {
    for dtype in dtypes {
        for (name, mut burn, mut fused) in all() {
            let mut models = [model(dims, *dtype), model(dims, *dtype)];
            for number in 0..4 {
                // The record of the one goes on in the other; burn loads records in its default dtype.
                if number == 2 && *dtype == DType::F32 {
                    let records = [burn.to_record(), fused.to_record()];
                    assert_eq!(records[0].len(), records[1].len());
                    let [by_burn, by_fused] = records.map(|record| record.into_bytes().unwrap());
                    (burn, fused) = (burn.from_bytes(by_fused).unwrap(), fused.from_bytes(by_burn).unwrap());
                }
                let [one, other] = models;
                let grads = || gradients(dims, *dtype, number + 1, odd);
                models = [burn.step(RATE, one, grads()), fused.step(RATE, other, grads())];
                let [one, other] = models.each_ref().map(bits);
                let differ = one.iter().zip(&other).position(|(one, other)| one != other);
                assert_eq!(differ, None, "{name}, {dtype:?}, step {number}: element {differ:?} of {dims:?}");
            }
        }
    }
}

#[test]
fn odd_sizes_in_all_dtypes() {
    for dims in [[1, 1], [3, 7], [8, 16], [5, 129]] {
        compare(dims, &DTYPES, false);
    }
}

#[test]
fn numbers_that_are_none() {
    compare([9, 15], &DTYPES, true);
}

/// From where on threads share the work.
#[test]
fn large_parameters() {
    compare([513, 259], &[DType::F32], true);
}

/// Gradients and values that do not lie one element behind the other.
#[test]
fn views() {
    for (name, mut burn, mut fused) in all() {
        let view = |model: Linear| {
            let (id, weight) = (model.weight.id, model.weight.val().inner().swap_dims(0, 1));
            Linear { weight: Param::initialized(id, weight.autodiff().require_grad()), ..model }
        };
        let mut models = [view(model([6, 11], DType::F32)), view(model([6, 11], DType::F32))];
        for number in 0..3 {
            let grads = || {
                let mut grads = gradients([6, 11], DType::F32, number, false);
                let weight = grads.remove::<2>(ParamId::from(1)).unwrap();
                grads.register(ParamId::from(1), weight.swap_dims(0, 1));
                grads
            };
            let [one, other] = models;
            models = [burn.step(RATE, one, grads()), fused.step(RATE, other, grads())];
            assert_eq!(bits(&models[0]), bits(&models[1]), "{name}");
        }
    }
}

/// burn's own go on with moments in its default dtype, or panic.
#[test]
fn narrow_parameters_go_on_from_a_record() {
    for dtype in [DType::BF16, DType::F16] {
        for (name, _, mut fused) in all() {
            let mut model = model([5, 6], dtype);
            for number in 0..2 {
                model = fused.step(RATE, model, gradients([5, 6], dtype, number, false));
            }
            let mut loaded = fused.clone().from_bytes(fused.to_record().into_bytes().unwrap()).unwrap();
            let grads = || gradients([5, 6], dtype, 2, false);
            let found = bits(&loaded.step(RATE, model.clone(), grads()));
            assert_eq!(found, bits(&fused.step(RATE, model, grads())), "{name}, {dtype:?}");
        }
    }
}
