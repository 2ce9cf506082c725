//! The split of a model over one or several axes: what strategies know of tensor parallelism.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use burn::module::{Module, ParamId};

use super::assemble::assemble;
use super::distribute::{Round, agree_on_layouts, distribute};
use super::row_shards::RowShards;
use crate::Error;
use crate::comm::{Communicator, part};
use crate::graph::{
    CustomOps, RandomSource, Signature, SplitOver, SplitParam, StepGraph, counter_based_rng, graph_error,
    register_counter_based_rng,
};
use crate::layout::Layout;
use crate::params::{self, FoundParams, Renamed, SliceSource};
use crate::partition::{
    Larger, PartitionOptions, ShardReport, bucket_reductions, fuse_products, overlap, pad, partition,
    register_collectives,
};
use crate::plan::{AxisPlan, Plan, PlanRow, PlanTable};

/// Gradients that are reduced together, where an axis shares out the batch.
const BUCKET_BYTES: usize = 4 << 20;

/// The split of a model: where each parameter lies over each axis, and the groups that it is split over. Cheap to
/// clone.
///
/// A strategy that runs captured steps of a split model takes the [meta module](Self::meta_module) to capture, then
/// [applies](Self::apply) the split to the graph, and lets the executor know the collectives by
/// [`register`](Self::register).
#[derive(Debug, Clone)]
pub(crate) struct ModelSplit {
    table: Arc<PlanTable>,
    /// The dims of every parameter as a whole, if it is split.
    whole_dims: Arc<HashMap<ParamId, Option<Vec<usize>>>>,
    axes: Arc<[SplitAxis]>,
    random: RandomSource,
    /// How replicas divide what each of them would hold of it.
    shards: Option<RowShards>,
    /// Whether steps on the host run groups of operations as one.
    fusion: bool,
}

#[derive(Debug)]
struct SplitAxis {
    name: String,
    group: Communicator,
    plan: AxisPlan,
}

impl ModelSplit {
    /// Checks the plan against the model, makes sure that all ranks bring the same, and leaves this rank its parts of
    /// the parameters of the rank that is first on every axis. The plan describes the first of the axes, given by their
    /// names.
    ///
    /// # Errors
    /// Those of [`Plan::table_over`], [`params::agree`] and [`Communicator`].
    pub(crate) fn distribute<M: Module>(
        model: M,
        axes: &[(&str, &Communicator)],
        plan: &Plan,
    ) -> Result<(M, Self), Error> {
        let sizes: Vec<(&str, usize)> = axes.iter().map(|(name, group)| (*name, group.size())).collect();
        let mut table = plan.table_over(&model, &sizes)?;
        let mut model = model;
        for (_, group) in axes {
            agree_on_layouts(&table, group)?;
            let (same, renamed) = params::share_ids(model, group)?;
            (model, table) = (same, table.renamed(&renamed));
        }
        let plans = plan.over(axes.iter().map(|axis| axis.0))?;
        // Once, however many replicas and stages are split by it.
        if let Some(warning) = table.mostly_whole().filter(|_| axes.iter().all(|(_, group)| group.world_rank() == 0)) {
            log::warn!("{warning}");
        }
        let mut made = Vec::new();
        for ((name, group), plan) in axes.iter().zip(plans) {
            // Collectives of steps are counted by themselves.
            let group = group.split(0, group.rank() as i64)?;
            made.push(SplitAxis { name: (*name).into(), group, plan });
        }
        let mut local = model;
        for round in [Round::Split, Round::Copy] {
            for (index, axis) in made.iter().enumerate().filter(|(_, axis)| axis.group.size() > 1) {
                local = distribute(local, &table, (index, round), &axis.group)?;
            }
        }
        let whole_dims = table.rows().iter().map(|row| (row.id, row.is_split().then(|| row.dims.clone()))).collect();
        let (table, whole_dims) = (Arc::new(table), Arc::new(whole_dims));
        Ok((
            local,
            Self { table, whole_dims, axes: made.into(), random: RandomSource::new(0), shards: None, fusion: true },
        ))
    }

    pub(crate) fn table(&self) -> &PlanTable {
        &self.table
    }

    /// The same split, of which replicas divide the parts.
    pub(crate) fn with_shards(mut self, shards: RowShards) -> Self {
        let dims = |row: &PlanRow| (row.is_split() || shards.divides(row.id)).then(|| row.dims.clone());
        self.whole_dims = Arc::new(self.table.rows().iter().map(|row| (row.id, dims(row))).collect());
        Self { shards: Some(shards), ..self }
    }

    /// How replicas divide the parts, if they do.
    pub(crate) fn shards(&self) -> Option<&RowShards> {
        self.shards.as_ref()
    }

    /// Demands that the ranks of a group along another axis hold the same parts as each other.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`], the same on all ranks; those of [`Communicator`].
    pub(crate) fn same_parts(&self, group: &Communicator) -> Result<(), Error> {
        let place: Vec<u64> = self.groups().map(|axis| axis.rank() as u64).collect();
        let places = group.all_gather(place)?;
        let mut places = places.chunks(self.axes.len());
        let first = places.next();
        let (Some(rank), Some(row)) =
            (places.position(|other| Some(other) != first), self.table.rows().iter().find(|row| row.is_split()))
        else {
            return Ok(());
        };
        let problem = "it holds another part of it: these ranks share one copy of the model, where ranks that hold the same \
                       part are needed, along another axis of the mesh";
        Err(Error::ModelMismatch {
            group: group.group().clone(),
            rank: rank + 1,
            path: row.path.clone(),
            problem: problem.into(),
        })
    }

    /// The group along the plan's own axis.
    pub(crate) fn group(&self) -> &Communicator {
        &self.axes[0].group
    }

    /// The groups along all axes.
    pub(crate) fn groups(&self) -> impl Iterator<Item = &Communicator> {
        self.axes.iter().map(|axis| &axis.group)
    }

    /// The parameters of which another rank has the copy that counts, where each is to count once: along an axis that
    /// leaves a parameter whole that is the first.
    pub(crate) fn counted_elsewhere(&self) -> HashSet<ParamId> {
        let counts = |(layout, axis): (&Layout, &SplitAxis)| *layout != Layout::Replicated || axis.group.rank() == 0;
        let elsewhere = self.table.rows().iter().filter(|row| !row.layouts.iter().zip(self.axes.iter()).all(counts));
        elsewhere.map(|row| row.id).collect()
    }

    /// The dims of a parameter as a whole, if it is split.
    pub(crate) fn whole_dims(&self, id: ParamId) -> Option<Vec<usize>> {
        self.whole_dims.get(&id)?.clone()
    }

    /// The module with the dims that it has as a whole, of which split parameters take no memory: what a capture looks
    /// at.
    pub(crate) fn meta_module<M: Module>(&self, local: &M) -> M {
        params::meta_module(local, &|id, _| self.whole_dims(id))
    }

    /// The signature of the [meta module](Self::meta_module) for a training step, by what was found in this rank's
    /// part.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it has other parameters than the one that was split, or is on a device without
    /// autodiff.
    pub(crate) fn of_step<M: Module>(&self, local: &M, params: &FoundParams) -> Result<Signature, Error> {
        let signature = Signature::of_step(params, &|id, _| self.whole_dims(id));
        signature.can_train()?;
        self.known(local, signature)
    }

    /// The signature of the [meta module](Self::meta_module) for a forward alone.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it has other parameters than the one that was split.
    pub(crate) fn of_forward<M: Module>(&self, local: &M) -> Result<Signature, Error> {
        self.known(local, Signature::of_forward(&FoundParams::of(local), &|id, _| self.whole_dims(id)))
    }

    fn known<M: Module>(&self, local: &M, signature: Signature) -> Result<Signature, Error> {
        let known = |id| self.whole_dims.contains_key(&id);
        if !signature.is_known(known) {
            params::check_params_known(local, &known)?;
        }
        Ok(signature)
    }

    /// The parameters of which this rank holds a part.
    pub(crate) fn split_params(&self) -> Vec<SplitParam> {
        let axes = |row: &PlanRow| {
            let over = row.layouts.iter().zip(self.axes.iter()).filter(|(_, axis)| axis.group.size() > 1);
            let divided = over.filter_map(|(layout, axis)| match layout {
                Layout::Sharded(dim) => Some((*dim, axis.group.clone())),
                _ => None,
            });
            divided.collect::<Vec<_>>()
        };
        let split = self.table.rows().iter().map(|row| (row, axes(row))).filter(|(_, axes)| !axes.is_empty());
        split
            .map(|(row, axes)| SplitParam {
                id: row.id,
                path: row.path.clone(),
                dims: row.local_dims.clone(),
                split: axes.iter().map(|(dim, _)| *dim).collect(),
                over: Some(SplitOver { dims: row.dims.clone(), padded_dims: row.padded_dims.clone(), axes }),
            })
            .collect()
    }

    /// Puts the whole model together, on every rank. Collective.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub(crate) fn assemble<M: Module>(&self, local: &M) -> Result<M, Error> {
        let mut whole = local.clone();
        if let Some(shards) = &self.shards {
            whole = shards.assemble(whole)?;
        }
        for (index, axis) in self.axes.iter().enumerate().rev().filter(|(_, axis)| axis.group.size() > 1) {
            whole = assemble(whole, &self.table, index, &axis.group)?;
        }
        Ok(whole)
    }

    /// Gives this rank's parts the values that a source has, of which nothing else is read. Lazy parameters are not
    /// made.
    ///
    /// # Errors
    /// Those of [`params::load`].
    pub(crate) fn load<M: Module>(&self, local: M, source: &mut dyn SliceSource) -> Result<M, Error> {
        params::load(local, source, &|id| self.held(id))
    }

    /// This rank's part of a parameter.
    pub(crate) fn held(&self, id: ParamId) -> Option<params::ParamSlice> {
        let row = self.table.row(id)?;
        let mut ranges: Vec<Range<usize>> = row.padded_dims.iter().map(|size| 0..*size).collect();
        for (layout, axis) in row.layouts.iter().zip(self.axes.iter()) {
            if let Layout::Sharded(dim) = layout {
                let (range, group) = (&mut ranges[*dim], &axis.group);
                let own = part(range.len(), group.size(), group.rank());
                *range = range.start + own.start..range.start + own.end;
            }
        }
        // What is padding is nowhere to be read.
        let real = ranges.into_iter().zip(&row.dims).map(|(range, size)| range.start.min(*size)..range.end.min(*size));
        let (dims, local_dims) = (row.dims.clone(), row.local_dims.clone());
        let part = params::ParamSlice { dims, ranges: real.collect(), local_dims };
        Some(match &self.shards {
            Some(shards) => shards.slice(id, part),
            None => part,
        })
    }

    /// This rank's parts of all parameters.
    pub(crate) fn param_slices(&self) -> impl Iterator<Item = (ParamId, params::ParamSlice)> {
        self.table.rows().iter().filter_map(|row| Some((row.id, self.held(row.id)?)))
    }

    /// The same split of parameters of other ids.
    pub(crate) fn renamed(&self, renamed: &Renamed) -> Self {
        let whole_dims = self.whole_dims.iter().map(|(id, dims)| (renamed.id(*id), dims.clone())).collect();
        let shards = self.shards.as_ref().map(|shards| shards.renamed(renamed));
        Self { table: Arc::new(self.table.renamed(renamed)), whole_dims: Arc::new(whole_dims), shards, ..self.clone() }
    }

    /// The same split whose steps draw other random numbers from here on.
    pub(crate) fn with_seed(self, seed: u64) -> Self {
        Self { random: self.random.with_seed(seed), ..self }
    }

    pub(crate) fn with_fusion(self, fusion: bool) -> Self {
        Self { fusion, ..self }
    }

    /// Whether steps on the host run groups of operations as one.
    pub(crate) fn fusion(&self) -> bool {
        self.fusion
    }

    /// The seed and step of the random numbers; the engine advances it after each step.
    pub(crate) fn random(&self) -> &RandomSource {
        &self.random
    }

    /// Says how the operations are run that [`apply`](Self::apply) puts in.
    pub(crate) fn register(&self, ops: &mut CustomOps) {
        for axis in self.axes.iter() {
            register_collectives(ops, &axis.name, &axis.group);
        }
        register_counter_based_rng(ops, &self.random);
        self.shards.iter().for_each(|shards| shards.register(ops));
    }

    /// Splits a graph captured of the [meta module](Self::meta_module), in place: the local graph of this rank.
    /// Collective: all ranks split the same graph, and all ranks check that they got the same collectives. Returns a
    /// report for each axis.
    ///
    /// # Errors
    /// [`Error::Plan`] if an input cannot be split as planned; [`Error::Graph`] as [`partition`], and if the ranks
    /// would run different collectives; those of [`Communicator`].
    pub(crate) fn apply(&self, graph: &mut StepGraph) -> Result<Vec<ShardReport>, Error> {
        let over = |axis: &SplitAxis| {
            let options = PartitionOptions::new(&axis.name, axis.group.size(), axis.group.rank());
            (options, axis.plan.clone())
        };
        let reports = split_step(graph, &self.table, &self.axes.iter().map(over).collect::<Vec<_>>())?;
        for SplitAxis { name, group, .. } in self.axes.iter().filter(|axis| axis.group.size() > 1) {
            let fingerprints = group.all_gather(vec![graph.axis_fingerprint(name)])?;
            if let Some(rank) = fingerprints.iter().position(|fingerprint| *fingerprint != fingerprints[0]) {
                return Err(graph_error(format!(
                    "rank {rank} of group `{}` would run other collectives than rank 0: pass the same step and inputs of \
                     the same shapes on every rank",
                    group.group()
                )));
            }
        }
        Ok(reports)
    }

    /// Has products run together with their collectives, reduces gradients together, and takes the other collectives
    /// apart into start and wait, so that they run beside work that does not depend on them. The last that is done to a
    /// graph: nothing else knows these operations, and one of them may need parameters of several layers, between which
    /// no pipeline can then be cut. At last parameters and gradients are exchanged with the replicas.
    pub(crate) fn schedule(&self, graph: &mut StepGraph, reports: &mut [ShardReport]) {
        for product in fuse_products(graph) {
            let mut over = reports.iter_mut().filter(|report| report.axis == product.axis);
            over.next().into_iter().for_each(|report| report.products.push(product.clone()));
        }
        bucket_reductions(graph, BUCKET_BYTES);
        overlap(graph);
        self.shards.iter().for_each(|shards| shards.apply(graph));
    }
}

/// Splits a captured step in place over axes, each with the rank that is to run it and what the plan says of it.
/// Returns a report for each.
///
/// # Errors
/// [`Error::Plan`] if an input cannot be split as planned; [`Error::Graph`] as [`partition`].
pub(crate) fn split_step(
    graph: &mut StepGraph,
    table: &PlanTable,
    axes: &[(PartitionOptions, AxisPlan)],
) -> Result<Vec<ShardReport>, Error> {
    counter_based_rng(graph);
    pad_by(graph, table)?;
    let mut reports = Vec::new();
    for (index, (options, plan)) in axes.iter().enumerate() {
        let layout = |id| table.row(id).map_or(Layout::Replicated, |row| row.layouts[index]);
        let params: Vec<Layout> = graph.params.iter().map(|param| layout(param.id)).collect();
        let inputs = graph.inputs.iter().map(|input| (input.path.as_str(), input.tensor.shape.as_slice()));
        let inputs = plan.input_layouts(inputs, (&options.axis, options.degree))?;
        let options = PartitionOptions { sequence_dim: plan.sequence_dim(), ..options.clone() };
        let (local, report) = partition(graph, &params, &inputs, &options)?;
        *graph = local;
        reports.push(report);
    }
    Ok(reports)
}

/// Gives the parameters of a graph the dims that they have with padding.
fn pad_by(graph: &mut StepGraph, table: &PlanTable) -> Result<(), Error> {
    let mut larger = Vec::new();
    for (param, binding) in graph.params.iter().enumerate() {
        let Some(row) = table.row(binding.id) else { continue };
        let sizes = row.dims.iter().zip(&row.padded_dims).enumerate();
        let padded = sizes.filter(|(_, (size, padded))| size != padded);
        larger.extend(padded.map(|(dim, (_, size))| Larger { param, dim, size: *size }));
    }
    if !larger.is_empty() {
        *graph = pad(graph, &larger)?;
    }
    Ok(())
}
