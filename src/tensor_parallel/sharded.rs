//! A model of which each rank holds a part, trained through its captured step.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};

use super::distribute::{agree, assemble, distribute, outline};
use crate::Error;
use crate::comm::{Communicator, Counters};
use crate::graph::shard::{PartitionOptions, ShardReport, fold_reductions, overlap, partition, register_collectives};
use crate::graph::{
    CustomOps, GraphCache, GraphInputs, GraphTensor, RandomSource, StepGraph, StepLoss, counted_random,
    register_counted_random,
};
use crate::layout::Layout;
use crate::plan::{Plan, PlanTable};

/// What the axis over which steps are split is called in graphs.
const AXIS: &str = "tp";
/// Gradients that are reduced together.
const BUCKET_BYTES: usize = 4 << 20;

/// A model split over a group: a burn [`Module`] with the paths and ids of the model and this rank's parts of its
/// parameters, so optimizers, records and visitors take it as they take the model. Its own `forward` makes no sense on
/// parts; [`step`](Self::step) runs it.
///
/// Optimizers that look at whole parameters or at all of them (norm clipping, Muon, LAMB) see parts only; element-wise ones
/// as AdamW train exactly as on one device.
#[derive(Clone)]
pub struct Sharded<M> {
    local: M,
    table: Arc<PlanTable>,
    group: Communicator,
    engine: Arc<Mutex<Engine>>,
}

struct Engine {
    graphs: GraphCache,
    report: Arc<Mutex<ShardReport>>,
    random: RandomSource,
}

/// What [`Sharded::step`] gives.
#[derive(Debug)]
pub struct Step {
    /// The loss that one device would compute, on every rank; on Flex without autodiff.
    pub loss: Tensor<1>,
    /// The gradients of this rank's parts, for burn's optimizers.
    pub grads: GradientsParams,
    /// The extra outputs of the loss closure, whole on every rank.
    pub outputs: Vec<GraphTensor>,
}

impl<M: Module> Sharded<M> {
    pub(super) fn new(model: M, group: &Communicator, plan: &Plan) -> Result<Self, Error> {
        let table = plan.table(&model, group.size())?;
        agree(&table, group)?;
        // Collectives of steps are counted by themselves.
        let group = group.split(0, group.rank() as i64)?;
        let local = if group.size() == 1 { model } else { distribute(model, &table, &group)? };
        let table = Arc::new(table);

        let report = Arc::<Mutex<ShardReport>>::default();
        let mut ops = CustomOps::new();
        register_collectives(&mut ops, AXIS, &group);
        let pass = {
            let (plan, table, group, report) = (plan.clone(), table.clone(), group.clone(), report.clone());
            move |graph: &mut StepGraph| {
                *lock(&report) = split(graph, &plan, &table, &group)?;
                Ok(())
            }
        };
        let random = RandomSource::new(0);
        register_counted_random(&mut ops, &random);
        let engine = Engine { graphs: GraphCache::new(ops, pass), report, random };
        Ok(Self { local, table, group, engine: Arc::new(Mutex::new(engine)) })
    }

    /// This rank's part of the model.
    pub fn local(&self) -> &M {
        &self.local
    }

    /// Every parameter with its layout.
    pub fn table(&self) -> &PlanTable {
        &self.table
    }

    /// What the last captured step was given in collectives, and what of it could not be split.
    pub fn report(&self) -> ShardReport {
        lock(&lock(&self.engine).report).clone()
    }

    /// What steps have communicated on this rank so far, with the distribution of the parameters and the comparisons.
    pub fn counters(&self) -> Counters {
        self.group.counters()
    }

    /// The whole model, on every rank. Collective.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub fn assemble(&self) -> Result<M, Error> {
        match self.group.size() {
            1 => Ok(self.local.clone()),
            _ => assemble(self.local.clone(), &self.table, &self.group),
        }
    }

    /// Runs a training step: `loss` on `inputs`, forward and backward.
    ///
    /// `loss` sees the model with the dims that it has as a whole. It is recorded when inputs of these shapes come for the
    /// first time, as [`graph`](crate::graph) tells, which also says what cannot be; later it is not called again.
    /// Collective: every rank passes the same whole inputs.
    ///
    /// # Errors
    /// [`Error::Graph`] if the step cannot be recorded; [`Error::Plan`] if an input cannot be split
    /// as planned; those of [`Communicator`].
    pub fn step<I, F, R>(&mut self, inputs: I, loss: F) -> Result<Step, Error>
    where
        I: GraphInputs + Clone,
        F: FnOnce(&M, I) -> R,
        R: StepLoss,
    {
        let whole = outline(&self.local, &self.table);
        let mut engine = lock(&self.engine);
        let executor = engine.graphs.executor(&whole, &inputs, loss)?;
        let result = executor.step(&self.local, inputs)?;
        engine.random.advance();
        Ok(Step { loss: result.loss, grads: result.gradients, outputs: result.outputs })
    }
}

/// Splits a captured step, and makes sure that all ranks got the same collectives.
fn split(graph: &mut StepGraph, plan: &Plan, table: &PlanTable, group: &Communicator) -> Result<ShardReport, Error> {
    let degree = group.size();
    counted_random(graph);
    let layout = |id| table.row(id).map_or(Layout::Replicated, |row| row.layout);
    let params: Vec<Layout> = graph.params.iter().map(|param| layout(param.id)).collect();
    let inputs = graph.inputs.iter().map(|input| (input.path.as_str(), input.tensor.shape.as_slice()));
    let inputs = plan.input_layouts(inputs, degree)?;
    let (local, report) = partition(graph, &params, &inputs, &PartitionOptions::new(AXIS, degree, group.rank()))?;
    *graph = local;
    fold_reductions(graph, BUCKET_BYTES);
    overlap(graph);
    let fingerprints = group.all_gather(vec![graph.collective_fingerprint()])?;
    match fingerprints.iter().position(|fingerprint| *fingerprint != fingerprints[0]) {
        None => Ok(report),
        Some(rank) => {
            let problem = format!(
                "rank {rank} of group `{}` would run other collectives than rank 0: pass the same step and inputs of the \
                 same shapes on every rank",
                group.group()
            );
            Err(Error::Graph { problem })
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M: fmt::Debug> fmt::Debug for Sharded<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sharded").field("local", &self.local).field("group", &self.group).finish()
    }
}

impl<M: fmt::Display> fmt::Display for Sharded<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.local.fmt(f)
    }
}

impl<M: Module> Module for Sharded<M> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.local.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self { local: self.local.fork(device), ..self }
    }

    fn to_device(self, device: &Device) -> Self {
        Self { local: self.local.to_device(device), ..self }
    }

    fn train(self) -> Self {
        Self { local: self.local.train(), ..self }
    }

    fn valid(&self) -> Self {
        Self { local: self.local.valid(), ..self.clone() }
    }

    fn materialize(self) -> Self {
        Self { local: self.local.materialize(), ..self }
    }

    fn visit<Visitor: ModuleVisitor>(&self, visitor: &mut Visitor) {
        self.local.visit(visitor);
    }

    fn map<Mapper: ModuleMapper>(self, mapper: &mut Mapper) -> Self {
        Self { local: self.local.map(mapper), ..self }
    }
}
