//! The one executor of all schedules.
//!
//! Each rank goes through its row of the timetable. A pass is a call of the stage, with what it needs; a send hands over what
//! the stage gave, and does not wait for the receiver; a receive is posted one pass ahead of its place, so that tensors
//! travel while the rank computes, and is waited for only by the pass that needs it. When a row is done, all ranks add up the
//! loss.

mod links;
mod mail;
mod report;

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

pub use report::{PipelineRun, RunReport};

use self::mail::Mail;
use super::schedule::{Action, PeakActivations, Routes, Timetable, Unit, evaluation};
use super::stage::{Forwarded, LossSum, MicroBatch, Stage};
use super::{Parcel, stage_error};
use crate::Error;
use crate::comm::{Communicator, ReduceOp, panic_message};
use crate::graph::GraphTensor;

/// The stages of all ranks of a group, and the timetable by which they work.
///
/// The stages themselves stay with whoever owns the model; every call gets them lent.
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
    /// Puts stages together. Collective over `group`: every rank brings the same timetable, and the stages that it gives to
    /// that rank. Sends and receives are added if the timetable has none.
    ///
    /// # Errors
    /// The same on all ranks. [`Error::Schedule`] if the timetable is not [valid](Timetable::validate), is for another number
    /// of ranks, or differs between ranks; [`Error::Pipeline`] if a rank brings other stages, or stages disagree about what
    /// goes from one to the other; the error of the world.
    pub fn new<I, S: Stage<I>>(group: &Communicator, timetable: Timetable, stages: &[S]) -> Result<Self, Error> {
        // A group of its own: its messages and collectives mix with nobody else's.
        let comm = group.split_named("pipeline", 0, group.rank() as i64)?;
        let routes = links::agree(&comm, &timetable, stages)?;
        let timetable = if timetable.communicates() { timetable } else { timetable.with_communication(&routes)? };
        let peak = timetable.validate(&routes)?;
        Ok(Self { comm, timetable, routes, peak, scale: 1.0, evaluation: None })
    }

    /// Sets what the gradient of the summed loss is multiplied by where backward begins, the same on every rank. Default 1;
    /// gradients of small float dtypes may need less, for the sum over a micro-batch has larger ones than the mean.
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
    /// Every rank brings as many micro-batches as the timetable is for; what they hold is between the rank and its stages.
    ///
    /// # Errors
    /// The same on all ranks: [`Error::Stage`] if a stage returns an error or panics, or gives other tensors than its edges
    /// say; [`Error::Pipeline`] if a rank brings other stages, or another number of micro-batches; the error of the world.
    /// The stages have then forgotten the step.
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
            return Err(self.fail(stage_error(format!("{problem} {counts:?}"))));
        }
        let known = self.evaluation.take().filter(|timetable| timetable.micro_batches() == count);
        let timetable = match known {
            Some(timetable) => timetable,
            None => {
                let forwards = evaluation(self.timetable.stage_ranks(), self.comm.size(), count);
                let full = forwards.and_then(|forwards| forwards.with_communication(&self.routes));
                full.map_err(|error| self.fail(error))?
            }
        };
        let run = self.run(&timetable, stages, micro_batches);
        self.evaluation = Some(timetable);
        run
    }

    fn run<I, S: Stage<I>>(
        &self,
        timetable: &Timetable,
        stages: &mut [S],
        micro_batches: &[I],
    ) -> Result<PipelineRun, Error> {
        let outcome = Run::new(self, timetable, stages, micro_batches).and_then(Run::finish);
        outcome.map_err(|error| {
            stages.iter_mut().for_each(Stage::discard);
            self.fail(error)
        })
    }

    /// Fails the world, unless it has failed, and returns its error.
    fn fail(&self, error: Error) -> Error {
        self.comm.fail(error.clone());
        self.comm.failure().unwrap_or(error)
    }
}

/// One run of a timetable on one rank.
struct Run<'a, I, S> {
    pipeline: &'a Pipeline,
    timetable: &'a Timetable,
    stages: &'a mut [S],
    /// Where each stage of this rank is in `stages`.
    places: HashMap<usize, usize>,
    micro_batches: &'a [I],
    trains: bool,
    mail: Mail<'a>,
    loss: LossSum,
    outputs: BTreeMap<Unit, Vec<GraphTensor>>,
    report: RunReport,
}

impl<'a, I, S: Stage<I>> Run<'a, I, S> {
    fn new(
        pipeline: &'a Pipeline,
        timetable: &'a Timetable,
        stages: &'a mut [S],
        micro_batches: &'a [I],
    ) -> Result<Self, Error> {
        let (rank, group) = (pipeline.comm.rank(), pipeline.comm.group());
        let (brought, wanted) = (micro_batches.len(), timetable.micro_batches());
        if brought != wanted {
            return Err(stage_error(format!(
                "rank {rank} of group `{group}` brought {brought} micro-batches, and the timetable is for {wanted}"
            )));
        }
        let places: HashMap<usize, usize> =
            stages.iter().enumerate().map(|(place, stage)| (stage.index(), place)).collect();
        let expected = timetable.stages_of(rank);
        if places.len() != expected.len() || expected.iter().any(|stage| !places.contains_key(stage)) {
            let held: Vec<usize> = stages.iter().map(Stage::index).collect();
            return Err(stage_error(format!(
                "rank {rank} of group `{group}` brought the stages {held:?}, and the timetable gives it {expected:?}"
            )));
        }
        Ok(Self {
            mail: Mail::new(&pipeline.comm, timetable, &pipeline.routes),
            trains: timetable.trains(),
            loss: LossSum::default(),
            outputs: BTreeMap::new(),
            report: RunReport::default(),
            pipeline,
            timetable,
            stages,
            places,
            micro_batches,
        })
    }

    fn finish(mut self) -> Result<PipelineRun, Error> {
        let comm = &self.pipeline.comm;
        let (began, before) = (Instant::now(), comm.counters());
        let row = &self.timetable.rows()[comm.rank()];
        for (place, action) in row.iter().enumerate() {
            match *action {
                Action::Send(direction, unit) => {
                    self.mail.send(unit, direction).map_err(|cause| self.failed(action, cause))?;
                }
                Action::Receive(direction, unit) => self.mail.post(unit, direction),
                _ => {
                    // Receives up to the next pass are posted now: their tensors may come while this one runs.
                    for ahead in row[place + 1..].iter().take_while(|ahead| !ahead.computes()) {
                        if let Action::Receive(direction, unit) = *ahead {
                            self.mail.post(unit, direction);
                        }
                    }
                    self.pass(action)?;
                }
            }
        }
        let counters = comm.counters() - before;
        let waits = Instant::now();
        let mine = vec![self.loss.sum, self.loss.weight, self.report.busy.as_secs_f64()];
        let [sum, weight, busy] = comm.all_reduce(mine, ReduceOp::Sum)?[..] else {
            return Err(stage_error("the loss came back incomplete"));
        };
        let waited = self.mail.waited + waits.elapsed();
        let elapsed = began.elapsed();
        let total = comm.size() as f64 * elapsed.as_secs_f64();
        let report = RunReport {
            actions: row.len(),
            elapsed,
            waited,
            idle_share: if total > 0.0 { (1.0 - busy / total).max(0.0) } else { 0.0 },
            counters,
            ..self.report
        };
        let gradient_factor = if weight == 0.0 { 0.0 } else { 1.0 / (self.pipeline.scale * weight) };
        Ok(PipelineRun { loss: LossSum { sum, weight }, gradient_factor, outputs: self.outputs, report })
    }

    /// Runs one pass of a stage, with what it takes and gives.
    fn pass(&mut self, action: &Action) -> Result<(), Error> {
        let unit = action.unit();
        let direction = action.direction();
        let received = match direction {
            Some(direction) => self.mail.take(unit, direction).map_err(|cause| self.failed(action, cause))?,
            None => Vec::new(),
        };
        let began = Instant::now();
        let given = self.call(action, received);
        self.report.busy += began.elapsed();
        let given = given.and_then(|given| match direction {
            Some(direction) => self.mail.give(unit, direction, given),
            None => Ok(()),
        });
        given.map_err(|cause| self.failed(action, cause))?;
        self.count_live();
        Ok(())
    }

    /// Calls the stage. A panic of it becomes an error.
    fn call(&mut self, action: &Action, received: Vec<Parcel>) -> Result<Vec<Parcel>, Error> {
        let unit = action.unit();
        let place = self.places.get(&unit.stage).copied();
        let stage = place.and_then(|place| self.stages.get_mut(place));
        let (Some(stage), Some(input)) = (stage, self.micro_batches.get(unit.micro_batch)) else {
            return Err(stage_error("the timetable has a stage or a micro-batch that this rank has not"));
        };
        let (index, count) = (unit.micro_batch, self.micro_batches.len());
        let micro_batch = MicroBatch { index, count, input, trains: self.trains, scale: self.pipeline.scale };
        let pass = || match action {
            Action::Forward(_) => stage.forward(micro_batch, received),
            Action::Backward(_) => stage.backward(micro_batch, received).map(Forwarded::of_parcels),
            Action::BackwardInput(_) => stage.backward_input(micro_batch, received).map(Forwarded::of_parcels),
            Action::BackwardWeight(_) => stage.backward_weight(micro_batch).map(|()| Forwarded::default()),
            Action::Send(..) | Action::Receive(..) => Ok(Forwarded::default()),
        };
        let given = catch_unwind(AssertUnwindSafe(pass))
            .unwrap_or_else(|panic| Err(stage_error(format!("the stage panicked: {}", panic_message(&*panic)))))?;
        if let Some(LossSum { sum, weight }) = given.loss {
            if !weight.is_finite() || weight < 0.0 {
                return Err(stage_error(format!("the loss has weight {weight}; it must be finite and not negative")));
            }
            self.loss.sum += sum;
            self.loss.weight += weight;
        }
        if !given.outputs.is_empty() {
            self.outputs.insert(unit, given.outputs);
        }
        Ok(given.parcels)
    }

    fn count_live(&mut self) {
        let mut total = 0;
        for stage in self.stages.iter() {
            let live = stage.live();
            total += live;
            let peak = self.report.peak_activations.entry(stage.index()).or_default();
            *peak = live.max(*peak);
        }
        self.report.peak_activations_of_rank = total.max(self.report.peak_activations_of_rank);
    }

    /// The error of an action of this rank; that of the world stays as it is.
    fn failed(&self, action: &Action, cause: Error) -> Error {
        let comm = &self.pipeline.comm;
        if comm.failure().as_ref() == Some(&cause) {
            return cause;
        }
        let (group, rank) = (comm.group().clone(), comm.rank());
        Error::Stage { group, rank, action: action.to_string(), cause: Box::new(cause) }
    }
}

impl Forwarded {
    fn of_parcels(parcels: Vec<Parcel>) -> Self {
        Self { parcels, ..Self::default() }
    }
}
