//! Clipped steps on meshes against one device.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn::tensor::DType;
use burn_parallel::comm::part;
use burn_parallel::prelude::*;
use burn_parallel::train::{Clip, Norm};

use super::close;
use super::lm::{Kind, Lm, ROWS, batch, cut, loss};
use super::meshes::{Meshed, on_mesh};
use crate::common::reference::{Wholes, all_same, own, values};

const STEPS: usize = 4;
const RATE: f64 = 0.5;

/// Sums up and scales the gradients of one device, element by element in `f64`: written for this test alone.
struct ByHand<'a> {
    grads: &'a mut GradientsParams,
    squares: f64,
    largest: f64,
    factor: Option<f64>,
}

impl ModuleVisitor for ByHand<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(gradient) = self.grads.get::<D>(param.id) else { return };
        if let Some(factor) = self.factor {
            let scaled = self.grads.remove::<D>(param.id).unwrap() * factor;
            self.grads.register(param.id, scaled);
            return;
        }
        let values: Vec<f64> = gradient.into_data().convert::<f64>().try_to_vec().unwrap();
        self.squares += values.iter().map(|x| x * x).sum::<f64>();
        self.largest = values.iter().fold(self.largest, |most, x| x.abs().max(most));
    }
}

/// What one device does.
struct Alone {
    norms: Vec<f64>,
    losses: Vec<f64>,
    after: Wholes,
}

fn alone(model: &Lm, norm: Norm, max: f64) -> Alone {
    let mut model = own(model);
    let device = Device::flex().autodiff();
    let mut optim = optimizer();
    let mut alone = Alone { norms: Vec::new(), losses: Vec::new(), after: Wholes::new() };
    for step in 0..STEPS {
        let (sum, items) = model.summed(batch(step, &device));
        alone.losses.push(sum.clone().into_scalar::<f64>() / items as f64);
        let mut grads = GradientsParams::from_grads(sum.backward(), &model);
        // The mean, in the precision of the gradients: burn's autodiff divides by numbers of `f32`.
        let factor = Some(1.0 / items as f64);
        let mut by_hand = ByHand { grads: &mut grads, squares: 0.0, largest: 0.0, factor };
        model.visit(&mut by_hand);
        by_hand.factor = None;
        model.visit(&mut by_hand);
        let found = if norm == Norm::L2 { by_hand.squares.sqrt() } else { by_hand.largest };
        alone.norms.push(found);
        by_hand.factor = Some((max / (found + 1e-6)).min(1.0));
        model.visit(&mut by_hand);
        model = optim.step(RATE, model, grads);
    }
    alone.after = values(&model);
    alone
}

/// Without momentum or scaling of its own: what a gradient is scaled by shows in the parameters.
fn optimizer() -> ModuleOptimizer {
    SgdConfig::new().init()
}

struct Compare<'a> {
    what: String,
    clip: Clip,
    expected: &'a Alone,
    tolerance: f64,
}

impl Meshed<Lm> for Compare<'_> {
    fn run<P: ParallelModule<Model = Lm>>(self, mut model: P, dp: &Communicator) -> Result<(), Error> {
        let mut optim = optimizer();
        let device = Device::flex().autodiff();
        let rows = part(ROWS, dp.size(), dp.rank());
        for number in 0..STEPS {
            let (tokens, targets) = batch(number, &device);
            let step = model.step((tokens.slice([rows.clone()]), targets.slice([rows.clone()])), loss)?;
            let step = step.clip_grad_norm(&model, self.clip)?;
            let what = format!("{}, step {number}", self.what);
            close(&format!("{what}: loss"), self.expected.losses[number], step.loss.item(), self.tolerance);
            close(&format!("{what}: norm"), self.expected.norms[number], step.grad_norm.unwrap(), self.tolerance);
            assert!(!step.skipped);
            model = optim.step(RATE, model, step.grads);
        }
        all_same(&self.what, &self.expected.after, &values(&model.assemble()?), self.tolerance as f32);
        Ok(())
    }
}

/// Sizes of `dp`, `pp` and `tp`.
const MESHES: [[usize; 3]; 13] = [
    [1, 1, 1],
    [2, 1, 1],
    [3, 1, 1],
    [1, 1, 2],
    [1, 1, 3],
    [1, 1, 4],
    [1, 2, 1],
    [1, 3, 1],
    [1, 2, 2],
    [2, 1, 2],
    [2, 2, 1],
    [1, 3, 2],
    [2, 2, 2],
];

fn compare(kind: Kind, clip: impl Fn(f64) -> Clip, norm: Norm, tolerance: f64) {
    let model = kind.init(&Device::flex().autodiff());
    // Clipped in some steps and not in others.
    let unclipped = alone(&model, norm, f64::INFINITY);
    let max = (unclipped.norms[0] + unclipped.norms[1]) / 2.0;
    let clip = clip(max);
    let expected = alone(&model, norm, max);
    assert!(expected.norms.iter().any(|norm| *norm > max), "nothing is clipped: {:?}", expected.norms);
    for axes in MESHES {
        launch::threads(axes.iter().product())
            .run(|world| {
                let what = format!("{kind:?} on {axes:?} by {norm:?}");
                let compare = Compare { what, clip, expected: &expected, tolerance };
                on_mesh(&world, axes, model.clone(), &kind.plan(), cut, compare)
            })
            .unwrap();
    }
}

const PLAIN: Kind = Kind { tied: false, frozen: false, dtype: DType::F32 };

#[test]
fn clipped_steps_are_those_of_one_device() {
    compare(PLAIN, Clip::at, Norm::L2, 2e-5);
}

#[test]
fn tied_weights_count_once() {
    compare(Kind { tied: true, ..PLAIN }, Clip::at, Norm::L2, 2e-5);
}

#[test]
fn frozen_parameters_do_not_count() {
    compare(Kind { tied: true, frozen: true, ..PLAIN }, Clip::at, Norm::L2, 2e-5);
}

#[test]
fn the_largest_magnitude_is_that_of_one_device() {
    compare(Kind { tied: true, ..PLAIN }, |max| Clip::at(max).with_norm(Norm::Infinity), Norm::Infinity, 2e-5);
}

#[test]
fn in_f64_norms_are_those_of_one_device_to_12_digits() {
    compare(Kind { dtype: DType::F64, ..PLAIN }, Clip::at, Norm::L2, 1e-12);
    compare(Kind { tied: true, frozen: true, dtype: DType::F64 }, Clip::at, Norm::L2, 1e-12);
}

#[test]
fn in_bf16_norms_are_summed_in_f64() {
    compare(Kind { dtype: DType::BF16, ..PLAIN }, Clip::at, Norm::L2, 4e-2);
}
