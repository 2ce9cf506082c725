//! Tries out whether an optimizer updates parts of a parameter as it updates the whole.
//!
//! The optimizer may be another one for each parameter: small ones of the same ids and paths stand in for them.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Device, Tensor, TensorData};

use super::panicked::Updated;
use crate::Error;
use crate::comm::panic_message;
use crate::error::catch_quietly;
use crate::graph::SplitParam;

/// The size of every dim of a small parameter; even, to be halved.
const SIZE: usize = 4;

/// What the gradients of the first and of the second half are multiplied by, in each step. They are large, so that what
/// clips by a norm clips, and their ratio changes, so that moments do not hide it.
const SCALES: [[f64; 2]; 3] = [[1e6, 3e7], [4e7, 2e6], [1e6, 1e6]];

const LEARNING_RATE: f64 = 0.1;

/// By how much the two may differ, relative to the update: rounding only.
const TOLERANCE: f32 = 1e-3;

/// Which part of the small parameters.
#[derive(Clone, Copy)]
enum Probed {
    Whole,
    Half(usize),
}

/// The parameters, among those that are split, of which the optimizer does not update a part as it would the whole.
///
/// # Errors
/// [`Error::Optimizer`] if it panics.
pub(super) fn whole<M: Module>(
    optim: &ModuleOptimizer,
    local: &M,
    split: &[SplitParam],
) -> Result<HashSet<ParamId>, Error> {
    let most = split.iter().map(|param| param.split.len()).max().unwrap_or(0);
    let mut found = HashSet::new();
    for place in 0..most {
        // Along one dim after the other.
        let along = |param: &SplitParam| Some(SplitParam { split: vec![*param.split.get(place)?], ..param.clone() });
        found.extend(whole_along(optim, local, &split.iter().filter_map(along).collect::<Vec<_>>())?);
    }
    Ok(found)
}

/// The same of parameters that are split along one dim each.
fn whole_along<M: Module>(optim: &ModuleOptimizer, local: &M, split: &[SplitParam]) -> Result<HashSet<ParamId>, Error> {
    let by_id: HashMap<ParamId, &SplitParam> = split.iter().map(|param| (param.id, param)).collect();
    let attempt = |part| {
        catch_quietly(|_| true, || train(optim, local, &by_id, part))
            .map_err(|panic| Updated::of_parts(split).error(optim, &panic_message(&*panic)))
    };
    let (whole, halves) = (attempt(Probed::Whole)?, [attempt(Probed::Half(0))?, attempt(Probed::Half(1))?]);
    let looks_at_the_whole = |param: &&SplitParam| {
        let Some(whole) = whole.get(&param.id) else { return false };
        let largest = whole.iter().map(|(_, before, after)| (after - before).abs()).fold(0.0, f32::max);
        halves.iter().enumerate().any(|(half, values)| {
            let part = whole.iter().filter(|(at, ..)| *at == half).map(|(.., after)| after);
            let found = values.get(&param.id).into_iter().flatten().map(|(.., after)| after);
            // NaN as well.
            let same = |(a, b): (&f32, &f32)| (a - b).abs() <= TOLERANCE * largest + f32::EPSILON;
            !part.zip(found).all(same)
        })
    };
    Ok(split.iter().filter(looks_at_the_whole).map(|param| param.id).collect())
}

/// Trains small parameters for some steps: of each element the half in which it is, its value before and after.
fn train<M: Module>(
    optim: &ModuleOptimizer,
    local: &M,
    split: &HashMap<ParamId, &SplitParam>,
    part: Probed,
) -> HashMap<ParamId, Vec<(usize, f32, f32)>> {
    // The same groups without moments.
    let mut optim = optim.clone().load_record(OptimizerRecord::default());
    let mut model = local.clone().map(&mut ShrinkSplit { split, part });
    let mut before = PartValues { split, part, values: HashMap::new() };
    model.visit(&mut before);
    for scales in SCALES {
        let mut gradients = PartGradients { split, part, scales, gradients: GradientsParams::new() };
        model.visit(&mut gradients);
        model = optim.step(LEARNING_RATE, model, gradients.gradients);
    }
    let mut after = PartValues { split, part, values: HashMap::new() };
    model.visit(&mut after);
    let pairs = |(id, before): (ParamId, Vec<(usize, f32)>)| {
        let after = after.values.remove(&id).unwrap_or_default();
        let pairs = before.into_iter().zip(after).map(|((half, before), (_, after))| (half, before, after));
        (id, pairs.collect())
    };
    before.values.into_iter().map(pairs).collect()
}

/// A small parameter of rank `D`: for each element its half and a number for it, which is the same in a part as in the
/// whole.
fn elements<const D: usize>(param: &SplitParam, part: Probed) -> ([usize; D], Vec<(usize, f64)>) {
    let dim = param.split.first().copied().unwrap_or(0).min(D.saturating_sub(1));
    let mut dims = [SIZE; D];
    if let Probed::Half(_) = part
        && D > 0
    {
        dims[dim] = SIZE / 2;
    }
    let count = dims.iter().product::<usize>();
    let element = |place: usize| {
        let (mut rest, mut whole, mut half) = (place, 0, 0);
        for (at, size) in dims.iter().enumerate().rev() {
            let mut index = rest % size;
            rest /= size;
            if at == dim {
                if let Probed::Half(which) = part {
                    index += which * SIZE / 2;
                }
                half = index / (SIZE / 2);
            }
            whole += index * SIZE.pow((D - 1 - at) as u32);
        }
        // Numbers that look random, between -1 and 1, none of them 0.
        (half, ((whole as f64 + 1.0) * 12.9898).sin())
    };
    (dims, (0..count).map(element).collect())
}

fn tensor<const D: usize>(dims: [usize; D], values: impl Iterator<Item = f64>) -> Tensor<D> {
    let values: Vec<f32> = values.map(|value| value as f32).collect();
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

/// Puts small parameters in the place of those that are split.
struct ShrinkSplit<'a> {
    split: &'a HashMap<ParamId, &'a SplitParam>,
    part: Probed,
}

impl ModuleMapper for ShrinkSplit<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(split) = self.split.get(&param.id) else { return param };
        let (dims, elements) = elements::<D>(split, self.part);
        let value = tensor(dims, elements.into_iter().map(|(_, number)| number));
        // Optimizers take values off their tape.
        Param::initialized(param.id, value.autodiff().require_grad())
    }
}

struct PartGradients<'a> {
    split: &'a HashMap<ParamId, &'a SplitParam>,
    part: Probed,
    scales: [f64; 2],
    gradients: GradientsParams,
}

impl ModuleVisitor for PartGradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(split) = self.split.get(&param.id) else { return };
        let (dims, elements) = elements::<D>(split, self.part);
        let gradient = elements.into_iter().map(|(half, number)| (1.5 - number) * self.scales[half]);
        self.gradients.register(param.id, tensor(dims, gradient));
    }
}

struct PartValues<'a> {
    split: &'a HashMap<ParamId, &'a SplitParam>,
    part: Probed,
    values: HashMap<ParamId, Vec<(usize, f32)>>,
}

impl ModuleVisitor for PartValues<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(split) = self.split.get(&param.id) else { return };
        let (_, elements) = elements::<D>(split, self.part);
        let values = param.val().inner().into_data();
        let halves = elements.into_iter().map(|(half, _)| half);
        self.values.insert(param.id, halves.zip(values.iter::<f32>()).collect());
    }
}
