//! How large the batch is: as many rows as the flags say, as fit, or more as training goes on.

use std::env;
use std::process::Command;
use std::time::Duration;

use burn_parallel::batch::{GrowBatch, MemoryBudget, NoNoise, NoiseScale, largest_that_fits, rows_within, try_in_child, warm_up};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::device::Compute;
use super::flags::{Axes, up_to};
use super::start::{Launch, Start};

/// Tells a child of `--batch auto` how many rows to try.
const TRIAL: &str = "BURN_PARALLEL_TRIAL_ROWS";

/// The steps of a trial: in the second one the optimizer has its state.
pub const TRIAL_STEPS: usize = 2;

/// The steps over which the learning rate follows a batch that has grown.
const WARM_UP: usize = 20;

/// How large the batch is.
#[derive(Args, Clone, Debug)]
pub struct BatchFlags {
    /// The rows of a step, over all ranks; `auto` for as many as fit into memory at once
    #[arg(long, value_name = "N", default_value = "16", value_parser = rows)]
    batch: Rows,

    /// Measures the gradient noise scale, the batch beyond which a larger one saves few steps
    #[arg(long)]
    noise_scale: bool,

    /// Doubles the batch, up to so many rows, whenever the noise scale is beyond the doubled one; the learning rate grows by the root
    #[arg(long, value_name = "MOST", value_parser = up_to::<1_000_000>)]
    grow_batch: Option<usize>,
}

/// The rows of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rows {
    /// As many as fit at once.
    Auto,
    Number(usize),
}

fn rows(value: &str) -> Result<Rows, String> {
    const LARGEST: usize = 1_000_000;
    match value.parse::<i128>() {
        _ if value == "auto" => Ok(Rows::Auto),
        Ok(n) if n < 1 => Err("it must be at least 1".into()),
        Ok(n) if n > LARGEST as i128 => Err(format!("it must be at most {LARGEST}")),
        Ok(n) => Ok(Rows::Number(n as usize)),
        Err(_) => Err("it must be a whole number, or `auto`".into()),
    }
}

/// How large the batch is to be.
#[derive(Clone, Copy, Debug)]
pub struct BatchPlan {
    /// The rows of a step over all ranks, at first.
    pub rows: usize,
    /// Whether they are still to be found out.
    pub auto: bool,
    /// Whether this process is a child of another, which tries what fits: it leaves nothing behind.
    pub trial: bool,
    /// Whether the noise of the gradient is measured.
    pub noise_scale: bool,
    /// Up to how many rows the batch may grow.
    pub grow: Option<usize>,
}

impl BatchFlags {
    /// What is asked for: with `auto`, for now as many rows as a trial says, or one, in each of so many `pieces` of the batch of
    /// each replica.
    pub fn read(&self, axes: Axes, pieces: usize, start: &Start) -> Result<BatchPlan, String> {
        let (trial, dp) = (env::var(TRIAL).ok().and_then(|rows| rows.parse::<usize>().ok()), axes.dp);
        let auto = self.batch == Rows::Auto;
        if auto && (start.launch != Launch::Threads || start.device != Compute::Flex) {
            return Err(
                "--batch auto tries batches on ranks that are threads of a CPU: give --launch threads, or a number"
                    .into(),
            );
        }
        let rows = match self.batch {
            Rows::Number(rows) => rows,
            Rows::Auto => dp * pieces * trial.unwrap_or(1),
        };
        if rows < dp {
            return Err(format!(
                "--batch {rows} is smaller than --dp {dp}: every replica needs a row of each batch, give --batch {dp}"
            ));
        }
        if let Some(most) = self.grow_batch.filter(|most| *most < rows) {
            return Err(format!("--grow-batch {most} is smaller than --batch {rows}"));
        }
        let (trial, noise_scale) = (auto && trial.is_some(), self.noise_scale || self.grow_batch.is_some());
        Ok(BatchPlan { rows, auto: auto && !trial, trial, noise_scale, grow: self.grow_batch })
    }

    /// Whether as many rows are asked for as fit.
    pub fn is_auto(&self) -> bool {
        self.batch == Rows::Auto
    }
}

impl BatchPlan {
    /// The strategy, which measures the noise of the gradient if that is asked for.
    pub fn measured(&self, strategy: Strategy) -> Result<Strategy, String> {
        if self.noise_scale && strategy.data.sharding == Sharding::Parameters {
            return Err(
                "--noise-scale compares the gradients of replicas, which --zero 3 sums up first: give --zero 2".into(),
            );
        }
        let data = strategy.data.clone().with_noise_scale(self.noise_scale || strategy.data.noise_scale);
        Ok(strategy.with_data(data))
    }
}

/// The most rows, up to `most`, that go through every layer at once on each of the ranks, which are threads. This process takes no
/// step to find out: children do, with a limit on their memory. `memory` says how many bytes a replica needs that holds all of
/// the model, for so many rows; what does not fit by that is not tried.
pub fn rows_that_fit(
    most: usize,
    strategy: &Strategy,
    axes: Axes,
    memory: impl FnMut(usize) -> Result<usize, Error>,
) -> Result<usize, Error> {
    let budget = MemoryBudget::of_system()?;
    // What others take meanwhile.
    let bytes = budget.bytes / 10 * 9;
    let whole = axes.pp * axes.tp == 1 && strategy.data.sharding == Sharding::None;
    let most = if whole { rows_within(bytes / axes.dp as u64, most, memory)? } else { most };
    if most == 0 {
        return Err(Error::user(format!(
            "--batch auto: not even one row fits into the {bytes} bytes of {}: take a smaller model, or split it with --tp or --pp",
            budget.limit
        )));
    }
    let program = env::current_exe().map_err(Error::user)?;
    let one = |rank: Rank| {
        largest_that_fits(most, &rank, |rows| {
            let mut child = Command::new(&program);
            child.args(env::args_os().skip(1)).env(TRIAL, rows.to_string());
            try_in_child(&mut child, bytes, Duration::from_secs(600))
        })
    };
    let rows = launch::threads(1).run(one)?.swap_remove(0).rows;
    eprintln!("{rows} rows at once fit on a rank, of {most} that were tried first, in {bytes} bytes");
    Ok(rows)
}

/// The batch while it trains; part of a checkpoint.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Batch {
    noise: NoiseScale,
    grow: Option<GrowBatch>,
    /// The rows of the next step, as far as they are known.
    rows: usize,
    /// All rows of steps whose noise was measured, and what their losses counted for: tokens.
    seen: (f64, f64),
}

impl Batch {
    /// What the flags say for a run of so many steps, or what a checkpoint said before as far as the flags still do.
    pub fn begin(self, plan: &BatchPlan, steps: usize) -> Result<Self, Error> {
        let grow = match (plan.grow, self.grow) {
            (None, _) => None,
            (Some(most), Some(grow)) => Some(grow.with_most(most)),
            (Some(most), None) => {
                let patience = (steps as u64 / 10).clamp(10, 100);
                Some(GrowBatch::new(plan.rows, most)?.with_patience(patience))
            }
        };
        let rows = grow.map_or(plan.rows, |grow| grow.rows());
        Ok(Self { grow, rows, ..self })
    }

    /// The rows of the next step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The factor of the learning rate, by the square-root rule for Adam.
    pub fn lr_factor(&self, plan: &BatchPlan) -> f64 {
        let Some(grow) = self.grow.filter(|grow| grow.rows() > plan.rows) else { return 1.0 };
        let factor = (self.rows as f64 / plan.rows as f64).sqrt();
        factor * warm_up(grow.steps_since() as usize, WARM_UP, 0.5f64.sqrt())
    }

    /// Takes in what a step of so many rows has measured.
    pub fn after_step(&mut self, step: &Step, rows: usize, plan: &BatchPlan) {
        if !plan.noise_scale {
            return;
        }
        self.noise.add(step);
        self.seen = (self.seen.0 + rows as f64, self.seen.1 + step.weight);
        self.rows = match &mut self.grow {
            Some(grow) => grow.after_step(&self.noise, self.seen.1 / self.seen.0),
            None => rows,
        };
    }

    /// The noise scale in rows; or why there is none.
    pub fn noise_rows(&self) -> Result<f64, NoNoise> {
        self.noise.items().map(|tokens| tokens / (self.seen.1 / self.seen.0))
    }

    /// What the summary says of the noise: how large it is, and what would help.
    pub fn advice(&self) -> String {
        let rows = match self.noise_rows() {
            Ok(rows) => rows,
            Err(why) => return format!("none: {why}"),
        };
        let batch = self.rows as f64;
        let helps = match rows / batch {
            ratio if ratio > 4.0 => "a larger batch would take fewer steps",
            ratio if ratio < 0.25 => "a smaller batch would take less data for the same loss",
            _ => "the batch suits it",
        };
        format!("{rows:.0} rows; with {batch:.0} rows a step: {helps}")
    }
}
