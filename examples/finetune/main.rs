//! Fine-tunes a language model, from a Hugging Face directory to one: `cargo run --release --features finetune
//! --example finetune -- --help`.
//!
//! `model/` is an ordinary burn model and knows nothing of ranks, `data/` makes batches of files; `train.rs` is an
//! ordinary burn loop, run by every rank. docs/fine-tuning.md says how to use it.

mod args;
mod base;
mod checkpoints;
#[path = "../common/mod.rs"]
mod common;
mod data;
mod directory;
mod dry_run;
mod evaluate;
mod fit;
mod generate;
mod input;
#[allow(dead_code, reason = "more than this program needs")]
mod lora;
#[allow(dead_code, unused_imports, reason = "a folder to copy, with more than this program needs")]
mod model;
mod report;
mod schedule;
mod train;

use std::process::ExitCode;

use burn_parallel::launch::StopSignal;

use crate::args::Args;
use crate::common::program::{self, Ended, Failure};
use crate::common::start;
use crate::input::Input;

fn main() -> ExitCode {
    program::run(Args::from_command_line(), run)
}

/// Trains. Returns the signal that has ended the run, if one has.
fn run(args: &Args) -> Result<Option<StopSignal>, Failure> {
    let input = &Input::open(args).map_err(Failure::Refused)?;
    let args = if args.auto { fit::choose(args, input)? } else { args.clone() };
    let steps = input.steps(&args);
    let args = &args.measuring(steps);
    let goes_on = |ranks| args.on(ranks).is_ok();
    let given = (args.seed, &input.with_read(args.given.clone()));
    if args.dry_run.is_some() {
        let dry = |rank| dry_run::run(rank, args, input).map(Ended::Complete);
        if let Some(Ended::Complete(said)) = start::run(&args.start, args.axes.ranks, goes_on, given, dry)? {
            program::tell(&said)?;
        }
        return Ok(None);
    }
    // The first rank tells what came of it.
    let ran = start::run(&args.start, args.axes.ranks, goes_on, given, |rank| {
        // After some were lost there may be fewer ranks than the flags are for.
        let args = args.on(rank.size())?;
        Ok(train::run(rank, &args, input)?.map(|outcome| (outcome, args)))
    })?;
    let (outcome, args) = match ran {
        Some(Ended::Complete(ran)) => ran,
        Some(Ended::Stopped(signal)) => return Ok(Some(signal)),
        None => return Ok(None),
    };
    if let Some(path) = &args.json {
        outcome.write_json(&args, path).map_err(|why| format!("cannot write --json {path:?}: {why}"))?;
    }
    program::tell(&outcome.summary(&args))?;
    Ok(None)
}
