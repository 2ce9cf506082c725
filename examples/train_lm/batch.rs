//! How large the batch is: as many rows as the flags say, as fit, or more as training goes on.

use std::env;
use std::process::Command;
use std::time::Duration;

use burn::tensor::Device;
use burn_parallel::batch::{
    BatchSplit, GrowBatch, MemoryBudget, NoiseScale, largest_that_fits, model_memory, rows_within, step_memory,
    try_in_child, warm_up,
};
use burn_parallel::prelude::*;
use serde::{Deserialize, Serialize};

use crate::args::Args;
use crate::text::tensors;
use crate::train::loss;

/// Rows that `--batch auto` does not go beyond, on a replica: by then a processor is busy, and a step takes long.
const MOST: usize = 1024;

/// Tells a child of `--batch auto` how many rows to try.
const TRIAL: &str = "TRAIN_LM_TRIAL_ROWS";

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

/// The rows that this process is to try for `--batch auto`, if it is such a child.
pub fn trial() -> Option<usize> {
    env::var(TRIAL).ok()?.parse().ok()
}

/// The flags with the largest batch that goes through every layer at once. This process takes no step for it: children
/// do, with a limit on their memory.
pub fn choose(args: &Args) -> Result<Args, Error> {
    let budget = MemoryBudget::of_system()?;
    // What others take meanwhile.
    let bytes = budget.bytes / 10 * 9;
    let most = match args.pp * args.tp {
        // What a replica needs that is whole is known; the ranks are threads, and share the memory.
        1 => {
            let model = args.model().init(&Device::flex().autodiff());
            let held = model_memory(&model, 2);
            let text = vec![0u8; args.seq + 1];
            rows_within(bytes / args.dp as u64, MOST, |rows| {
                let batch = tensors(&vec![&text[..]; rows], &Device::flex());
                Ok(held + step_memory(&model, batch, loss)?)
            })?
        }
        _ => MOST,
    };
    if most == 0 {
        let wrong = "--batch auto: not even one row fits into the {} bytes of {}: take a smaller model, or split it with --tp or --pp";
        return Err(Error::user(wrong.replacen("{}", &bytes.to_string(), 1).replacen("{}", &budget.limit, 1)));
    }
    let program = env::current_exe().map_err(Error::user)?;
    let one = |rank: Rank| {
        largest_that_fits(most, &rank, |rows| {
            let mut child = Command::new(&program);
            child.args(env::args_os().skip(1)).env(TRIAL, rows.to_string());
            try_in_child(&mut child, bytes, Duration::from_secs(600))
        })
    };
    let fit = launch::threads(1).run(one)?.swap_remove(0);
    eprintln!("{} rows at once fit on a rank, of {most} that were tried first, in {} bytes", fit.rows, bytes);
    Ok(args.with_rows_at_once(fit.rows))
}

/// The batch while it trains; part of a checkpoint.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Batch {
    pub noise: NoiseScale,
    grow: Option<GrowBatch>,
    /// The rows of the last step.
    rows: usize,
}

impl Batch {
    /// What the flags say, or what a checkpoint said before as far as the flags still do.
    pub fn begin(self, args: &Args) -> Result<Self, Error> {
        let grow = match (args.grow_batch, self.grow) {
            (None, _) => None,
            (Some(most), Some(grow)) => Some(grow.with_most(most)),
            (Some(most), None) => {
                let patience = (args.steps as u64 / 10).clamp(10, 100);
                Some(GrowBatch::new(args.batch, most)?.with_patience(patience))
            }
        };
        let rows = grow.map_or(args.batch, |grow| grow.rows());
        Ok(Self { grow, rows, ..self })
    }

    /// The rows of the next step.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How they are divided. A batch that has grown takes more micro-batches of the same size.
    pub fn split(&self, args: &Args) -> Result<BatchSplit, Error> {
        BatchSplit::of(&args.strategy, args.ranks, self.rows, Some(args.rows_at_once()))
    }

    /// The factor of the learning rate, by the square-root rule for Adam.
    pub fn lr_factor(&self, args: &Args) -> f64 {
        let Some(grow) = self.grow.filter(|grow| grow.rows() > args.batch) else { return 1.0 };
        let factor = (self.rows as f64 / args.batch as f64).sqrt();
        factor * warm_up(grow.steps_since() as usize, WARM_UP, 0.5f64.sqrt())
    }

    /// Takes in what a step has measured.
    pub fn after_step(&mut self, step: &Step, args: &Args) {
        if !args.noise_scale {
            return;
        }
        self.noise.add(step);
        if let Some(grow) = &mut self.grow {
            self.rows = grow.after_step(&self.noise, args.seq as f64);
        }
    }

    /// What the summary says of the noise: how large it is, and what would help.
    pub fn advice(&self, args: &Args) -> String {
        let rows = match self.noise.items() {
            Ok(tokens) => tokens / args.seq as f64,
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
