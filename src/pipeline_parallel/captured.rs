//! Captures a step or a forward pass for one kind of batch, and cuts it into stages.

use burn::module::Module;
use burn::tensor::Device;

use super::batch::Batch;
use super::by_rows::divided;
use super::captured_step::{CapturedForward, CapturedStep};
use super::graph_stage::GraphStage;
use super::output_join::OutputJoin;
use super::pipeline::Pipeline;
use super::stage_error;
use super::state::PipelineState;
use super::tied::TiedParams;
use crate::Error;
use crate::comm::Communicator;
use crate::graph::{StepGraph, StepKey, TensorTree, capture_forward, capture_step, counter_based_rng, graph_error};
use crate::params::{FoundParams, one_device};
use crate::partition::ShardReport;
use crate::pipeline_parallel::cut::{CutGraph, StageRun, cut_like, measure_operations};
use crate::step::{ClosureIdentity, StepFn};

impl PipelineState {
    /// Captures and cuts the step for this batch, unless that is done; `local` loses what this rank does not hold, and
    /// its parameters are found anew then.
    pub(super) fn prepare<M, I>(
        &mut self,
        local: &mut Option<M>,
        params: &mut FoundParams,
        inputs: I,
        mut step: StepFn<'_, M, I>,
    ) -> Result<(StepKey, Batch), Error>
    where
        M: Module,
        I: TensorTree + Clone,
    {
        let batch = Batch::new(inputs.clone(), &self.config.whole_inputs, self.config.micro_batches)?;
        let Some(model) = local.take() else { return Err(stage_error("the model was lost in an earlier error")) };
        let signature = self.signature(&model, params, true);
        let model = local.insert(model);
        let mut key = StepKey::new(step.identity, signature?, &inputs)?;
        let (firsts, sizes) = batch.sizes();
        let mut anew = None;
        if step.identity.captures() {
            let graphs = self.capture_all(&self.meta_module(model), &batch, &inputs, &firsts, step.again())?;
            key = key.with_graphs(graphs.iter().map(StepGraph::digest));
            anew = Some(graphs);
            // A capture brings running statistics up to date.
            *params = FoundParams::of(model);
        }
        if self.steps.contains_key(&key) {
            return Ok((key, batch));
        }
        let mut graphs = match anew {
            Some(graphs) => graphs,
            None => self.capture_all(&self.meta_module(model), &batch, &inputs, &firsts, step.again())?,
        };
        for graph in &mut graphs {
            self.shards = self.split_graph(graph)?;
        }
        let cuts = self.cuts(&graphs, local)?;
        let stages = self.stages(&graphs, &cuts, &sizes)?;
        let gradients = cuts[0].stages.iter().flat_map(|stage| &stage.gradients);
        let trained = gradients.map(|(param, _)| graphs[0].params[*param].id).collect();
        let pipeline = Pipeline::over(self.group.clone(), self.timetable.clone(), &stages)?;
        self.steps.insert(key.clone(), CapturedStep { pipeline, stages, trained });
        local.iter().for_each(|local| *params = FoundParams::of(local));
        Ok((key, batch))
    }

    /// The step of each of these micro-batches, before it is split or cut.
    fn capture_all<M, I>(
        &self,
        meta_module: &M,
        batch: &Batch,
        inputs: &I,
        micro_batches: &[usize],
        mut step: StepFn<'_, M, I>,
    ) -> Result<Vec<StepGraph>, Error>
    where
        M: Module,
        I: TensorTree + Clone,
    {
        let capture = |first: &usize| self.capture(meta_module, batch, inputs.clone(), *first, step.again());
        micro_batches.iter().map(capture).collect()
    }

    /// The step of one micro-batch, before it is split or cut.
    fn capture<M, I>(
        &self,
        meta_module: &M,
        batch: &Batch,
        inputs: I,
        micro_batch: usize,
        mut step: StepFn<'_, M, I>,
    ) -> Result<StepGraph, Error>
    where
        M: Module,
        I: TensorTree,
    {
        let rows = batch.rows(micro_batch).len();
        let inputs = batch.structured(inputs, micro_batch)?;
        capture_step(meta_module, inputs, |model: &M, inputs| step.call(model, inputs).over_rows(rows))
            .map_err(|error| batch.told_of(error, micro_batch))
    }

    /// Seconds that each operation of the step takes for the first micro-batch: none is larger.
    pub(super) fn measure<M, I>(
        &self,
        local: &M,
        inputs: I,
        step: StepFn<'_, M, I>,
        runs: usize,
    ) -> Result<Vec<f64>, Error>
    where
        M: Module,
        I: TensorTree + Clone,
    {
        let batch = Batch::new(inputs.clone(), &self.config.whole_inputs, self.config.micro_batches)?;
        self.signature(local, &FoundParams::of(local), false)?;
        let mut graph = self.capture(&self.meta_module(local), &batch, inputs, 0, step)?;
        self.split_graph(&mut graph)?;
        let device = one_device(local, "measure")?.unwrap_or_else(Device::flex);
        measure_operations(&graph, &device, runs)
    }

    /// Captures and cuts the forward for this batch, unless that is done; `local` loses what this rank does not hold.
    pub(super) fn prepare_forward<M, I, F, O>(
        &mut self,
        local: &mut Option<M>,
        inputs: I,
        mut forward: F,
    ) -> Result<(&mut CapturedForward<O>, Batch), Error>
    where
        M: Module,
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> O,
        O: TensorTree + Clone + Send + 'static,
    {
        let rows = Batch::new(inputs.clone(), &self.config.whole_inputs, 1)?.rows(0).len();
        let count = self.config.micro_batches.min(rows);
        let batch = Batch::new(inputs.clone(), &self.config.whole_inputs, count)?;
        let Some(model) = local.take() else { return Err(stage_error("the model was lost in an earlier error")) };
        let signature = self.signature(&model, &FoundParams::of(&model), false);
        let model = local.insert(model);
        let identity = ClosureIdentity::of::<F>();
        let mut key = StepKey::new(identity, signature?, &inputs)?;
        let (firsts, sizes) = batch.sizes();
        let capture = |meta_module: &M, forward: &mut F| {
            let of = |first: &usize| {
                let inputs = batch.structured(inputs.clone(), *first)?;
                capture_forward(meta_module, inputs, &mut *forward).map_err(|error| batch.told_of(error, *first))
            };
            firsts.iter().map(of).collect::<Result<Vec<_>, Error>>()
        };
        let mut anew = None;
        if identity.captures() {
            let captured = capture(&self.meta_module(model), &mut forward)?;
            key = key.with_graphs(captured.iter().map(|captured| captured.graph.digest()));
            anew = Some(captured);
        }
        if !self.forwards.contains_key(&key) {
            let meta_module = self.meta_module(model);
            let mut captured = match anew {
                Some(captured) => captured,
                None => capture(&meta_module, &mut forward)?,
            };
            let parts: Vec<StepGraph> = captured.iter().map(|captured| captured.graph.clone()).collect();
            let whole = match sizes.as_slice() {
                [_] => parts[0].clone(),
                _ => capture_forward(&meta_module, inputs.clone(), &mut forward)?.graph,
            };
            let outputs = 0..parts[0].outputs.len();
            let joined =
                outputs.map(|place| OutputJoin::of(&whole, &parts, &sizes, place)).collect::<Result<_, _>>()?;
            for captured in &mut captured {
                self.shards = self.split_graph(&mut captured.graph)?;
            }
            let graphs: Vec<StepGraph> = captured.iter().map(|captured| captured.graph.clone()).collect();
            let cuts = self.cuts(&graphs, local)?;
            let stages = self.stages(&graphs, &cuts, &sizes)?;
            let giver = |place: usize| {
                cuts[0].stages.iter().position(|stage| stage.outputs.iter().any(|(output, _)| *output == place))
            };
            let givers = (0..graphs[0].outputs.len()).map(|place| giver(place).unwrap_or(0)).collect();
            let pipeline = Pipeline::over(self.group.clone(), self.timetable.clone(), &stages)?;
            let forward = CapturedForward { pipeline, stages, graphs: captured, sizes, givers, joined };
            self.forwards.insert(key.clone(), Box::new(forward));
        }
        let forward = self.forwards.get_mut(&key).and_then(|forward| forward.downcast_mut());
        Ok((forward.ok_or_else(|| graph_error("a closure of one type gave outputs of two types"))?, batch))
    }

    fn split_graph(&self, graph: &mut StepGraph) -> Result<Vec<ShardReport>, Error> {
        match &self.split {
            Some(split) => split.apply(graph),
            None => {
                counter_based_rng(graph);
                Ok(Vec::new())
            }
        }
    }

    /// Cuts graphs of one step for micro-batches of different sizes. The first time ever it is decided who holds what,
    /// and `local` loses the rest.
    fn cuts<M: Module>(&mut self, graphs: &[StepGraph], local: &mut Option<M>) -> Result<Vec<CutGraph>, Error> {
        let stages = self.timetable.stages();
        let homes = |graph: &StepGraph| match (&self.cut, &self.holders) {
            (Some(_), Some(holders)) => {
                Ok(graph.params.iter().map(|param| holders.get(&param.id).map_or(0, |stages| stages[0])).collect())
            }
            _ => self.config.cut.homes(graph, stages),
        };
        let homes = homes(&graphs[0])?;
        let mut cuts: Vec<CutGraph> = Vec::with_capacity(graphs.len());
        for graph in graphs {
            let cut = cut_like(graph, &homes, stages, cuts.first())?;
            cuts.push(cut);
        }
        let mine: Vec<u64> = cuts.iter().map(CutGraph::fingerprint).collect();
        agree(
            &mine,
            &self.group,
            "cut the step in another way than rank 0: bring the same model and inputs of the same shapes",
        )?;
        if let Some(split) = &self.split {
            for group in split.groups() {
                agree(&mine, group, "cut its part of the step in another way than rank 0")?;
            }
        }
        if self.cut.is_none() {
            self.check_early_moments(&graphs[0], &cuts[0])?;
            let params = graphs[0].params.iter().map(|param| param.id);
            self.holders = Some(params.zip(cuts[0].holders.iter().cloned()).collect());
            self.tied_params = TiedParams::new(&graphs[0], &cuts[0], self.timetable.stage_ranks(), &self.group)?;
            if let Some(shards) = &self.row_shards {
                self.tied_params.divide(&|id| shards.shard_dims(id));
            }
            self.cut = cuts.first().cloned();
            if let Some(model) = local.take() {
                let held = self.hold(model);
                *local = Some(self.share(held)?);
            }
        }
        graphs.iter().zip(&cuts).try_for_each(|(graph, cut)| self.check_holders(graph, cut))?;
        Ok(cuts)
    }

    /// Demands that no other rank needs moments that were restored on those of their own stages alone. The same on all
    /// ranks.
    fn check_early_moments(&self, graph: &StepGraph, cut: &CutGraph) -> Result<(), Error> {
        let stage_ranks = self.timetable.stage_ranks();
        for (param, stages) in graph.params.iter().zip(&cut.holders) {
            let elsewhere = stages.iter().any(|stage| stage_ranks[*stage] != stage_ranks[stages[0]]);
            if elsewhere && self.early_moments.contains(&param.id) {
                return Err(stage_error(format!(
                    "stages {stages:?} share parameter `{}`, of which an optimizer was restored before that was known, and so on the \
                     first of them alone: wrap the model anew, and `prepare` it before the optimizer is restored",
                    param.path
                )));
            }
        }
        Ok(())
    }

    /// Demands that no stage needs a parameter that it has dropped.
    fn check_holders(&self, graph: &StepGraph, cut: &CutGraph) -> Result<(), Error> {
        for (param, stages) in graph.params.iter().zip(&cut.holders) {
            let held = self.holders.as_ref().and_then(|holders| holders.get(&param.id)).map_or(&[][..], Vec::as_slice);
            if let Some(stage) = stages.iter().find(|stage| !held.contains(stage)) {
                return Err(stage_error(format!(
                    "this step needs parameter `{}` on stage {stage}, but the first step, by which the model was cut, left \
                     it to {held:?}",
                    param.path
                )));
            }
        }
        Ok(())
    }

    /// This rank's stages.
    fn stages(&self, graphs: &[StepGraph], cuts: &[CutGraph], sizes: &[usize]) -> Result<Vec<GraphStage>, Error> {
        let mut stages = Vec::new();
        for index in self.timetable.stages_of(self.group.rank()) {
            let run = |(graph, cut): (&StepGraph, &CutGraph)| match &self.row_shards {
                Some(shards) => {
                    let (graph, part) = divided(graph, &cut.stages[index], shards);
                    StageRun::new(&graph, part, self.ops.clone())
                }
                None => StageRun::new(graph, cut.stages[index].clone(), self.ops.clone()),
            };
            let runs = graphs.iter().zip(cuts).map(run);
            let stage = GraphStage::new(index, runs.collect::<Result<_, _>>()?, sizes.to_vec());
            stages.push(stage.divided(self.row_shards.clone()));
        }
        Ok(stages)
    }
}

/// Demands the same numbers of all ranks.
fn agree(mine: &[u64], group: &Communicator, problem: &str) -> Result<(), Error> {
    let all = group.all_gather(mine.to_vec())?;
    match all.chunks(mine.len().max(1)).position(|theirs| theirs != &all[..mine.len()]) {
        None => Ok(()),
        Some(rank) => Err(graph_error(format!("rank {rank} of group `{}` {problem}", group.group()))),
    }
}

#[cfg(test)]
mod tests;
