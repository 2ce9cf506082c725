//! What a run tells: a progress bar on the way, a table and a JSON file at the end.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn_parallel::comm::Tally;
use burn_parallel::pipeline_parallel::schedule::{Costs, Routes, StageCosts};
use burn_parallel::prelude::*;
use burn_parallel::step::{RunReport, StepCounters};
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use serde::Serialize;

use crate::args::Args;
use crate::batch::Batch;
use crate::gpt::Gpt;
use crate::memory::Memory;

/// Without a terminal, a line appears this often.
const EVERY: Duration = Duration::from_secs(5);

/// Tells how far the training is: a bar on a terminal, a line now and then elsewhere, nothing on ranks but the first.
pub struct Progress {
    shown: Option<Shown>,
    steps: usize,
    tokens: usize,
    started: Instant,
    spoke: Option<Instant>,
}

enum Shown {
    Bar(ProgressBar),
    Lines,
}

impl Progress {
    /// Starts the clock; only one rank speaks.
    pub fn new(steps: usize, speaks: bool) -> Self {
        let shown = speaks.then(|| {
            if !io::stderr().is_terminal() {
                return Shown::Lines;
            }
            // In two lines it fits a narrow terminal.
            let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} steps, {eta} left\n{wide_msg}");
            let bar = ProgressBar::new(steps as u64).with_finish(ProgressFinish::Abandon);
            Shown::Bar(bar.with_style(style.unwrap_or(ProgressStyle::default_bar())))
        });
        Self { shown, steps, tokens: 0, started: Instant::now(), spoke: None }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Tells of a step: its loss, its tokens over all ranks, and the time that it waited for communication so far.
    pub fn step(&mut self, step: usize, loss: f64, tokens: usize, waited: Duration) {
        self.tokens += tokens;
        let Some(shown) = &self.shown else { return };
        let seconds = self.elapsed().as_secs_f64();
        let message = format!(
            "loss {loss:.4}, {:.0} tokens/s, {:.1} % communication",
            self.tokens as f64 / seconds,
            100.0 * waited.as_secs_f64() / seconds
        );
        let done = step + 1;
        match shown {
            Shown::Bar(bar) => {
                bar.set_message(message);
                bar.set_position(done as u64);
                if done == self.steps {
                    bar.finish();
                }
            }
            Shown::Lines if done == self.steps || self.spoke.is_none_or(|at| at.elapsed() >= EVERY) => {
                eprintln!("step {done}/{}: {message}", self.steps);
                self.spoke = Some(Instant::now());
            }
            Shown::Lines => {}
        }
    }
}

/// How a pipeline was used, over all steps.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Pipeline {
    /// The share of the time in which ranks of the pipeline did not compute.
    pub idle: f64,
    /// What that share is for stages that take equally long and messages that take no time.
    pub bound: f64,
    /// The most micro-batches that one rank kept something of at once.
    pub peak_activations: usize,
    #[serde(skip)]
    steps: usize,
}

impl Pipeline {
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
}

/// What came of a training, as one rank saw it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The trained model, the same on every rank.
    pub model: Gpt,
    /// How many steps this run has made, after those of the checkpoint that it went on from.
    pub steps: usize,
    /// The loss of each step over the whole batch, in nats per byte; those of the checkpoint too.
    pub losses: Vec<f64>,
    /// The norm of each step's gradient before it was clipped; none without clipping.
    pub grad_norms: Vec<f64>,
    /// The tokens of the steps of this run, over all ranks.
    pub tokens: usize,
    /// The time that the steps took.
    pub elapsed: Duration,
    /// What the rank communicated in all steps.
    pub counters: StepCounters,
    /// How the pipeline was used, if the layers are on several ranks.
    pub pipeline: Option<Pipeline>,
    /// What this rank held after the last step.
    pub memory: Memory,
    /// How large the batch was in the end, and how noisy the gradient.
    pub batch: Batch,
}

#[derive(Serialize)]
struct Json<'a> {
    losses: &'a [f64],
    #[serde(skip_serializing_if = "<[f64]>::is_empty")]
    grad_norms: &'a [f64],
    tokens_per_second: f64,
    axes: BTreeMap<&'static str, usize>,
    bytes_sent_per_step: f64,
    calls_per_step: f64,
    parameters: usize,
    bytes_held: Memory,
    rows: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    noise_scale_rows: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pipeline: Option<&'a Pipeline>,
}

impl Outcome {
    /// Tokens of all ranks per second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.elapsed.as_secs_f64()
    }

    /// What is sent, by what it is for, with the bytes and calls of a step.
    fn communication(&self) -> [(&'static str, f64, f64); 6] {
        let steps = self.steps.max(1) as f64;
        let StepCounters { gradients, parameters, control, tensor, pipeline, norm, .. } = &self.counters;
        let purposes = [
            ("gradients", gradients),
            ("control numbers", control),
            ("gathered parameters", parameters),
            ("activations of split layers", tensor),
            ("activations between stages", pipeline),
            ("gradient norm, over parts", norm),
        ];
        purposes.map(|(name, counters)| {
            let Tally { bytes, calls, .. } = counters.total();
            (name, bytes as f64 / steps, calls as f64 / steps)
        })
    }

    /// Writes the outcome as JSON.
    pub fn write_json(&self, args: &Args, path: &Path) -> io::Result<()> {
        let communication = self.communication();
        let json = Json {
            losses: &self.losses,
            grad_norms: &self.grad_norms,
            tokens_per_second: self.tokens_per_second(),
            axes: BTreeMap::from([("dp", args.dp), ("pp", args.pp), ("tp", args.tp)]),
            bytes_sent_per_step: communication.iter().map(|(_, bytes, _)| bytes).sum(),
            calls_per_step: communication.iter().map(|(_, _, calls)| calls).sum(),
            parameters: self.model.num_params(),
            bytes_held: self.memory,
            rows: self.batch.rows(),
            noise_scale_rows: self.batch.noise.items().ok().map(|tokens| tokens / args.seq as f64),
            pipeline: self.pipeline.as_ref(),
        };
        fs::write(path, serde_json::to_string(&json)? + "\n")
    }

    /// The table that ends a run; `held_out` is the loss on text that was held out, if there was enough of it.
    pub fn summary(&self, args: &Args, held_out: Option<f64>) -> String {
        let losses = &self.losses;
        let seconds = self.elapsed.as_secs_f64();
        let mut table = Table::new();
        table.load_preset(UTF8_FULL_CONDENSED);
        let mut row = |name: &str, value: String| {
            table.add_row([name.to_owned(), value]);
        };
        row("ranks", format!("{} (dp {}, pp {}, tp {})", args.ranks, args.dp, args.pp, args.tp));
        row(
            "model",
            format!(
                "{} parameters: {} layers, width {}, {} heads",
                self.model.num_params(),
                args.layers,
                args.d_model,
                args.heads
            ),
        );
        row(
            "training",
            format!(
                "{} steps of {} x {} bytes, at most {} rows at once",
                args.steps,
                args.batch,
                args.seq,
                args.rows_at_once()
            ),
        );
        row("batch", self.batch.split(args).map_or_else(|why| why.to_string(), |split| split.to_string()));
        if args.noise_scale {
            row("gradient noise scale", self.batch.advice(args));
        }
        row("loss, first step", format!("{:.4} nats per byte", losses[0]));
        row("loss, last steps", format!("{:.4} nats per byte", last_tenth(losses)));
        row(
            "loss, held-out text",
            match held_out {
                Some(loss) => format!("{loss:.4} nats per byte"),
                None => "none: the text is too short".into(),
            },
        );
        if let Some(clip) = args.clip {
            let norms = &self.grad_norms;
            let (largest, clipped) =
                (norms.iter().copied().fold(0.0, f64::max), norms.iter().filter(|norm| **norm > clip).count());
            row(
                "gradient norm",
                format!("at most {largest:.3}; larger than {clip} in {clipped} of {} steps", norms.len()),
            );
        }
        let Memory { parameters, gradients, optimizer, step } = self.memory;
        row(
            "held by the first rank",
            format!("parameters {parameters}, gradients {gradients}, optimizer {optimizer} bytes"),
        );
        row(
            "more at the peak of a step",
            format!(
                "{step} bytes a rank, as the allocator of the host counts: activations, gradients, what is gathered"
            ),
        );
        row("time", format!("{seconds:.1} s, {:.0} tokens/s", self.tokens_per_second()));
        row(
            "waiting for gradients and gathers",
            format!("{:.1} % of the time", 100.0 * self.counters.waited.as_secs_f64() / seconds),
        );
        if let (Some(Pipeline { idle, bound, peak_activations, .. }), Some(config)) =
            (&self.pipeline, &args.strategy.pipeline)
        {
            row("pipeline", format!("{}, {} micro-batches", config.schedule, config.micro_batches));
            row("idle in the pipeline", format!("{:.1} % of the time; ideal {:.1} %", 100.0 * idle, 100.0 * bound));
            row("micro-batches alive at once", peak_activations.to_string());
        }
        for (place, (name, bytes, calls)) in self.communication().into_iter().enumerate() {
            // The first two are of every run, if only as zeros.
            if place < 2 || calls > 0.0 {
                row(name, format!("{bytes:.0} bytes in {calls:.1} calls, per step and rank"));
            }
        }
        table.to_string()
    }
}

/// The mean over the last tenth of the steps: single batches differ.
fn last_tenth(losses: &[f64]) -> f64 {
    let last = &losses[losses.len() - losses.len().div_ceil(10)..];
    last.iter().sum::<f64>() / last.len() as f64
}
