//! How large the batch is: as many rows as the flags say, as fit, or more as training goes on.

use std::env;
use std::process::Command;
use std::time::Duration;

use burn::module::Module;
use burn::tensor::Device;
use burn_parallel::batch::{
    GrowBatch, MemoryBudget, NoiseScale, RankMemory, Trial, largest_that_fits, model_memory, rows_within_on_all,
    try_in_child, warm_up,
};
use burn_parallel::graph::TensorTree;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use clap::Args;
use log::LevelFilter;
use serde::{Deserialize, Serialize};

use super::device::Compute;
use super::flags::{bytes, up_to};
use super::mesh::{self, Axes};
use super::program::unsuited;
use super::start::{Launch, Start};

/// Tells a child of `--batch auto` how many rows to try.
const TRIAL: &str = "BURN_PARALLEL_TRIAL_ROWS";

/// The steps of a trial: in the second one the optimizer has its state.
pub const TRIAL_STEPS: usize = 2;

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

/// What `--batch auto` goes by.
#[derive(Args, Clone, Copy, Debug)]
pub struct FitFlags {
    /// The most memory that --batch auto gives to all ranks together, as 500M or 6G [default: nine tenths of what the
    /// system says is left, which is never gone beyond]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    memory_budget: Option<u64>,
}

impl FitFlags {
    /// What is wrong with these flags for such a batch.
    pub fn check(&self, batch: Rows) -> Result<(), String> {
        match self.memory_budget {
            Some(_) if batch != Rows::Auto => Err("--memory-budget is for --batch auto: give that as well".into()),
            _ => Ok(()),
        }
    }

    /// The bytes that all ranks together may take, and what sets the limit.
    fn budget(&self) -> Result<(u64, String), Error> {
        let MemoryBudget { bytes, limit } = MemoryBudget::of_system()?;
        // What others take meanwhile.
        let left = bytes / 10 * 9;
        Ok(match self.memory_budget.filter(|given| *given < left) {
            Some(given) => (given, "--memory-budget".into()),
            None => (left, limit),
        })
    }
}

/// What is measured of the batch, and whether it grows.
#[derive(Args, Clone, Copy, Debug)]
pub struct GrowthFlags {
    /// Measures the gradient noise scale, the batch beyond which a larger one saves few steps
    #[arg(long)]
    pub noise_scale: bool,

    /// Doubles the batch, up to so many rows, whenever the noise scale is beyond the doubled one; the learning rate
    /// grows by the root, the betas and epsilon of AdamW stay
    #[arg(long, value_name = "MOST", value_parser = up_to::<1_000_000>)]
    pub grow_batch: Option<usize>,
}

impl GrowthFlags {
    /// The most rows that the batch grows to. In a trial it does not grow: that is of rows that are to be found yet.
    fn most(&self) -> Option<usize> {
        self.grow_batch.filter(|_| env::var_os(TRIAL).is_none())
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
                Err(format!("--grow-batch {most} is smaller than the {batch} rows that --batch auto has found"))
            }
            _ => Ok(()),
        }
    }

    /// What is wrong with these flags where a replica takes so many micro-batches a step, one after the other: alone,
    /// and with one gradient, it measures no noise, and its batch never grows.
    pub fn check_gradients(&self, axes: Axes, strategy: &Strategy, micro_batches: usize) -> Result<(), String> {
        let Some(most) = self.grow_batch.filter(|_| axes.dp == 1) else { return Ok(()) };
        // Divided parameters have the gradients of a pipeline's micro-batches apart.
        if axes.pp > 1 && strategy.data.sharding != Sharding::Parameters {
            let stages = axes.said("pp", axes.pp);
            return Err(format!(
                "--grow-batch {most}: one replica with {stages} has one gradient a step, and measures no noise: give --dp 2"
            ));
        }
        if axes.pp == 1 && micro_batches == 1 {
            return Err(format!(
                "--grow-batch {most}: one replica with one micro-batch a step measures no noise: give --dp 2, or a --batch of several --micro-batch"
            ));
        }
        Ok(())
    }

    /// Whether steps measure the noise of their gradient.
    pub fn measures(&self) -> bool {
        self.noise_scale || self.grow_batch.is_some()
    }

    /// The strategy that measures what these flags need.
    pub fn strategy(&self, strategy: Strategy) -> Strategy {
        let data = strategy.data.clone();
        let measures = self.measures() || data.noise_scale;
        strategy.with_data(data.with_noise_scale(measures))
    }
}

/// What is wrong with `--batch auto` beside these flags.
pub fn check_auto(start: &Start, micro_batch: Option<usize>) -> Result<(), String> {
    if start.launch != Launch::Threads || start.device != Compute::Flex {
        return Err(
            "--batch auto tries batches on ranks that are threads of a CPU: give --launch threads, or a number".into(),
        );
    }
    match micro_batch {
        Some(_) => Err("--batch auto finds out how many rows go through at once: leave --micro-batch out".into()),
        None => Ok(()),
    }
}

/// The rows that this process is to try for `--batch auto`, if it is such a child.
pub fn trial() -> Option<usize> {
    env::var(TRIAL).ok()?.parse().ok()
}

/// How many rows, of at most so many, are known to go through every layer at once with no more than so many bytes on
/// all ranks together, which are threads. `make` makes the whole model, and `batch` inputs of so many rows.
///
/// # Errors
/// If the model cannot be spread, or its step not captured.
pub fn known_to_fit<M: Module, I: TensorTree + Clone>(
    (strategy, ranks): (&Strategy, usize),
    (bytes, most): (u64, usize),
    make: impl Fn(&Device) -> Result<M, Error> + Sync,
    batch: impl Fn(usize) -> I + Sync,
    loss: impl Fn(&M, I) -> Loss + Sync,
) -> Result<usize, Error> {
    let [_, pp, _] = strategy.axes(ranks)?;
    if !can_be_held((strategy, ranks), bytes, &make)? {
        return Ok(0);
    }
    let pieces = strategy.pipeline.as_ref().filter(|_| pp > 1).map_or(1, |pipeline| pipeline.micro_batches);
    let known = launch::threads(ranks).run(|rank| {
        let device = mesh::autodiff(strategy, rank.device());
        let mut model = make(&device)?.parallelize(&rank, strategy).map_err(unsuited)?;
        rows_within_on_all(bytes, most, &rank, |rows| {
            let own = RankMemory::of(&mut model, 2, batch(rows * pieces), &loss).map_err(unsuited)?.total();
            Ok(rank.all_reduce(vec![own as u64], ReduceOp::Sum)?[0] as usize)
        })
    })?;
    Ok(known[0])
}

/// Whether all ranks together can hold the models that `make` makes in so many bytes: what cannot be held is not made.
///
/// # Errors
/// If the strategy is not one for so many ranks, or no model can be made.
pub fn can_be_held<M: Module>(
    (strategy, ranks): (&Strategy, usize),
    bytes: u64,
    make: &impl Fn(&Device) -> Result<M, Error>,
) -> Result<bool, Error> {
    let [dp, ..] = strategy.axes(ranks)?;
    let copies = if strategy.data.sharding == Sharding::Parameters { 1 } else { dp };
    Ok((copies * model_memory(&make(&Device::flex().autodiff())?, 0)) as u64 <= bytes)
}

/// Rows that a replica does not go beyond at once, whatever fits; and why.
pub struct Most {
    rows: usize,
    why: String,
}

impl Most {
    /// What `sense` says, and no more than the data gives, which is called so and has `all` rows, for a step of so many
    /// micro-batches on all replicas together.
    pub fn of((rows, why): (usize, String), (all, called): (u64, &str), micro_batches: usize) -> Self {
        let given = usize::try_from(all / micro_batches as u64).unwrap_or(usize::MAX).max(1);
        if given >= rows {
            return Self { rows, why };
        }
        let among = if micro_batches == 1 { String::new() } else { format!(", for {micro_batches} micro-batches") };
        Self { rows: given, why: format!("{called} has {all} rows{among}") }
    }
}

/// The most rows, at most `most`, that go through every layer at once on each replica. `known` says how many of so many
/// are known to need no more than so many bytes on all ranks together. This process takes no step for it: children do,
/// with a limit on their memory, which are this program with the same arguments and [`trial`].
///
/// # Errors
/// What `known` and trials return; if not even one row fits.
pub fn largest(
    Most { rows: most, why }: Most,
    fit: FitFlags,
    known: impl FnOnce(u64, usize) -> Result<usize, Error>,
) -> Result<usize, Error> {
    let (bytes, limit) = fit.budget()?;
    eprintln!("--batch auto: at most {most} rows at once are looked for ({why}), within {bytes} bytes ({limit})");
    // What is to be warned of is when the run begins.
    let level = log::max_level();
    log::set_max_level(LevelFilter::Error);
    let known = known(bytes, most);
    log::set_max_level(level);
    let most = known?;
    if most == 0 {
        return Err(Error::user(format!(
            "--batch auto: not even one row fits into the {bytes} bytes of {limit}: take a smaller model, or split it with --tp or --pp"
        )));
    }
    eprintln!("--batch auto: {most} rows at once may fit, by what is known of a step; more are not tried");
    let program = env::current_exe().map_err(Error::user)?;
    let one = |rank: Rank| {
        largest_that_fits(most, &rank, |rows| {
            eprintln!("--batch auto: tries {rows} rows at once");
            let mut child = Command::new(&program);
            child.args(env::args_os().skip(1)).env(TRIAL, rows.to_string());
            let trial = try_in_child(&mut child, bytes, Duration::from_secs(600))?;
            if let Trial::TooLarge(why) = &trial {
                eprintln!("--batch auto: {rows} rows do not fit: {why}");
            }
            Ok(trial)
        })
    };
    let fit = launch::threads(1).run(one)?.swap_remove(0);
    eprintln!("{} rows at once fit on a rank, of {most} that were tried first, in {bytes} bytes", fit.rows);
    Ok(fit.rows)
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

    /// Takes in what a step of so many rows has measured.
    pub fn after_step(&mut self, step: &Step, rows: usize) {
        self.noise.add(step);
        self.measured = (self.measured.0 + step.weight, self.measured.1 + rows);
        self.rows = match &mut self.grow {
            Some(grow) => grow.after_step(&self.noise, self.measured.0 / self.measured.1 as f64),
            None => rows,
        };
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
        format!("{rows:.0} rows; with {batch:.0} rows a step: {helps}")
    }
}
