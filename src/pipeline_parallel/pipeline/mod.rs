//! The one executor of all schedules.
//!
//! Each rank goes through its row of the timetable. A pass is a call of the stage, with what it needs; a send hands
//! over what the stage gave, and does not wait for the receiver; a receive is posted one pass ahead of its place, so
//! that tensors travel while the rank computes, and is waited for only by the pass that needs it. When a row is done,
//! all ranks add up the loss.

mod exchange;
mod links;
mod report;
mod run;

pub use report::PipelineRun;

use self::run::TimetableRun;
use super::schedule::{PeakActivations, Routes, Timetable, evaluation};
use super::{Stage, stage_error};
use crate::Error;
use crate::comm::Communicator;

/// The stages of all ranks of a group, and the timetable by which they work.
///
/// The caller owns the stages and lends them to every call.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::optim::{ModuleOptimizer, SgdConfig};
/// use burn::tensor::{Device, Tensor};
/// use burn_parallel::pipeline_parallel::schedule::Schedule;
/// use burn_parallel::pipeline_parallel::{EagerStage, Pipeline, Sent};
/// use burn_parallel::prelude::*;
///
/// let losses = launch::threads(2).run(|rank| {
///     let device = rank.device().autodiff();
///     // Two layers, one on each rank; the second one also computes the loss, summed over the rows.
///     let layer = LinearConfig::new(4, 4).init(&device);
///     let mut stage = EagerStage::new(rank.rank(), 2, layer, |layer, rows: &Tensor<2>, mut received| {
///         if received.stage() == 0 {
///             return Ok(Sent::new().to(1, layer.forward(rows.clone())));
///         }
///         let output = layer.forward(received.float::<2>(0)?);
///         Ok(Sent::new().loss_sum(output.powf_scalar(2.0).sum(), rows.dims()[0] as f64))
///     });
///     let timetable = Schedule::OneForwardOneBackward.timetable(2, 4)?;
///     let mut pipeline = Pipeline::new(&rank, timetable, std::slice::from_ref(&stage))?;
///     let mut optim: ModuleOptimizer = SgdConfig::new().init();
///     let mut losses = Vec::new();
///     for _ in 0..3 {
///         let micro_batches = vec![Tensor::<2>::ones([3, 4], &Device::flex()); 4];
///         let run = pipeline.step(std::slice::from_mut(&mut stage), &micro_batches)?;
///         let grads = stage.take_gradients(run.gradient_factor);
///         stage = stage.update(|layer| optim.step(1e-2, layer, grads));
///         losses.push(run.mean_loss());
///     }
///     Ok(losses)
/// })?;
/// assert_eq!(losses[0], losses[1]); // known on every rank
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct Pipeline {
    comm: Communicator,
    timetable: Timetable,
    routes: Routes,
    peak: PeakActivations,
    scale: f64,
    /// The timetable of the last evaluation.
    evaluation: Option<Timetable>,
}

impl Pipeline {
    /// Puts stages together. Collective over `group`: every rank brings the same timetable, and the stages that it
    /// gives to that rank. Sends and receives are added if the timetable has none.
    ///
    /// # Errors
    /// The same on all ranks. [`Error::Schedule`] if the timetable is not [valid](Timetable::validate), is for another
    /// number of ranks, or differs between ranks; [`Error::Pipeline`] if a rank brings other stages, or stages disagree
    /// about what goes from one to the other; the error of the world.
    pub fn new<I, S: Stage<I>>(group: &Communicator, timetable: Timetable, stages: &[S]) -> Result<Self, Error> {
        // A group of its own: its messages and collectives do not mix with others.
        Self::over(group.split_named("pipeline", 0, group.rank() as i64)?, timetable, stages)
    }

    /// [`new`](Self::new) over a group that does nothing else meanwhile: a run leaves no message behind, so pipelines
    /// that run one after the other share it.
    pub(in crate::pipeline_parallel) fn over<I, S: Stage<I>>(
        comm: Communicator,
        timetable: Timetable,
        stages: &[S],
    ) -> Result<Self, Error> {
        let routes = links::agree(&comm, &timetable, stages)?;
        let timetable = if timetable.communicates() { timetable } else { timetable.with_communication(&routes)? };
        let peak = timetable.validate(&routes)?;
        Ok(Self { comm, timetable, routes, peak, scale: 1.0, evaluation: None })
    }

    /// Sets what the gradient of the summed loss is multiplied by where backward begins, the same on every rank.
    /// Default 1; gradients of small float dtypes may need less, for the sum over a micro-batch has larger ones than
    /// the mean.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if it is 0 or not finite.
    pub fn with_scale(mut self, scale: f64) -> Result<Self, Error> {
        if scale == 0.0 || !scale.is_finite() {
            return Err(stage_error(format!("the scale of the loss is {scale}; it must be finite and not 0")));
        }
        self.scale = scale;
        Ok(self)
    }

    /// The timetable, with its sends and receives.
    pub fn timetable(&self) -> &Timetable {
        &self.timetable
    }

    /// Which stages give tensors to which.
    pub fn routes(&self) -> &Routes {
        &self.routes
    }

    /// For how many micro-batches activations are alive at most in a step, as the validator says.
    pub fn peak_activations(&self) -> &PeakActivations {
        &self.peak
    }

    /// Runs the timetable: forwards and backwards of all micro-batches. The gradients are with the stages.
    ///
    /// Every rank brings as many micro-batches as the timetable is for; what they hold is between the rank and its
    /// stages.
    ///
    /// # Errors
    /// The same on all ranks: [`Error::Stage`] if a stage returns an error or panics, or gives other tensors than its
    /// edges say; [`Error::Pipeline`] if a rank brings other stages, or another number of micro-batches; the error of
    /// the world. The stages have then forgotten the step.
    pub fn step<I, S: Stage<I>>(&mut self, stages: &mut [S], micro_batches: &[I]) -> Result<PipelineRun, Error> {
        self.run(&self.timetable, stages, micro_batches)
    }

    /// Runs the forwards alone, of any number of micro-batches, the same on every rank.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluate<I, S: Stage<I>>(&mut self, stages: &mut [S], micro_batches: &[I]) -> Result<PipelineRun, Error> {
        let count = micro_batches.len();
        let counts = self.comm.all_gather(vec![count as u64])?;
        if counts.iter().any(|other| *other != counts[0] || *other == 0) {
            let problem = "every rank must bring the same number of micro-batches, at least 1; they brought";
            return Err(self.comm.fail_with(stage_error(format!("{problem} {counts:?}"))));
        }
        let timetable = self.take_forwards(count)?;
        let run = self.run(&timetable, stages, micro_batches);
        self.evaluation = Some(timetable);
        run
    }

    /// The timetable of the forwards of so many micro-batches.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate).
    pub fn forwards(&mut self, count: usize) -> Result<&Timetable, Error> {
        let timetable = self.take_forwards(count)?;
        Ok(self.evaluation.insert(timetable))
    }

    fn take_forwards(&mut self, count: usize) -> Result<Timetable, Error> {
        if let Some(known) = self.evaluation.take().filter(|timetable| timetable.micro_batches() == count) {
            return Ok(known);
        }
        let forwards = evaluation(self.timetable.stage_ranks(), self.comm.size(), count);
        let full = forwards.and_then(|forwards| forwards.with_communication(&self.routes));
        full.map_err(|error| self.comm.fail_with(error))
    }

    fn run<I, S: Stage<I>>(
        &self,
        timetable: &Timetable,
        stages: &mut [S],
        micro_batches: &[I],
    ) -> Result<PipelineRun, Error> {
        let outcome = TimetableRun::new(&self.comm, (timetable, &self.routes), self.scale, stages, micro_batches)
            .and_then(TimetableRun::finish);
        outcome.map_err(|error| {
            stages.iter_mut().for_each(Stage::discard);
            self.comm.fail_with(error)
        })
    }
}
