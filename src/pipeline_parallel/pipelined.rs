//! A model of which each rank holds some stages, trained through its captured step.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::module::Module;
use burn::tensor::Device;

use super::PipelineConfig;
use super::engine::Engine;
use super::pipeline::RunReport;
use super::schedule::Timetable;
use crate::Error;
use crate::comm::{Communicator, Counters};
use crate::distribution::ModelSplit;
use crate::graph::{GraphInputs, StepLoss, read_params};
use crate::params::{self, SliceSource, one_device};
use crate::pipeline_parallel::cut::CutReport;
use crate::tensor::PlainTensor;

/// A model cut into the stages of a pipeline: a burn [`Module`] with the paths and ids of the model, in which the
/// parameters of other ranks' stages have no elements. Optimizers, records and visitors take it as they take the model. Its
/// own `forward` makes no sense on one rank; [`step`](Self::step) runs it.
///
/// A record of another run is loaded into the model before it is wrapped: the parameters take the ids of the record then, by which
/// optimizers know them. [`load`](Self::load) reads values alone.
///
/// Optimizers that look at all parameters (norm clipping) see those of this rank only; element-wise ones as AdamW train
/// exactly as on one device. Running statistics of batch norms are kept up to date on the rank of their stage, and take a
/// step for each micro-batch.
#[derive(Clone)]
pub struct Pipelined<M> {
    pub(super) local: M,
    pub(super) group: Communicator,
    pub(super) engine: Arc<Mutex<Engine>>,
    pub(super) last: Option<RunReport>,
}

impl<M: Module> Pipelined<M> {
    pub(crate) fn new(
        model: M,
        split: Option<ModelSplit>,
        group: &Communicator,
        config: PipelineConfig,
    ) -> Result<Self, Error> {
        let engine = Engine::new(&model, split, group, config)?;
        let local = engine.hold(model);
        Ok(Self { local, group: engine.group.clone(), engine: Arc::new(Mutex::new(engine)), last: None })
    }

    /// This rank's part of the model.
    pub fn local(&self) -> &M {
        &self.local
    }

    /// Who does what when.
    pub fn timetable(&self) -> Timetable {
        lock(&self.engine).timetable.clone()
    }

    /// What each stage has, and what crosses between them; `None` before the model is cut.
    pub fn report(&self) -> Option<CutReport> {
        lock(&self.engine).cut.as_ref().map(|cut| cut.report.clone())
    }

    /// Whether it is known which rank holds what, and the rest is dropped.
    pub fn is_cut(&self) -> bool {
        lock(&self.engine).holders.is_some()
    }

    /// How many captured steps and forwards there are, see [`PipelineConfig::graphs`].
    pub fn graphs(&self) -> usize {
        let engine = lock(&self.engine);
        engine.steps.len() + engine.forwards.len()
    }

    /// What the last step took on this rank.
    pub fn last_run(&self) -> Option<&RunReport> {
        self.last.as_ref()
    }

    /// What the steps so far have sent from stage to stage on this rank, and, if the model is split as well, what its parts
    /// have communicated.
    pub fn counters(&self) -> Counters {
        let engine = lock(&self.engine);
        let split = engine.split.iter().flat_map(ModelSplit::groups).map(Communicator::counters);
        split.fold(engine.sent.clone(), |sum, counters| sum + counters)
    }

    /// Demands that the ranks of a group along another axis hold the same parts, if the model is split as well.
    ///
    /// # Errors
    /// Those of [`ModelSplit::same_parts`].
    pub(crate) fn same_parts(&self, group: &Communicator) -> Result<(), Error> {
        let split = lock(&self.engine).split.clone();
        split.map_or(Ok(()), |split| split.same_parts(group))
    }

    /// Has steps draw the random numbers of replica number `replica` of this pipeline.
    pub(crate) fn draw_as(&self, replica: usize) {
        lock(&self.engine).random.set_replica(replica as u64);
    }

    /// The number of the micro-batch whose random numbers are drawn next: how many this model has trained on. Part of a
    /// checkpoint, with the seed of the [`PipelineConfig`].
    pub fn random_step(&self) -> u64 {
        lock(&self.engine).random.step()
    }

    /// Has the next step draw random numbers from those of micro-batch number `step` on: when training goes on from a
    /// checkpoint, or with a model that is wrapped anew, as after [`assemble`](Self::assemble), which then draws what it would
    /// have drawn. The same on every rank; shared by all clones.
    pub fn set_random_step(&self, step: u64) {
        lock(&self.engine).random.set_step(step);
    }

    /// The whole model, on every rank. Collective.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    pub fn assemble(&self) -> Result<M, Error> {
        let engine = lock(&self.engine);
        let whole = match engine.homes() {
            // Every rank still has everything.
            None => self.local.clone(),
            Some(homes) => {
                let device = one_device(&self.local, "assemble")?.unwrap_or_else(Device::flex);
                let mut values = HashMap::new();
                for (row, home) in homes {
                    let own = match home == self.group.rank() {
                        true => read_params(&self.local, &[row.id].into())?.remove(&row.id),
                        false => None,
                    };
                    let nothing = || PlainTensor::zeros(row.dims.clone(), row.dtype, &device);
                    values.insert(row.id, self.group.broadcast(own.unwrap_or_else(nothing), home)?);
                }
                params::put(self.local.clone(), values)
            }
        };
        match &engine.split {
            Some(split) => split.assemble(&whole),
            None => Ok(whole),
        }
    }

    /// Gives all parameters the values that a store has under their paths. Each rank asks for what its stages hold only, and
    /// lazy parameters are never made: so a model is loaded that no rank could hold. Not collective; every rank has the same
    /// store.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if the model is not cut yet: [`prepare`](Self::prepare) it, or cut it by paths;
    /// [`Error::InvalidArgument`] if the source lacks a parameter, or has it with other dims than the whole one has; those
    /// of the source.
    pub fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error> {
        let local = lock(&self.engine).load(self.local.clone(), source)?;
        Ok(Self { local, ..self })
    }

    /// Seconds that each operation of this step takes on this rank alone, for [`Cut::Measured`](crate::pipeline_parallel::cut::Cut): where
    /// an operation takes much longer or shorter than its shapes let one expect, stages are balanced better by this. `inputs`
    /// are those of [`step`](Self::step), `runs` is how often each operation runs. Nothing is cut, no parameter is made; see
    /// [`measure_operations`](crate::pipeline_parallel::cut::measure_operations).
    ///
    /// All ranks that cut the same step, those of replicas too, must be given the costs of one of them:
    ///
    /// ```
    /// # use burn::nn::LinearConfig;
    /// # use burn::prelude::*;
    /// # use burn_parallel::prelude::*;
    /// # launch::threads(2).run(|rank| {
    /// # let device = rank.device().autodiff();
    /// # let model: Vec<_> = (0..4).map(|_| LinearConfig::new(8, 8).init(&device)).collect();
    /// # let batch = Tensor::<2>::ones([16, 8], &device);
    /// # let loss = |model: &Vec<burn::nn::Linear>, rows: Tensor<2>| model.iter().fold(rows, |x, l| l.forward(x)).mean();
    /// let config = PipelineConfig::new(4);
    /// let costs = model.clone().pipeline_parallel(&rank, config.clone())?.measure(batch.clone(), loss, 5)?;
    /// let costs = rank.broadcast(costs, 0)?; // `rank` is the world
    /// let mut model = model.pipeline_parallel(&rank, config.with_cut(Cut::Measured(costs)))?;
    /// model.step(batch, loss)?;
    /// # Ok(())
    /// # })?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// Collective only if the model is split as well: over the groups of the split.
    ///
    /// # Errors
    /// [`Error::Graph`] if the step cannot be recorded; [`Error::Pipeline`] if the inputs cannot be divided.
    pub fn measure<I, F, R>(&self, inputs: I, mut loss: F, runs: usize) -> Result<Vec<f64>, Error>
    where
        I: GraphInputs + Clone,
        F: FnMut(&M, I) -> R,
        R: StepLoss,
    {
        lock(&self.engine).measure(&self.local, inputs, &mut loss, runs)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
