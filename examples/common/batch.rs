//! How large the batch is: as many rows as the flags say, as fit (`fit.rs`), or more as training goes on.

use burn_parallel::batch::{GrowBatch, NoiseScale, warm_up};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::fit::trial;
use super::flags::{count, up_to};
use super::mesh::Axes;

/// Of fewer measurements the noise scale is uncertain.
const FEW: u64 = 20;

/// The steps over which the learning rate follows a batch that has grown.
const WARM_UP: usize = 20;

/// The rows of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// As many as fit at once.
    Auto,
    Number(usize),
}

/// Reads `--batch`.
pub fn rows(value: &str) -> Result<Rows, String> {
    const LARGEST: usize = 1_000_000;
    match value.parse::<i128>() {
        _ if value == "auto" => Ok(Rows::Auto),
        Ok(n) if n < 1 => Err("it must be at least 1".into()),
        Ok(n) if n > LARGEST as i128 => Err(format!("it must be at most {LARGEST}")),
        Ok(n) => Ok(Rows::Number(n as usize)),
        Err(_) => Err("it must be a whole number, or `auto`".into()),
    }
}

/// The steps from one that measures the noise of its gradient to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Every {
    /// As many as suit the run.
    Auto,
    Number(u64),
}

/// Reads `--noise-scale`.
fn every(value: &str) -> Result<Every, String> {
    match value {
        "auto" => Ok(Every::Auto),
        _ => up_to::<1_000_000>(value).map(|steps| Every::Number(steps as u64)),
    }
}

/// What is measured of the batch, and whether it grows.
#[derive(Args, Clone, Copy, Debug)]
pub struct GrowthFlags {
    /// Measures the gradient noise scale, the batch beyond which a larger one saves few steps, in every N-th step
    /// [default: every 4th, or all of a run of fewer than 64 steps]
    #[arg(long, value_name = "N", value_parser = every, num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "auto")]
    noise_scale: Option<Every>,

    /// Doubles the batch, up to so many rows, whenever the noise scale is beyond the doubled one, which is measured as
    /// --noise-scale says; the learning rate grows by the root, the betas and epsilon of AdamW stay
    #[arg(long, value_name = "MOST", value_parser = up_to::<1_000_000>)]
    pub grow_batch: Option<usize>,
}

impl GrowthFlags {
    /// The most rows that the batch grows to. In a trial it does not grow: that is of rows that are to be found yet.
    fn most(&self) -> Option<usize> {
        self.grow_batch.filter(|_| trial().is_none())
    }

    /// What is wrong with these flags for a batch that begins with so many rows.
    pub fn check(&self, batch: usize) -> Result<(), String> {
        match self.most() {
            Some(most) if most < batch => Err(format!("--grow-batch {most} is smaller than --batch {batch}")),
            _ => Ok(()),
        }
    }

    /// What is wrong with these flags for what `--batch auto` has found.
    pub fn check_found(&self, batch: usize) -> Result<(), String> {
        match self.grow_batch {
            Some(most) if most < batch => {
                let found = count(batch, "row");
                Err(format!("--grow-batch {most} is smaller than the {found} that --batch auto has found"))
            }
            _ => Ok(()),
        }
    }

    /// What is wrong with these flags where a replica takes so many micro-batches a step, one after the other: alone,
    /// and with one gradient, it measures no noise, and its batch never grows. If nothing else was to come of it than
    /// the number, that is told.
    pub fn check_gradients(
        &self,
        axes: Axes,
        strategy: &Strategy,
        micro_batches: usize,
    ) -> Result<Option<String>, String> {
        if !self.measures() || axes.dp > 1 {
            return Ok(None);
        }
        // Divided parameters have the gradients of a pipeline's micro-batches apart.
        let why = if axes.pp > 1 && strategy.data.sharding != Sharding::Parameters {
            let stages = axes.said("pp", axes.pp);
            format!("one replica with {stages} has one gradient a step, and measures no noise: give --dp 2")
        } else if axes.pp == 1 && micro_batches == 1 {
            "one replica with one micro-batch a step measures no noise: give --dp 2, or a --batch of several --micro-batch"
                .into()
        } else {
            return Ok(None);
        };
        match self.grow_batch {
            Some(most) => Err(format!("--grow-batch {most}: {why}")),
            None => Ok(Some(format!("--noise-scale: {why}"))),
        }
    }

    /// Whether steps measure the noise of their gradient.
    pub fn measures(&self) -> bool {
        self.noise_scale.is_some() || self.grow_batch.is_some()
    }

    /// The strategy that measures what these flags need in a run of so many steps.
    pub fn strategy(&self, strategy: Strategy, steps: usize) -> Strategy {
        let every = match (self.noise_scale, strategy.data.noise_scale_every) {
            (Some(Every::Number(steps)), _) => steps,
            // The file of --strategy says it.
            (_, steps @ 1..) => steps,
            _ if !self.measures() => 0,
            // An average is over some measurements at least.
            _ if steps < 64 => 1,
            _ => 4,
        };
        // Few steps tell a trial what the run needs.
        let every = if trial().is_some() { every.min(1) } else { every };
        let data = strategy.data.clone().with_noise_scale_every(every);
        strategy.with_data(data)
    }
}

/// The batch while it trains; part of a checkpoint.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Batch {
    noise: NoiseScale,
    grow: Option<GrowBatch>,
    /// The rows of the next step, as far as they are known.
    rows: usize,
    /// The items of the loss in the steps that were measured, and the rows of these.
    #[serde(default)]
    measured: (f64, usize),
}

impl Batch {
    /// What the flags say, a run of so many steps that begins with so many rows; or what a checkpoint said before as
    /// far as the flags still do.
    pub fn begin(self, rows: usize, flags: GrowthFlags, steps: usize) -> Result<Self, Error> {
        let grow = match (flags.most(), self.grow) {
            (None, _) => None,
            (Some(most), Some(grow)) => Some(grow.with_most(most)),
            (Some(most), None) => {
                let patience = (steps as u64 / 10).clamp(10, 100);
                Some(GrowBatch::new(rows, most)?.with_patience(patience))
            }
        };
        let rows = grow.map_or(rows, |grow| grow.rows());
        Ok(Self { grow, rows, ..self })
    }

    /// The rows of the next step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The factor of the learning rate of a batch that began with so many rows, by the square-root rule for Adam. Its
    /// betas would follow as well: but by them the moments of earlier steps are corrected, which would be wrong then.
    pub fn lr_factor(&self, began: usize) -> f64 {
        let Some(grow) = self.grow.filter(|grow| grow.rows() > began) else { return 1.0 };
        let factor = (self.rows as f64 / began as f64).sqrt();
        factor * warm_up(grow.steps_since() as usize, WARM_UP, 0.5f64.sqrt())
    }

    /// Takes in what a step of so many rows has measured. Says so if the batch grows by it.
    pub fn after_step(&mut self, step: &Step, rows: usize) -> Option<String> {
        self.noise.add(step);
        self.measured = (self.measured.0 + step.weight, self.measured.1 + rows);
        let Some(grow) = &mut self.grow else {
            self.rows = rows;
            return None;
        };
        let before =
            std::mem::replace(&mut self.rows, grow.after_step(&self.noise, self.measured.0 / self.measured.1 as f64));
        let noise = self.noise_rows().unwrap_or(f64::NAN);
        (self.rows > before).then(|| {
            format!("the batch grows from {before} to {}: the noise scale is {noise:.0}", count(self.rows, "row"))
        })
    }

    /// The rows of a step, of a run that began with so many.
    pub fn sizes(&self, began: usize) -> String {
        if self.rows == began { began.to_string() } else { format!("{began} to {}", self.rows) }
    }

    /// The noise scale in rows; or why there is none.
    pub fn noise_rows(&self) -> Result<f64, String> {
        let items = self.noise.items().map_err(|why| why.to_string())?;
        match self.measured {
            (_, 0) => Err("it was measured in items of the loss, of which it is not known how many a row has".into()),
            (all, rows) => Ok(items * rows as f64 / all),
        }
    }

    /// What the summary says of the noise: how large it is, and what would help; or what would say so.
    pub fn advice(&self, flags: GrowthFlags) -> String {
        if !flags.measures() {
            return "not measured: --noise-scale says whether a larger batch, or a smaller one, would help".into();
        }
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
        let uncertain = match self.noise.steps() {
            steps if steps < FEW => format!("; uncertain, of {}", count(steps as usize, "measurement")),
            _ => String::new(),
        };
        let rows = count(rows.round() as usize, "row");
        format!("{rows}; with {} a step: {helps}{uncertain}", count(self.rows, "row"))
    }
}
