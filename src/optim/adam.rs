//! Adam and AdamW.

use burn::optim::{
    Adam, AdamConfig, AdamState, AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, LearningRate, Optimizer,
    RecordState, StateSink, StateSource, join_path,
};
use burn::tensor::{DType, Device, Tensor};
use burn_pack::Scalar;
use serde::Deserialize;

use super::number::Number;
use super::numbers_of;
use super::recorded::{of_record, on_device, to_record};
use super::sgd::WeightDecay;
use super::update::{UpdateRule, is_here, update};

/// burn's [`Adam`] in one pass: see the [module page](super).
#[derive(Clone)]
pub struct FusedAdam {
    burn: Adam,
    betas: Betas,
    weight_decay: Option<WeightDecay>,
}

/// burn's [`AdamW`] in one pass: see the [module page](super).
#[derive(Clone)]
pub struct FusedAdamW {
    burn: AdamW,
    betas: Betas,
    decay: Decoupled,
}

/// What [`FusedAdam`] and [`FusedAdamW`] keep of a parameter. Its record is that of burn's [`AdamState`] and
/// [`AdamWState`], of which moments are loaded in the dtype that they have there.
#[derive(Clone)]
pub struct FusedAdamState<const D: usize> {
    /// The moments, of the dims of the parameter.
    pub momentum: AdaptiveMomentumState<D>,
}

/// What both have in common, with burn's names and types.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Betas {
    beta_1: f32,
    beta_2: f32,
    epsilon: f32,
    amsgrad: bool,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Coupled {
    weight_decay: Option<WeightDecay>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Decoupled {
    weight_decay: f32,
    cautious_weight_decay: bool,
}

impl FusedAdam {
    pub(super) fn new(config: &AdamConfig) -> Self {
        let Coupled { weight_decay } = numbers_of(config);
        Self { burn: config.build(), betas: numbers_of(config), weight_decay }
    }
}

impl FusedAdamW {
    pub(super) fn new(config: &AdamWConfig) -> Self {
        Self { burn: config.build(), betas: numbers_of(config), decay: numbers_of(config) }
    }
}

/// The moments of an update.
#[derive(Clone, Copy)]
struct MomentUpdate {
    betas: Betas,
    is_first: bool,
    /// Whether there is no maximum of the second moment yet.
    is_first_max: bool,
}

impl MomentUpdate {
    /// Changes the moments by a gradient; the first and the second, or its maximum, by which to update.
    #[inline(always)]
    fn follow<T: Number, const N: usize>(&self, gradient: T, moments: &mut [T; N]) -> (T, T) {
        let Betas { beta_1, beta_2, .. } = self.betas;
        let kept = |moment: T, beta: f32, new: T| {
            let new = new.mul(T::of((1.0 - beta).into()));
            if self.is_first { new } else { moment.mul(T::of(beta.into())).add(new) }
        };
        moments[0] = kept(moments[0], beta_1, gradient);
        moments[1] = kept(moments[1], beta_2, gradient.mul(gradient));
        if N > 2 {
            let larger = self.is_first_max || moments[2] < moments[1];
            moments[2] = if larger { moments[1] } else { moments[2] };
        }
        (moments[0], moments[N - 1])
    }
}

#[derive(Clone, Copy)]
struct AdamRule {
    moments: MomentUpdate,
    lr: f64,
    weight_decay: Option<WeightDecay>,
    /// By what the first moment is multiplied for its bias and that of the second.
    factor: f32,
    epsilon: f32,
}

impl AdamRule {
    fn new(moments: MomentUpdate, time: i32, lr: f64, adam: &FusedAdam) -> Self {
        let Betas { beta_1, beta_2, epsilon, .. } = moments.betas;
        let second = (1.0 - beta_2.powi(time)).sqrt();
        let factor = second / (1.0 - beta_1.powi(time));
        Self { moments, lr, weight_decay: adam.weight_decay, factor, epsilon: epsilon * second }
    }
}

impl<const N: usize> UpdateRule<N> for AdamRule {
    #[inline(always)]
    fn update<T: Number>(&self, value: T, gradient: T, moments: &mut [T; N]) -> T {
        let gradient = match self.weight_decay {
            Some(decay) => value.mul(T::of(decay.penalty.into())).add(gradient),
            None => gradient,
        };
        let (first, second) = self.moments.follow(gradient, moments);
        let step = first.mul(T::of(self.factor.into())).div(second.sqrt().add(T::of(self.epsilon.into())));
        value.sub(step.mul(T::of(self.lr)))
    }
}

#[derive(Clone, Copy)]
struct AdamWRule {
    moments: MomentUpdate,
    lr: f64,
    /// By what moments are divided for their bias.
    biases: [f32; 2],
    decay: f64,
    is_cautious: bool,
}

impl AdamWRule {
    fn new(moments: MomentUpdate, time: i32, lr: f64, adam: &FusedAdamW) -> Self {
        let Betas { beta_1, beta_2, .. } = moments.betas;
        let biases = [beta_1, beta_2].map(|beta| 1.0 - beta.powi(time));
        let Decoupled { weight_decay, cautious_weight_decay: is_cautious } = adam.decay;
        Self { moments, lr, biases, decay: lr * f64::from(weight_decay), is_cautious }
    }

    #[inline(always)]
    fn decayed<T: Number>(&self, value: T, moment: T) -> T {
        if self.decay == 0.0 {
            return value;
        }
        if !self.is_cautious {
            return value.mul(T::of(1.0 - self.decay));
        }
        let zero = T::default();
        let differ = (value >= zero) != (moment >= zero);
        value.sub(if differ { zero } else { value.mul(T::of(self.decay)) })
    }
}

impl<const N: usize> UpdateRule<N> for AdamWRule {
    #[inline(always)]
    fn update<T: Number>(&self, value: T, gradient: T, moments: &mut [T; N]) -> T {
        let (first, second) = self.moments.follow(gradient, moments);
        let [of_first, of_second] = self.biases.map(|bias| T::of(bias.into()));
        let epsilon = T::of(self.moments.betas.epsilon.into());
        let step = first.div(of_first).div(second.div(of_second).sqrt().add(epsilon));
        self.decayed(value, moments[0]).sub(step.mul(T::of(self.lr)))
    }
}

/// Whether everything of an update is on the host.
fn all_here<const D: usize>(
    value: &Tensor<D>,
    gradient: &Tensor<D>,
    state: Option<&AdaptiveMomentumState<D>>,
    amsgrad: bool,
) -> bool {
    let max = state.filter(|_| amsgrad).and_then(|state| state.max_moment_2.as_ref());
    is_here(value, gradient, [state.map(|state| &state.moment_1), state.map(|state| &state.moment_2), max])
}

/// Updates by the rule that `make` makes of moments and the number of the step.
fn step<const D: usize, R: UpdateRule<2> + UpdateRule<3>>(
    value: Tensor<D>,
    gradient: Tensor<D>,
    state: Option<AdaptiveMomentumState<D>>,
    betas: Betas,
    make: impl Fn(MomentUpdate, i32) -> R,
) -> (Tensor<D>, AdaptiveMomentumState<D>) {
    let is_first = state.is_none();
    let (before, first, second, max) = match state {
        Some(state) => (state.time, Some(state.moment_1), Some(state.moment_2), state.max_moment_2),
        None => (0, None, None, None),
    };
    let time = before + 1;
    let moments = MomentUpdate { betas, is_first, is_first_max: max.is_none() };
    let rule = make(moments, time as i32);
    let (value, moment_1, moment_2, max_moment_2) = if betas.amsgrad {
        let (value, [first, second, max]) = update(value, gradient, [first, second, max], rule);
        (value, first, second, Some(max))
    } else {
        let (value, [first, second]) = update(value, gradient, [first, second], rule);
        (value, first, second, max)
    };
    (value, AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2 })
}

/// Implements burn's `Optimizer` by a rule, and by burn's own where not everything is on the host.
macro_rules! fused {
    ($fused:ident, $burns_state:ident, $rule:ident) => {
        impl Optimizer for $fused {
            type State<const D: usize> = FusedAdamState<D>;

            fn step<const D: usize>(
                &self,
                lr: LearningRate,
                tensor: Tensor<D>,
                grad: Tensor<D>,
                state: Option<FusedAdamState<D>>,
            ) -> (Tensor<D>, Option<FusedAdamState<D>>) {
                if !all_here(&tensor, &grad, state.as_ref().map(|state| &state.momentum), self.betas.amsgrad) {
                    let state = state.map(|state| $burns_state::new(of_dtype(state.momentum, grad.dtype())));
                    let (tensor, state) = self.burn.step(lr, tensor, grad, state);
                    return (tensor, state.map(|state| FusedAdamState { momentum: state.momentum }));
                }
                let rule = |moments, time| $rule::new(moments, time, lr, self);
                let (tensor, momentum) = step(tensor, grad, state.map(|state| state.momentum), self.betas, rule);
                (tensor, Some(FusedAdamState { momentum }))
            }

            fn to_device<const D: usize>(state: FusedAdamState<D>, device: &Device) -> FusedAdamState<D> {
                let AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2 } = state.momentum;
                let (moment_1, moment_2) = (on_device(moment_1, device), on_device(moment_2, device));
                let max_moment_2 = max_moment_2.map(|moment| on_device(moment, device));
                FusedAdamState { momentum: AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2 } }
            }
        }
    };
}
fused!(FusedAdam, AdamState, AdamRule);
fused!(FusedAdamW, AdamWState, AdamWRule);

/// Moments of the dtype of a gradient, which burn's operations demand.
fn of_dtype<const D: usize>(mut state: AdaptiveMomentumState<D>, dtype: DType) -> AdaptiveMomentumState<D> {
    let moments = [&mut state.moment_1, &mut state.moment_2].into_iter().chain(&mut state.max_moment_2);
    for moment in moments.filter(|moment| moment.dtype() != dtype) {
        *moment = moment.clone().cast(dtype);
    }
    state
}

impl<const D: usize> RecordState for FusedAdamState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        let prefix = join_path(prefix, "momentum");
        let AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2 } = &self.momentum;
        out.push_scalar(&prefix, "time", Scalar::from(*time));
        let max = max_moment_2.as_ref().map(|moment| ("max_moment_2", moment));
        for (name, moment) in [("moment_1", moment_1), ("moment_2", moment_2)].into_iter().chain(max) {
            out.push_tensor(&prefix, name, to_record(moment));
        }
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, _: &Device) -> Option<Self> {
        let prefix = join_path(prefix, "momentum");
        let time = src.take_scalar(&prefix, "time")?.try_into().ok()?;
        let mut moment = |name| Some(of_record(src.take_tensor(&prefix, name)?));
        let (moment_1, moment_2, max_moment_2) = (moment("moment_1")?, moment("moment_2")?, moment("max_moment_2"));
        Some(Self { momentum: AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2 } })
    }
}
