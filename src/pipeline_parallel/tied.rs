//! Parameters that stages of several ranks hold.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use burn::module::{Module, ParamId};
use burn::tensor::{DType, Device, Shape};

use crate::Error;
use crate::comm::{Communicator, ReduceOp};
use crate::graph::{StepGraph, read_params};
use crate::params::{self, Renamed, one_device};
use crate::pipeline_parallel::cut::CutGraph;
use crate::tensor::PlainTensor;

/// A parameter that several ranks hold.
#[derive(Debug, Clone)]
struct Tie {
    id: ParamId,
    shape: Shape,
    dtype: DType,
    /// Place among the holding ranks of the one with the parameter's own stage.
    home: usize,
}

impl Tie {
    fn zeros(&self, device: &Device) -> PlainTensor {
        PlainTensor::zeros(self.shape.clone(), self.dtype, device)
    }
}

/// The tied parameters that this rank holds, by the group of ranks that hold them.
#[derive(Debug, Clone, Default)]
pub(super) struct Ties(Vec<(Communicator, Vec<Tie>)>);

impl Ties {
    /// The same parameters by other ids.
    pub(super) fn rename(&mut self, renamed: &Renamed) {
        self.0.iter_mut().flat_map(|(_, ties)| ties).for_each(|tie| tie.id = renamed.id(tie.id));
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
        let mut sets: BTreeMap<Vec<usize>, Vec<Tie>> = BTreeMap::new();
        for (param, holders) in graph.params.iter().zip(&cut.holders) {
            let ranks: BTreeSet<usize> = holders.iter().map(|stage| stage_ranks[*stage]).collect();
            if ranks.len() > 1 {
                let ranks: Vec<usize> = ranks.into_iter().collect();
                let home = ranks.iter().position(|rank| *rank == stage_ranks[holders[0]]).unwrap_or(0);
                let tie = Tie { id: param.id, shape: param.tensor.shape.clone(), dtype: param.tensor.dtype, home };
                sets.entry(ranks).or_default().push(tie);
            }
        }
        let mut ties = Vec::new();
        for (ranks, tied) in sets {
            let joined = ranks.contains(&group.rank());
            // The others stay alone.
            let color = if joined { 0 } else { 1 + group.rank() as u64 };
            let holders = group.split_named("tied", color, group.rank() as i64)?;
            if joined {
                ties.push((holders, tied));
            }
        }
        Ok(Self(ties))
    }

    /// The parameters, with the values that the ranks of their own stages bring.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(super) fn share<M: Module>(&self, model: M) -> Result<M, Error> {
        let device = one_device(&model, "pipeline_parallel")?.unwrap_or_else(Device::flex);
        let own = self.0.iter().flat_map(|(group, ties)| ties.iter().filter(|tie| tie.home == group.rank()));
        let mut own = read_params(&model, &own.map(|tie| tie.id).collect())?;
        let mut values = HashMap::new();
        for (group, ties) in &self.0 {
            for tie in ties {
                let mine = own.remove(&tie.id).unwrap_or_else(|| tie.zeros(&device));
                let value = group.broadcast(mine, tie.home)?;
                if group.rank() != tie.home {
                    values.insert(tie.id, value);
                }
            }
        }
        Ok(params::put(model, values))
    }

    /// Sums the parts of the gradients of `trained` parameters in the order of the ranks, so that all holders step to the
    /// same value. `device` is that of the model.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(super) fn sum(
        &self,
        gradients: &mut HashMap<ParamId, PlainTensor>,
        trained: &HashSet<ParamId>,
        device: &Device,
    ) -> Result<(), Error> {
        for (group, ties) in &self.0 {
            for tie in ties.iter().filter(|tie| trained.contains(&tie.id)) {
                let part = gradients.remove(&tie.id).unwrap_or_else(|| tie.zeros(device));
                gradients.insert(tie.id, group.all_reduce(part, ReduceOp::Sum)?);
            }
        }
        Ok(())
    }
}
