//! What came of a training in figures, as one rank saw it.

use std::collections::BTreeMap;
use std::time::Duration;

use burn_parallel::prelude::*;
use burn_parallel::step::StepCounters;
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use serde::Serialize;

use super::memory::Memory;
use super::mesh::Axes;
use super::progress::Seconds;
use super::usage::{Communication, PipelineUsage};

/// What came of a training.
#[derive(Clone, Debug)]
pub struct Figures {
    /// How many steps this run has made, after those of the checkpoint that it went on from.
    pub steps: usize,
    /// The loss of each step over the whole batch; those of the checkpoint too.
    pub losses: Vec<f64>,
    /// The norm of each step's gradient before it was clipped, if it was measured.
    pub grad_norms: Vec<f64>,
    /// The tokens of the steps of this run, over all ranks.
    pub tokens: usize,
    /// The time that the steps took.
    pub elapsed: Duration,
    /// What each step of this run took.
    pub seconds: Seconds,
    /// What the rank communicated in all steps.
    pub counters: StepCounters,
    /// How the pipeline was used, if the layers are on several ranks.
    pub pipeline: Option<PipelineUsage>,
    /// What this rank held after the last step.
    pub memory: Memory,
}

/// The figures as JSON.
#[derive(Serialize)]
pub struct Json<'a> {
    losses: &'a [f64],
    #[serde(skip_serializing_if = "<[f64]>::is_empty")]
    grad_norms: &'a [f64],
    tokens_per_second: f64,
    seconds_to_first_step: f64,
    step_seconds: &'a [f64],
    #[serde(skip_serializing_if = "<[f64]>::is_empty")]
    step_processor_seconds: &'a [f64],
    axes: BTreeMap<&'static str, usize>,
    bytes_sent_per_step: f64,
    calls_per_step: f64,
    parameters: usize,
    bytes_held: Memory,
    #[serde(skip_serializing_if = "Option::is_none")]
    pipeline: Option<&'a PipelineUsage>,
}

impl Figures {
    fn tokens_per_second(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.tokens as f64 / self.elapsed.as_secs_f64() }
    }

    /// Of a model of so many parameters.
    pub fn json(&self, axes: Axes, parameters: usize) -> Json<'_> {
        let Axes { dp, pp, tp, .. } = axes;
        let communication = Communication::of(&self.counters, self.steps);
        Json {
            losses: &self.losses,
            grad_norms: &self.grad_norms,
            tokens_per_second: self.tokens_per_second(),
            seconds_to_first_step: self.seconds.before,
            step_seconds: &self.seconds.steps,
            step_processor_seconds: &self.seconds.processor,
            axes: BTreeMap::from([("dp", dp), ("pp", pp), ("tp", tp)]),
            bytes_sent_per_step: communication.bytes(),
            calls_per_step: communication.calls(),
            parameters,
            bytes_held: self.memory,
            pipeline: self.pipeline.as_ref(),
        }
    }

    /// Rows of a table on the losses, of which each is in `unit`.
    pub fn losses(&self, unit: &str) -> Vec<Row> {
        let (Some(first), losses) = (self.losses.first(), &self.losses) else { return Vec::new() };
        // The mean over the last tenth of the steps: single batches differ.
        let last = &losses[losses.len() - losses.len().div_ceil(10)..];
        let last = last.iter().sum::<f64>() / last.len() as f64;
        vec![
            row("loss, first step", format!("{first:.4} {unit}")),
            row("loss, last steps", format!("{last:.4} {unit}")),
        ]
    }

    /// Rows of a table on what it took.
    pub fn costs(&self, clip: Option<f64>, axes: Axes, strategy: &Strategy) -> Vec<Row> {
        let (seconds, norms) = (self.elapsed.as_secs_f64(), &self.grad_norms);
        let mut rows = Vec::new();
        if let Some(clip) = clip {
            let (largest, clipped) =
                (norms.iter().copied().fold(0.0, f64::max), norms.iter().filter(|norm| **norm > clip).count());
            let said = format!("at most {largest:.3}; larger than {clip} in {clipped} of {} steps", norms.len());
            rows.push(row("gradient norm", said));
        }
        // A run that had all its steps behind it has cost nothing.
        if self.steps == 0 {
            return rows;
        }
        let Memory { parameters, gradients, optimizer, step } = self.memory;
        let held = format!("parameters {parameters}, gradients {gradients}, optimizer {optimizer} bytes");
        rows.push(row("held by the first rank", held));
        let counted = "bytes a rank, as the allocator of the host counts: activations, gradients, what is gathered";
        rows.push(row("more at the peak of a step", format!("{step} {counted}")));
        rows.push(row("time", format!("{seconds:.1} s, {:.0} tokens/s", self.tokens_per_second())));
        if axes.dp > 1 {
            let waited = 100.0 * self.counters.waited.as_secs_f64() / seconds;
            rows.push(row("waiting for gradients and gathers", format!("{waited:.1} % of the time")));
        }
        rows.extend(self.pipeline.iter().flat_map(|pipeline| pipeline.table(strategy)));
        rows.extend(Communication::of(&self.counters, self.steps).table());
        rows
    }
}

/// A name and a value.
pub type Row = (String, String);

/// A row of a table.
pub fn row(name: &str, value: String) -> Row {
    (name.to_owned(), value)
}

/// The table of some rows.
pub fn table(rows: impl IntoIterator<Item = Row>) -> String {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED);
    rows.into_iter().for_each(|(name, value)| {
        table.add_row([name, value]);
    });
    table.to_string()
}
