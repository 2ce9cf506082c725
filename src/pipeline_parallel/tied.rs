//! Parameters that stages of several ranks hold.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use burn::module::{Module, ParamId};
use burn::tensor::{DType, Device, Shape};

use crate::Error;
use crate::comm::{Communicator, Counters, ReduceOp};
use crate::graph::{StepGraph, read_params};
use crate::params::{self, Renamed, one_device};
use crate::pipeline_parallel::cut::CutGraph;
use crate::tensor::PlainTensor;

/// What a rank has of a parameter, as it tells the others: no value yet.
const LAZY: u64 = 0;
/// A value that was not looked at, or none.
const UNKNOWN: u64 = 1;
/// A value, whose digest comes with it.
const THERE: u64 = 2;

/// A parameter that several ranks hold.
#[derive(Debug, Clone)]
struct TiedParam {
    id: ParamId,
    shape: Shape,
    dtype: DType,
    /// Place among the holding ranks of the one with the parameter's own stage.
    home: usize,
}

impl TiedParam {
    fn zeros(&self, device: &Device) -> PlainTensor {
        PlainTensor::zeros(self.shape.clone(), self.dtype, device)
    }
}

/// The tied parameters that this rank holds, by the group of ranks that hold them.
///
/// A parameter that is lazy where its own stage is stays lazy: it is shared when a step needs it, unless all holders
/// have loaded it by then.
#[derive(Debug, Clone, Default)]
pub(super) struct TiedParams {
    groups: Vec<(Communicator, Vec<TiedParam>)>,
    /// Those that are not shared yet.
    pending: HashSet<ParamId>,
    /// Whether this rank has loaded all that it holds.
    pub loaded: bool,
}

impl TiedParams {
    /// The same parameters by other ids.
    pub(super) fn rename(&mut self, renamed: &Renamed) {
        self.groups.iter_mut().flat_map(|(_, tied_params)| tied_params).for_each(|tie| tie.id = renamed.id(tie.id));
        self.pending = self.pending.drain().map(|id| renamed.id(id)).collect();
    }

    /// Finds the parameters that several ranks hold, and joins those ranks. Collective over `group`.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(super) fn new(
        graph: &StepGraph,
        cut: &CutGraph,
        stage_ranks: &[usize],
        group: &Communicator,
    ) -> Result<Self, Error> {
        let mut sets: BTreeMap<Vec<usize>, Vec<TiedParam>> = BTreeMap::new();
        for (param, holders) in graph.params.iter().zip(&cut.holders) {
            let ranks: BTreeSet<usize> = holders.iter().map(|stage| stage_ranks[*stage]).collect();
            if ranks.len() > 1 {
                let ranks: Vec<usize> = ranks.into_iter().collect();
                let home = ranks.iter().position(|rank| *rank == stage_ranks[holders[0]]).unwrap_or(0);
                let tie =
                    TiedParam { id: param.id, shape: param.tensor.shape.clone(), dtype: param.tensor.dtype, home };
                sets.entry(ranks).or_default().push(tie);
            }
        }
        let mut tied_params = Vec::new();
        for (ranks, tied) in sets {
            let joined = ranks.contains(&group.rank());
            // The others stay alone.
            let color = if joined { 0 } else { 1 + group.rank() as u64 };
            let holders = group.split_named("tied", color, group.rank() as i64)?;
            if joined {
                tied_params.push((holders, tied));
            }
        }
        Ok(Self { groups: tied_params, ..Self::default() })
    }

    /// Goes on with parts of the parameters of these dims.
    pub(super) fn divide(&mut self, dims: &dyn Fn(ParamId) -> Option<Vec<usize>>) {
        for tied in self.groups.iter_mut().flat_map(|(_, tied_params)| tied_params) {
            if let Some(dims) = dims(tied.id) {
                tied.shape = Shape::from(dims);
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// What the holders have sent each other so far: values when they are shared, and gradients.
    pub(super) fn counters(&self) -> Counters {
        self.groups.iter().fold(Counters::default(), |sum, (group, _)| sum + group.counters())
    }

    /// Those that this rank holds beside the ones of its own stages.
    pub(super) fn of_other_stages(&self) -> impl Iterator<Item = ParamId> {
        let of_group = |(group, tied_params): &(Communicator, Vec<TiedParam>)| {
            let rank = group.rank();
            tied_params.iter().filter(move |tie| tie.home != rank).map(|tie| tie.id).collect::<Vec<_>>()
        };
        self.groups.iter().flat_map(of_group)
    }

    /// The parameters, with the values that the ranks of their own stages bring. Those that are lazy there wait. What
    /// all holders have `read` for themselves is compared, and not sent if it is the same.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(super) fn share<M: Module>(&mut self, model: M, read: bool) -> Result<M, Error> {
        let lazy = params::lazy_params(&model);
        let all = self.groups.iter().flat_map(|(_, tied_params)| tied_params);
        let made = all.filter(|tie| read && !lazy.contains(&tie.id)).map(|tie| tie.id).collect();
        let mut values = read_params(&model, &made)?;
        let mut sent = HashSet::new();
        for (group, tied_params) in &self.groups {
            let mut here = Vec::new();
            for tie in tied_params {
                let value = values.remove(&tie.id).filter(|value| value.shape() == tie.shape);
                here.extend(match value.and_then(|value| value.digest().ok()) {
                    Some(digest) => [THERE, digest],
                    None => [if lazy.contains(&tie.id) { LAZY } else { UNKNOWN }, 0],
                });
            }
            let all = group.all_gather(here.clone())?;
            for (place, tie) in tied_params.iter().enumerate() {
                let of = |holder: usize| &all[holder * here.len() + 2 * place..][..2];
                let home = of(tie.home);
                match home[0] {
                    LAZY => drop(self.pending.insert(tie.id)),
                    THERE if (0..group.size()).all(|holder| of(holder) == home) => {}
                    _ => drop(sent.insert(tie.id)),
                }
            }
        }
        self.shared(model, &|tie| sent.contains(&tie.id))
    }

    /// The model with those parameters shared that have waited, if any still must be. Collective over the holders.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(super) fn settled<M: Module>(&self, model: &M) -> Result<Option<M>, Error> {
        let mut missing = HashSet::new();
        let lazy = if self.pending.is_empty() { HashSet::new() } else { params::lazy_params(model) };
        for (group, tied_params) in &self.groups {
            let waiting = || tied_params.iter().filter(|tie| self.pending.contains(&tie.id));
            if waiting().next().is_none() {
                continue;
            }
            // What a load that failed has read is not in the model.
            let loaded = self.loaded && waiting().all(|tie| !lazy.contains(&tie.id));
            if group.all_gather(vec![u8::from(loaded)])?.contains(&0) {
                missing.extend(waiting().map(|tie| tie.id));
            }
        }
        match missing.is_empty() {
            true => Ok(None),
            false => self.shared(model.clone(), &|tie| missing.contains(&tie.id)).map(Some),
        }
    }

    /// Nothing waits any more.
    pub(super) fn settle(&mut self) {
        self.pending.clear();
    }

    fn shared<M: Module>(&self, model: M, which: &dyn Fn(&TiedParam) -> bool) -> Result<M, Error> {
        let device = one_device(&model, "pipeline_parallel")?.unwrap_or_else(Device::flex);
        let own = self
            .groups
            .iter()
            .flat_map(|(group, tied_params)| tied_params.iter().filter(|tie| tie.home == group.rank()));
        let mut own = read_params(&model, &own.filter(|tie| which(tie)).map(|tie| tie.id).collect())?;
        let mut values = HashMap::new();
        for (group, tied_params) in &self.groups {
            for tie in tied_params.iter().filter(|tie| which(tie)) {
                let mine = own.remove(&tie.id).unwrap_or_else(|| tie.zeros(&device));
                let value = group.broadcast(mine, tie.home)?;
                if group.rank() != tie.home {
                    values.insert(tie.id, value);
                }
            }
        }
        Ok(params::replace_values(model, values))
    }

    /// Sums the parts of the gradients of `trained` parameters in the order of the ranks, so that all holders step to
    /// the same value. `device` is that of the model.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(super) fn sum(
        &self,
        gradients: &mut HashMap<ParamId, PlainTensor>,
        trained: &HashSet<ParamId>,
        device: &Device,
    ) -> Result<(), Error> {
        for (group, tied_params) in &self.groups {
            for tie in tied_params.iter().filter(|tie| trained.contains(&tie.id)) {
                let part = gradients.remove(&tie.id).unwrap_or_else(|| tie.zeros(device));
                gradients.insert(tie.id, group.all_reduce(part, ReduceOp::Sum)?);
            }
        }
        Ok(())
    }

    /// As [`sum`](Self::sum), of all parameters of which a holder has a part of the gradient: where replicas use
    /// different ones, that does not follow from the step of this one.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(super) fn sum_any(&self, gradients: &mut HashMap<ParamId, PlainTensor>, device: &Device) -> Result<(), Error> {
        let mut any = HashSet::new();
        for (group, tied_params) in &self.groups {
            let here = tied_params.iter().map(|tie| u8::from(gradients.contains_key(&tie.id))).collect();
            let all: Vec<u8> = group.all_gather(here)?;
            let of_holders = |place: usize| all.iter().skip(place).step_by(tied_params.len());
            let held = tied_params.iter().enumerate().filter(|(place, _)| of_holders(*place).any(|part| *part == 1));
            any.extend(held.map(|(_, tie)| tie.id));
        }
        self.sum(gradients, &any, device)
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Tensor;

    use super::*;
    use crate::lock::lock;
    use crate::prelude::*;

    /// Groups are made for the model, and not for the shapes that come: on a network each is a communicator.
    #[test]
    fn other_shapes_need_no_other_groups() {
        for size in [2, 3] {
            launch::threads(size)
                .run(|rank| {
                    let device = Device::flex().autodiff();
                    let layer = || -> Linear { LinearConfig::new(4, 4).init(&device) };
                    let cut = Cut::before((1..size).map(|stage| format!("{stage}.*")));
                    let config = PipelineConfig::new(2).with_cut(cut).with_graphs(2);
                    let layers: Vec<Linear> = (0..size).map(|_| layer()).collect();
                    let mut model = layers.pipeline_parallel(&rank, config)?;
                    // The first layer is the last as well.
                    let forward = |model: &Vec<Linear>, x: Tensor<2>| {
                        model[0].forward(model.iter().fold(x, |x, layer| layer.forward(x)))
                    };
                    for rows in [2, 4, 6, 2, 8, 5] {
                        let x = || Tensor::<2>::ones([rows, 4], &device);
                        model.step(x(), |model, x| forward(model, x).mean())?;
                        model.forward_with(x(), forward)?;
                        assert_eq!(lock(&model.state).group.counters().of("split").calls, 1, "{rows} rows");
                    }
                    Ok(())
                })
                .unwrap();
        }
    }
}
