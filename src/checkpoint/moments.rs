//! The moments that an optimizer keeps on this rank, by the paths of their parameters.
//!
//! What there is, its names, dims and dtypes, must be known before anything is written, and burn tells it with all
//! values alone: a copy of the whole state. From one save to the next it stays the same, as a rule: so it is
//! remembered, and compared with what is read out when that is written.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use burn::module::ParamId;
use burn::optim::ModuleOptimizer;
use burn::tensor::{DType, TensorData};
use burn_pack::Scalar;

use super::contents::{OfMoments, Slice, SliceValue};
use super::params::ParamInfo;
use super::plan::TensorKey;
use super::scalar::StoredScalar;
use super::{checkpoint_error, unreadable};
use crate::Error;
use crate::optim::{ParamState, StateNames, has_others, portions};
use crate::params::ParamSlice;

/// The numbers of parameters.
type Scalars = HashMap<ParamId, BTreeMap<String, Scalar>>;

/// Dims and dtype.
type Shape = (Vec<usize>, DType);

/// What is known of the state of an optimizer on this rank.
#[derive(Debug, Clone, Default)]
pub(super) struct KnownState {
    pub(super) names: StateNames,
    /// The moments of each parameter that has a state, by name.
    params: HashMap<ParamId, BTreeMap<String, Shape>>,
}

/// By the name of the optimizer; kept from one save to the next.
pub(super) type KnownStates = Arc<Mutex<BTreeMap<String, KnownState>>>;

/// The state of an optimizer on this rank, by path. Of its moments it is known what they are: they are read as they are
/// written.
pub(super) struct Moments {
    pub(super) slices: Vec<Slice>,
    /// Some numbers of parameters, of which those that other ranks tell must be the same: of one parameter at least,
    /// and all of those that have no moments.
    pub(super) scalars: BTreeMap<String, BTreeMap<String, StoredScalar>>,
}

/// # Errors
/// [`Error::Checkpoint`] if it has moments of parameters that the model does not have, or of dims that do not fit
/// theirs.
pub(super) fn of_optimizer(
    optimizer: &str,
    state: &ModuleOptimizer,
    infos: &[ParamInfo],
    of: &OfMoments,
    known: &mut KnownState,
) -> Result<Moments, Error> {
    let OfMoments { held, saved } = of;
    let scalars = match known.still(optimizer, state, infos, held)? {
        Some(scalars) => scalars,
        None => {
            *known = KnownState { names: std::mem::take(&mut known.names), params: HashMap::new() };
            known.learn(optimizer, state, infos, held)?
        }
    };
    let mut slices = Vec::new();
    for info in infos.iter().filter(|info| saved.contains(&info.id)) {
        let (Some(moments), Some(slice)) = (known.params.get(&info.id), held.get(&info.id)) else { continue };
        for (moment, (dims, dtype)) in moments {
            let Some((dims, ranges)) = part(dims, slice) else {
                let ParamSlice { local_dims, dims: whole, .. } = slice;
                return Err(checkpoint_error(format!(
                    "optimizer `{optimizer}`: moment `{moment}` of `{}` has dims {dims:?}, of which it cannot be told what part of \
                     the whole it is: this rank holds {local_dims:?} of {whole:?}. Leave the parameter whole, or take another \
                     optimizer for it",
                    info.path
                )));
            };
            if !ranges.iter().any(Range::is_empty) {
                let key = TensorKey::moment(optimizer, &info.path, moment);
                slices.push(Slice { key, dims, ranges, value: SliceValue::Moment(info.id, *dtype) });
            }
        }
    }
    // One that has no elements has no moments that could be saved, and its numbers are of no use without.
    let any = |info: &&ParamInfo| held.get(&info.id).is_none_or(|slice| !slice.dims.contains(&0));
    let paths: HashMap<ParamId, &String> = infos.iter().filter(any).map(|info| (info.id, &info.path)).collect();
    let scalars = scalars.into_iter().filter_map(|(id, scalars)| Some(((*paths.get(&id)?).clone(), stored(scalars))));
    let scalars = scalars.collect();
    Ok(Moments { slices, scalars })
}

/// The numbers of a parameter as a checkpoint has them.
pub(super) fn stored(scalars: BTreeMap<String, Scalar>) -> BTreeMap<String, StoredScalar> {
    scalars.into_iter().map(|(name, scalar)| (name, scalar.into())).collect()
}

impl KnownState {
    /// The moments of a parameter are these.
    pub(super) fn is(&self, id: ParamId, state: Option<&ParamState>) -> bool {
        let Some((known, state)) = self.params.get(&id).zip(state) else { return false };
        let found = state.moments.iter().map(|(name, data)| (name, shape(data)));
        known.len() == state.moments.len() && found.zip(known).all(|((a, found), (b, known))| a == b && found == *known)
    }

    /// If the optimizer has a state of these parameters still, and of no others: the numbers of the smallest of them,
    /// which is looked at, and of those without moments.
    fn still(
        &self,
        optimizer: &str,
        state: &ModuleOptimizer,
        infos: &[ParamInfo],
        held: &HashMap<ParamId, ParamSlice>,
    ) -> Result<Option<Scalars>, Error> {
        let there: Vec<&ParamInfo> = infos.iter().filter(|info| self.params.contains_key(&info.id)).collect();
        if there.len() != self.params.len() || there.is_empty() {
            return Ok(None);
        }
        let failed = |why| unreadable(optimizer, why);
        if has_others(state, there.iter().map(|info| info.id).collect()).map_err(failed)? {
            return Ok(None);
        }
        let smallest = there.iter().min_by_key(|info| bytes(info, held)).map(|info| info.id);
        let bare = there.iter().map(|info| info.id).filter(|id| self.params[id].is_empty());
        let ids: HashSet<ParamId> = smallest.into_iter().chain(bare).collect();
        let ids: Vec<ParamId> = ids.into_iter().collect();
        let mut scalars = HashMap::new();
        for ids in portions(&ids, |_| 0) {
            let mut states = self.names.clone().read(state, ids).map_err(failed)?;
            for id in ids {
                let found = states.remove(id);
                if !self.is(*id, found.as_ref()) {
                    return Ok(None);
                }
                scalars.extend(found.map(|state| (*id, state.scalars)));
            }
        }
        Ok(Some(scalars))
    }

    /// Looks at the state of all parameters. Returns their numbers.
    fn learn(
        &mut self,
        optimizer: &str,
        state: &ModuleOptimizer,
        infos: &[ParamInfo],
        held: &HashMap<ParamId, ParamSlice>,
    ) -> Result<Scalars, Error> {
        let failed = |why| unreadable(optimizer, why);
        if has_others(state, infos.iter().map(|info| info.id).collect()).map_err(failed)? {
            let problem =
                "it has moments of a parameter that the model does not have: save it with the model that it trains";
            return Err(checkpoint_error(format!("optimizer `{optimizer}`: {problem}")));
        }
        let mut scalars = HashMap::new();
        for portion in portions(infos, |info| bytes(info, held)) {
            let ids: Vec<ParamId> = portion.iter().map(|info| info.id).collect();
            for (id, state) in self.names.read(state, &ids).map_err(failed)? {
                let moments = state.moments.iter().map(|(name, data)| (name.clone(), shape(data)));
                self.params.insert(id, moments.collect());
                scalars.insert(id, state.scalars);
            }
        }
        Ok(scalars)
    }
}

fn shape(data: &TensorData) -> Shape {
    (data.shape().to_vec(), data.dtype())
}

/// The bytes of what this rank updates of a parameter.
fn bytes(info: &ParamInfo, held: &HashMap<ParamId, ParamSlice>) -> usize {
    held.get(&info.id).map_or(0, |slice| slice.local_dims.iter().product::<usize>() * info.dtype.size())
}

/// The dims of the whole of a moment of these dims, and which part of it this rank has; `None` if that cannot be told.
fn part(dims: &[usize], param: &ParamSlice) -> Option<(Vec<usize>, Vec<Range<usize>>)> {
    if dims == param.local_dims {
        return Some((param.dims.clone(), param.ranges.clone()));
    }
    let is_whole = |dim: usize| param.ranges[dim] == (0..param.dims[dim]);
    if (0..param.dims.len()).all(is_whole) {
        return Some((dims.to_vec(), dims.iter().map(|size| 0..*size).collect()));
    }
    // Factored moments have 1 where they are sums over a dim.
    let factored = dims.len() == param.dims.len()
        && dims.iter().enumerate().all(|(dim, size)| *size == param.local_dims[dim] || (*size == 1 && is_whole(dim)));
    factored.then(|| {
        let sides = dims.iter().enumerate().map(|(dim, size)| match *size == param.local_dims[dim] {
            true => (param.dims[dim], param.ranges[dim].clone()),
            false => (1, 0..1),
        });
        sides.unzip()
    })
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{AdamWConfig, GradientsParams};
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::checkpoint::params;

    /// What a rank updates and another saves, as a stage of a pipeline does with tied parameters, is as large as it is:
    /// from one save to the next the smallest is looked at.
    #[test]
    fn what_another_rank_saves_counts_with_its_size() {
        let device = Device::flex().autodiff();
        let model: Linear = LinearConfig::new(40, 30).init(&device);
        let (weight, bias) = (model.weight.id, model.bias.as_ref().unwrap().id);
        let mut optim: ModuleOptimizer = AdamWConfig::new().init();
        let loss = model.forward(Tensor::<2>::ones([2, 40], &device)).powi_scalar(2).sum();
        let model = optim.step(0.1, model.clone(), GradientsParams::from_grads(loss.backward(), &model));
        let infos = params::infos(&model).unwrap();
        let held = [(weight, ParamSlice::whole(vec![40, 30])), (bias, ParamSlice::whole(vec![30]))].into();
        let of = OfMoments { held, saved: [bias].into() };
        let mut known = KnownState::default();
        for looked_at in [&["bias", "weight"][..], &["bias"], &["bias"]] {
            let found = of_optimizer("adamw", &optim, &infos, &of, &mut known).unwrap();
            assert_eq!(found.scalars.keys().collect::<Vec<_>>(), looked_at);
            assert!(found.slices.len() == 2 && found.slices.iter().all(|slice| slice.dims == [30]));
        }
    }
}
