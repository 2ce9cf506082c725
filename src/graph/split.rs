//! How one model is split over a group: what every strategy knows of tensor parallelism.

use std::sync::Arc;

use burn::module::{Module, ParamId};

use super::shard::{ShardReport, partition, register_collectives};
use super::{CustomOps, StepGraph, graph_error};
use crate::comm::Communicator;
use crate::error::Error;
use crate::layout::Layout;
use crate::params;
use crate::plan::{Plan, PlanTable};

/// The split of a model: its plan, where each parameter lies, and the group that it is split over. Cheap to clone.
///
/// A strategy that runs captured steps of a split model takes the [outline](Self::outline) to capture, then
/// [applies](Self::apply) the split to the graph, and lets the executor know the collectives by [`register`](Self::register).
#[derive(Debug, Clone)]
pub(crate) struct ModelSplit {
    plan: Arc<Plan>,
    table: Arc<PlanTable>,
    group: Communicator,
}

impl ModelSplit {
    /// Checks the plan against the model, makes sure that all ranks bring the same, and leaves this rank its parts of rank
    /// 0's parameters.
    ///
    /// # Errors
    /// Those of [`Plan::table`], [`params::agree`] and [`Communicator`].
    pub(crate) fn distribute<M: Module>(model: M, group: &Communicator, plan: &Plan) -> Result<(M, Self), Error> {
        let table = plan.table(&model, group.size())?;
        params::agree_on_layouts(&table, group)?;
        // Collectives of steps are counted by themselves.
        let group = group.split(0, group.rank() as i64)?;
        let local = if group.size() == 1 { model } else { params::distribute(model, &table, &group)? };
        Ok((local, Self { plan: Arc::new(plan.clone()), table: Arc::new(table), group }))
    }

    pub(crate) fn table(&self) -> &PlanTable {
        &self.table
    }

    pub(crate) fn group(&self) -> &Communicator {
        &self.group
    }

    /// The dims of a parameter as a whole, if it is split.
    pub(crate) fn whole_dims(&self, id: ParamId) -> Option<Vec<usize>> {
        self.table.row(id).filter(|row| row.layout != Layout::Replicated).map(|row| row.dims.clone())
    }

    /// The module with the dims that it has as a whole, of which split parameters take no memory: what a capture looks at.
    pub(crate) fn outline<M: Module>(&self, local: &M) -> M {
        params::outline(local, &|id, _| self.whole_dims(id))
    }

    /// Puts the whole model together, on every rank. Collective.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(crate) fn assemble<M: Module>(&self, local: &M) -> Result<M, Error> {
        match self.group.size() {
            1 => Ok(local.clone()),
            _ => params::assemble(local.clone(), &self.table, &self.group),
        }
    }

    /// Says how the collectives are run that [`apply`](Self::apply) puts in.
    pub(crate) fn register(&self, ops: &mut CustomOps) {
        register_collectives(ops, &self.group);
    }

    /// Splits a graph captured of the [outline](Self::outline), in place: the local graph of this rank. Collective: all
    /// ranks split the same graph, and it is made sure that they got the same collectives.
    ///
    /// # Errors
    /// [`Error::Plan`] if an input cannot be split as planned; [`Error::Graph`] as [`partition`], and if the ranks would
    /// run different collectives; those of [`Communicator`].
    pub(crate) fn apply(&self, graph: &mut StepGraph) -> Result<ShardReport, Error> {
        let (group, degree) = (&self.group, self.group.size());
        let layout = |id| self.table.row(id).map_or(Layout::Replicated, |row| row.layout);
        let params: Vec<Layout> = graph.params.iter().map(|param| layout(param.id)).collect();
        let inputs = graph.inputs.iter().map(|input| (input.path.as_str(), input.tensor.shape.as_slice()));
        let inputs = self.plan.input_layouts(inputs, degree)?;
        let (local, report) = partition(graph, &params, &inputs, degree, group.rank())?;
        *graph = local;
        let fingerprints = group.all_gather(vec![graph.collective_fingerprint()])?;
        match fingerprints.iter().position(|fingerprint| *fingerprint != fingerprints[0]) {
            None => Ok(report),
            Some(rank) => Err(graph_error(format!(
                "rank {rank} of group `{}` would run other collectives than rank 0: pass the same step and inputs of the \
                 same shapes on every rank",
                group.group()
            ))),
        }
    }
}
