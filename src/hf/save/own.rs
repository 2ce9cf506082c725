//! What this rank holds, and what all do.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use burn::backend::DispatchTensor;
use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, Int, Tensor};
use serde::{Deserialize, Serialize};

use super::config::SaveConfig;
use super::held::HeldPart;
use super::merge::{demand_places, is_factor};
use super::plan::HeldParam;
use super::problem::wrong;
use crate::Error;
use crate::comm::Communicator;
use crate::params::{ParamSlice, ShardedIds, average_statistics, is_shard, is_statistic};
use crate::tensor::PlainTensor;
use crate::tensor_file::{dtype_of, name_of};
use crate::train::ParallelModule;

/// A parameter of the model, and what this rank holds of it.
pub(super) struct OwnParam {
    /// Its number in the order of the model, the same on all ranks.
    pub(super) place: usize,
    pub(super) path: String,
    /// The dims of the whole, if this rank holds something of it.
    pub(super) dims: Vec<usize>,
    pub(super) part: Option<HeldPart>,
}

/// All parameters that are to be saved, in the order of the model. Lazy ones that this rank holds are made.
///
/// # Errors
/// [`Error::Pipeline`] if it is not known who holds what; [`Error::InvalidArgument`] if there are adapters that are not
/// to be merged; [`Error::UnsupportedDType`].
pub(super) fn own_params<P: ParallelModule>(model: &P, config: &SaveConfig) -> Result<Vec<OwnParam>, Error> {
    config.check()?;
    average_statistics(model.local());
    let mut visitor = Visitor {
        held: model.param_slices()?,
        stand_ins: ShardedIds::of(model.local()).stand_ins,
        path: Vec::new(),
        seen: HashSet::new(),
        found: Vec::new(),
        outcome: Ok(()),
    };
    model.local().visit(&mut visitor);
    visitor.outcome?;
    let mut found = visitor.found;
    demand_places(&found, config)?;
    // Adapters that are merged are not left out yet, though they are not written.
    let merged = |path: &str| config.merged.is_some() && is_factor(path);
    found.retain(|param| merged(&param.path) || !config.mapping.keeps(&param.path));
    Ok(found)
}

struct Visitor {
    held: HashMap<ParamId, ParamSlice>,
    /// What is in the place of parameters of which the model holds rows.
    stand_ins: HashSet<ParamId>,
    path: Vec<String>,
    seen: HashSet<ParamId>,
    found: Vec<OwnParam>,
    outcome: Result<(), Error>,
}

impl Visitor {
    fn add(&mut self, id: ParamId, value: impl FnOnce() -> DispatchTensor) {
        if !self.seen.insert(id) || self.outcome.is_err() {
            return;
        }
        let (place, path) = (self.found.len(), self.path.join("."));
        let held = self.held.remove(&id).filter(|held| !held.ranges.iter().any(Range::is_empty));
        let (dims, part) = match held {
            None => (Vec::new(), None),
            Some(ParamSlice { dims, ranges, .. }) => match PlainTensor::of(value(), &format!("parameter `{path}`")) {
                Ok(value) if name_of(value.dtype()).is_some() => {
                    (dims, Some(HeldPart { value, ranges, adapter: None }))
                }
                Ok(value) => {
                    self.outcome = Err(Error::UnsupportedDType { operation: "hf::save", dtype: value.dtype() });
                    return;
                }
                Err(error) => {
                    self.outcome = Err(error);
                    return;
                }
            },
        };
        self.found.push(OwnParam { place, path, dims, part });
    }
}

impl ModuleVisitor for Visitor {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.stand_ins.contains(&param.id) {
            self.add(param.id, || param.val().into_dispatch());
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.add(param.id, || param.val().into_dispatch());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.add(param.id, || param.val().into_dispatch());
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.path.push(name.into());
        }
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.path.pop();
        }
    }
}

/// What a rank tells of a part that it holds.
#[derive(Serialize, Deserialize)]
struct ToldParam {
    place: usize,
    path: String,
    dims: Vec<usize>,
    dtype: String,
    ranges: Vec<Range<usize>>,
}

/// All parameters with what each rank holds of them. Collective.
///
/// # Errors
/// [`Error::InvalidArgument`] if the ranks hold different models; those of the group.
pub(super) fn all_params(own: &[OwnParam], group: &Communicator) -> Result<Vec<HeldParam>, Error> {
    let mut told = Vec::new();
    for param in own {
        let Some(part) = &param.part else { continue };
        let dtype = name_of(part.value.dtype()).unwrap_or_default();
        let OwnParam { place, path, dims, .. } = param;
        let ranges = part.ranges.clone();
        told.push(ToldParam { place: *place, path: path.clone(), dims: dims.clone(), dtype: dtype.into(), ranges });
    }
    let text = serde_json::to_vec(&told).map_err(|why| wrong(why.to_string()))?;
    let lens = group.all_gather(vec![text.len() as u64])?;
    let mut all = group.all_gather(text)?;
    let mut params: BTreeMap<usize, HeldParam> = BTreeMap::new();
    for (rank, len) in lens.into_iter().enumerate() {
        let rest = all.split_off((len as usize).min(all.len()));
        let told: Vec<ToldParam> = serde_json::from_slice(&all).map_err(|why| wrong(why.to_string()))?;
        all = rest;
        for ToldParam { place, path, dims, dtype, ranges } in told {
            let dtype = dtype_of(&dtype).ok_or_else(|| wrong(format!("rank {rank} speaks of a dtype {dtype}")))?;
            let param = params.entry(place).or_insert_with(|| HeldParam {
                place,
                path: path.clone(),
                dims: dims.clone(),
                dtype,
                parts: Vec::new(),
            });
            if (&param.path, &param.dims, param.dtype) != (&path, &dims, dtype) {
                let problem = format!(
                    "rank {rank} has `{path}` of {dims:?} and {dtype:?} where another has `{}` of {:?} and {:?}",
                    param.path, param.dims, param.dtype
                );
                return Err(wrong(problem));
            }
            match param.parts.iter_mut().find(|(known, _)| *known == ranges) {
                // Replicas may have seen different data: of running statistics those of the first are saved.
                Some(_) if is_statistic(&path) || !dtype.is_float() => {}
                Some((_, ranks)) => ranks.push(rank),
                None => param.parts.push((ranges, vec![rank])),
            }
        }
    }
    Ok(params.into_values().collect())
}
