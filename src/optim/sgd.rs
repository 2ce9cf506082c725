//! SGD with momentum and weight decay.

use burn::optim::{LearningRate, Optimizer, RecordState, SgdConfig, StateSink, StateSource};
use burn::tensor::{Device, Tensor};
use serde::Deserialize;

use super::number::Number;
use super::numbers_of;
use super::recorded::{of_record, on_device, to_record};
use super::update::{UpdateRule, is_here, update};

/// burn's [`Sgd`](burn::optim::Sgd) in one pass: see the [module page](super).
#[derive(Debug, Clone)]
pub struct FusedSgd {
    numbers: Numbers,
}

/// What [`FusedSgd`] keeps of a parameter. Its record is that of burn's [`SgdState`](burn::optim::SgdState), whose
/// velocity burn does not give away; it is loaded in the dtype that it has there.
#[derive(Debug, Clone)]
pub struct FusedSgdState<const D: usize> {
    /// What momentum has gathered, of the dims of the parameter.
    pub velocity: Option<Tensor<D>>,
}

/// Those of a configuration, with burn's names and types.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Numbers {
    weight_decay: Option<WeightDecay>,
    momentum: Option<Momentum>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct WeightDecay {
    pub(super) penalty: f32,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Momentum {
    momentum: f64,
    dampening: f64,
    nesterov: bool,
}

impl Momentum {
    /// burn keeps it in `f32`.
    fn factor(&self) -> f64 {
        f64::from(self.momentum as f32)
    }
}

impl FusedSgd {
    pub(super) fn new(config: &SgdConfig) -> Self {
        Self { numbers: numbers_of(config) }
    }
}

#[derive(Clone, Copy)]
struct Plain {
    lr: f64,
    weight_decay: Option<WeightDecay>,
}

impl Plain {
    #[inline(always)]
    fn decayed<T: Number>(&self, value: T, gradient: T) -> T {
        match self.weight_decay {
            Some(decay) => value.mul(T::of(decay.penalty.into())).add(gradient),
            None => gradient,
        }
    }
}

impl UpdateRule<0> for Plain {
    #[inline(always)]
    fn update<T: Number>(&self, value: T, gradient: T, _: &mut [T; 0]) -> T {
        value.sub(self.decayed(value, gradient).mul(T::of(self.lr)))
    }
}

#[derive(Clone, Copy)]
struct WithMomentum {
    plain: Plain,
    momentum: Momentum,
    is_first: bool,
}

impl UpdateRule<1> for WithMomentum {
    #[inline(always)]
    fn update<T: Number>(&self, value: T, gradient: T, [velocity]: &mut [T; 1]) -> T {
        let factor = T::of(self.momentum.factor());
        let gradient = self.plain.decayed(value, gradient);
        let damped = || gradient.mul(T::of(1.0 - self.momentum.dampening));
        *velocity = if self.is_first { gradient } else { damped().add(velocity.mul(factor)) };
        let step = if self.momentum.nesterov { velocity.mul(factor).add(gradient) } else { *velocity };
        value.sub(step.mul(T::of(self.plain.lr)))
    }
}

impl Optimizer for FusedSgd {
    type State<const D: usize> = FusedSgdState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<FusedSgdState<D>>,
    ) -> (Tensor<D>, Option<FusedSgdState<D>>) {
        let velocity = state.and_then(|state| state.velocity);
        let Numbers { weight_decay, momentum } = self.numbers;
        let here = is_here(&tensor, &grad, [velocity.as_ref()]);
        let plain = Plain { lr, weight_decay };
        let (tensor, velocity) = match momentum {
            Some(momentum) if here => {
                let rule = WithMomentum { plain, momentum, is_first: velocity.is_none() };
                let (tensor, [velocity]) = update(tensor, grad, [velocity], rule);
                (tensor, Some(velocity))
            }
            None if here => (update(tensor, grad, [], plain).0, velocity),
            _ => self.elsewhere(lr, tensor, grad, velocity),
        };
        (tensor, Some(FusedSgdState { velocity }))
    }

    fn to_device<const D: usize>(state: FusedSgdState<D>, device: &Device) -> FusedSgdState<D> {
        FusedSgdState { velocity: state.velocity.map(|velocity| on_device(velocity, device)) }
    }
}

impl FusedSgd {
    /// burn's operations.
    fn elsewhere<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        mut grad: Tensor<D>,
        velocity: Option<Tensor<D>>,
    ) -> (Tensor<D>, Option<Tensor<D>>) {
        if let Some(decay) = self.numbers.weight_decay {
            grad = tensor.clone().mul_scalar(decay.penalty).add(grad);
        }
        let Some(momentum) = self.numbers.momentum else { return (tensor - grad.mul_scalar(lr), velocity) };
        let velocity = match velocity {
            Some(velocity) => {
                // burn's operations demand one dtype.
                let velocity = if velocity.dtype() == grad.dtype() { velocity } else { velocity.cast(grad.dtype()) };
                grad.clone().mul_scalar(1.0 - momentum.dampening).add(velocity.mul_scalar(momentum.factor()))
            }
            None => grad.clone(),
        };
        let step = match momentum.nesterov {
            true => velocity.clone().mul_scalar(momentum.factor()).add(grad),
            false => velocity.clone(),
        };
        (tensor - step.mul_scalar(lr), Some(velocity))
    }
}

/// Where burn's state has its velocity.
const MOMENTUM: &str = "momentum";
const VELOCITY: &str = "velocity";

impl<const D: usize> RecordState for FusedSgdState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        if let Some(velocity) = &self.velocity {
            out.push_tensor(&burn::optim::join_path(prefix, MOMENTUM), VELOCITY, to_record(velocity));
        }
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, _: &Device) -> Option<Self> {
        let velocity = src.take_tensor(&burn::optim::join_path(prefix, MOMENTUM), VELOCITY);
        Some(Self { velocity: velocity.map(of_record) })
    }
}
