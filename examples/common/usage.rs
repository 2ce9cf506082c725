//! What the steps of a training took beside the computation: messages, and idle time in pipelines.

use burn_parallel::comm::Tally;
use burn_parallel::pipeline_parallel::schedule::{Costs, Routes, StageCosts};
use burn_parallel::prelude::*;
use burn_parallel::step::{RunReport, StepCounters};
use serde::Serialize;

/// How a pipeline was used, over all steps.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PipelineUsage {
    /// The share of the time in which ranks of the pipeline did not compute.
    pub idle: f64,
    /// What that share is for stages that take equally long and messages that take no time.
    pub bound: f64,
    /// The most micro-batches that one rank kept something of at once.
    pub peak_activations: usize,
    #[serde(skip)]
    steps: usize,
}

impl PipelineUsage {
    /// Adds a step.
    pub fn add(&mut self, runs: &[RunReport]) {
        for run in runs {
            self.idle = (self.idle * self.steps as f64 + run.idle_share) / (self.steps + 1) as f64;
            self.peak_activations = self.peak_activations.max(run.peak_activations_of_rank);
            self.steps += 1;
        }
    }

    /// How the pipeline of this strategy was used, if it has one.
    pub fn of(mut self, strategy: &Strategy) -> Result<Option<Self>, Error> {
        let Some(config) = strategy.pipeline.as_ref().filter(|_| strategy.pp > 1) else { return Ok(None) };
        let timetable = config.schedule.timetable(strategy.pp, config.micro_batches)?;
        let chain = Routes::chain(timetable.stages());
        self.bound = timetable.simulate(&chain, &Costs::uniform(StageCosts::default()))?.idle_share();
        Ok(Some(self))
    }

    /// Rows of a table: names and values.
    pub fn table(&self, strategy: &Strategy) -> Vec<(String, String)> {
        let Some(config) = &strategy.pipeline else { return Vec::new() };
        let (idle, bound) = (100.0 * self.idle, 100.0 * self.bound);
        vec![
            ("pipeline".into(), format!("{}, {} micro-batches", config.schedule, config.micro_batches)),
            ("idle in the pipeline".into(), format!("{idle:.1} % of the time; ideal {bound:.1} %")),
            ("micro-batches alive at once".into(), self.peak_activations.to_string()),
        ]
    }
}

/// What a rank sends in a step, by what it is for.
pub struct Communication([(&'static str, f64, f64); 6]);

impl Communication {
    /// Of so many steps.
    pub fn of(counters: &StepCounters, steps: usize) -> Self {
        let steps = steps.max(1) as f64;
        let StepCounters { gradients, parameters, control, tensor, pipeline, norm, .. } = counters;
        let purposes = [
            ("gradients", gradients),
            ("control numbers", control),
            ("gathered parameters", parameters),
            ("activations of split layers", tensor),
            ("activations between stages", pipeline),
            ("gradient norm, over parts", norm),
        ];
        Self(purposes.map(|(name, counters)| {
            let Tally { bytes, calls, .. } = counters.total();
            (name, bytes as f64 / steps, calls as f64 / steps)
        }))
    }

    /// Bytes of a step.
    pub fn bytes(&self) -> f64 {
        self.0.iter().map(|(_, bytes, _)| bytes).sum()
    }

    /// Calls of a step.
    pub fn calls(&self) -> f64 {
        self.0.iter().map(|(_, _, calls)| calls).sum()
    }

    /// Rows of a table: names and values.
    pub fn table(&self) -> impl Iterator<Item = (String, String)> {
        // The first two are of every run, if only as zeros.
        let shown = self.0.iter().enumerate().filter(|(place, (_, _, calls))| *place < 2 || *calls > 0.0);
        shown.map(|(_, (name, bytes, calls))| {
            ((*name).to_owned(), format!("{bytes:.0} bytes in {calls:.1} calls, per step and rank"))
        })
    }
}
