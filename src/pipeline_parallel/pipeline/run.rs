//! Runs one rank's row of a timetable.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::exchange::MessageExchange;
use super::report::PipelineRun;
use crate::Error;
use crate::comm::{Communicator, ReduceOp, panic_message};
use crate::pipeline_parallel::schedule::{Action, Routes, Timetable, Unit};
use crate::pipeline_parallel::{Forwarded, LossSum, MicroBatch, Stage, StageMessage, stage_error};
use crate::step::RunReport;
use crate::tensor::PlainTensor;

/// One run of a timetable on one rank.
pub(super) struct TimetableRun<'a, I, S> {
    comm: &'a Communicator,
    timetable: &'a Timetable,
    scale: f64,
    stages: &'a mut [S],
    /// Where each stage of this rank is in `stages`.
    places: HashMap<usize, usize>,
    micro_batches: &'a [I],
    trains: bool,
    exchange: MessageExchange<'a>,
    loss: LossSum,
    /// The weight of the losses of each micro-batch that this rank has computed.
    weights: Vec<f64>,
    outputs: BTreeMap<Unit, Vec<PlainTensor>>,
    report: RunReport,
}

impl<'a, I, S: Stage<I>> TimetableRun<'a, I, S> {
    /// # Errors
    /// [`Error::Pipeline`] if the rank has brought other stages, or another number of micro-batches, than the timetable
    /// has.
    pub fn new(
        comm: &'a Communicator,
        (timetable, routes): (&'a Timetable, &'a Routes),
        scale: f64,
        stages: &'a mut [S],
        micro_batches: &'a [I],
    ) -> Result<Self, Error> {
        let (rank, group) = (comm.rank(), comm.group());
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
            exchange: MessageExchange::new(comm, timetable, routes),
            trains: timetable.trains(),
            loss: LossSum::default(),
            weights: vec![0.0; wanted],
            outputs: BTreeMap::new(),
            report: RunReport::default(),
            comm,
            timetable,
            scale,
            stages,
            places,
            micro_batches,
        })
    }

    /// Runs all actions, and adds up the loss.
    pub fn finish(mut self) -> Result<PipelineRun, Error> {
        let comm = self.comm;
        let (began, before) = (Instant::now(), comm.counters());
        let row = &self.timetable.rows()[comm.rank()];
        for (place, action) in row.iter().enumerate() {
            match *action {
                Action::Send(direction, unit) => {
                    self.exchange.send(unit, direction).map_err(|cause| self.failed(action, cause))?;
                }
                Action::Receive(direction, unit) => self.exchange.post(unit, direction),
                _ => {
                    // Receives up to the next pass are posted now: their tensors may come while this one runs.
                    for ahead in row[place + 1..].iter().take_while(|ahead| !ahead.computes()) {
                        if let Action::Receive(direction, unit) = *ahead {
                            self.exchange.post(unit, direction);
                        }
                    }
                    self.pass(action)?;
                }
            }
        }
        let counters = comm.counters() - before;
        let waits = Instant::now();
        let mut mine = vec![self.loss.sum, self.loss.weight, self.report.busy.as_secs_f64()];
        mine.extend(&self.weights);
        let all = comm.all_reduce(mine, ReduceOp::Sum)?;
        let [sum, weight, busy, ref weights @ ..] = all[..] else {
            return Err(stage_error("the loss came back incomplete"));
        };
        let waited = self.exchange.waited + waits.elapsed();
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
        let gradient_factor = if weight == 0.0 { 0.0 } else { 1.0 / (self.scale * weight) };
        let (loss, weights) = (LossSum { sum, weight }, weights.to_vec());
        Ok(PipelineRun { loss, weights, gradient_factor, outputs: self.outputs, report })
    }

    /// Runs one pass of a stage, with what it takes and gives.
    fn pass(&mut self, action: &Action) -> Result<(), Error> {
        let unit = action.unit();
        let direction = action.direction();
        let received = match direction {
            Some(direction) => self.exchange.take(unit, direction).map_err(|cause| self.failed(action, cause))?,
            None => Vec::new(),
        };
        let began = Instant::now();
        let given = self.call(action, received);
        self.report.busy += began.elapsed();
        let given = given.and_then(|given| match direction {
            Some(direction) => self.exchange.give(unit, direction, given),
            None => Ok(()),
        });
        given.map_err(|cause| self.failed(action, cause))?;
        self.count_live();
        Ok(())
    }

    /// Calls the stage. A panic of it becomes an error.
    fn call(&mut self, action: &Action, received: Vec<StageMessage>) -> Result<Vec<StageMessage>, Error> {
        let unit = action.unit();
        let place = self.places.get(&unit.stage).copied();
        let stage = place.and_then(|place| self.stages.get_mut(place));
        let (Some(stage), Some(input)) = (stage, self.micro_batches.get(unit.micro_batch)) else {
            return Err(stage_error("the timetable has a stage or a micro-batch that this rank has not"));
        };
        let (index, count) = (unit.micro_batch, self.micro_batches.len());
        let micro_batch = MicroBatch { index, count, input, trains: self.trains, scale: self.scale };
        let pass = || match action {
            Action::Forward(_) => stage.forward(micro_batch, received),
            Action::Backward(_) => stage.backward(micro_batch, received).map(Forwarded::of_messages),
            Action::BackwardInput(_) => stage.backward_input(micro_batch, received).map(Forwarded::of_messages),
            Action::BackwardWeight(_) => stage.backward_weight(micro_batch).map(|()| Forwarded::default()),
            Action::Send(..) | Action::Receive(..) => Ok(Forwarded::default()),
        };
        // A stage may be the user's own: what it panics with is printed as well, for its place.
        let given = catch_unwind(AssertUnwindSafe(pass))
            .unwrap_or_else(|panic| Err(stage_error(format!("the stage panicked: {}", panic_message(&*panic)))))?;
        if let Some(LossSum { sum, weight }) = given.loss {
            if !weight.is_finite() || weight < 0.0 {
                return Err(stage_error(format!("the loss has weight {weight}; it must be finite and not negative")));
            }
            self.loss.sum += sum;
            self.loss.weight += weight;
            self.weights[unit.micro_batch] += weight;
        }
        if !given.outputs.is_empty() {
            self.outputs.insert(unit, given.outputs);
        }
        Ok(given.messages)
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
        let comm = self.comm;
        if comm.failure().as_ref() == Some(&cause) {
            return cause;
        }
        let (group, rank) = (comm.group().clone(), comm.rank());
        Error::Stage { group, rank, action: action.to_string(), cause: Box::new(cause) }
    }
}

impl Forwarded {
    fn of_messages(messages: Vec<StageMessage>) -> Self {
        Self { messages, ..Self::default() }
    }
}
