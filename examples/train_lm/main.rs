//! Trains a small GPT on text: `cargo run --release --example train_lm -- --help`.
//!
//! `gpt.rs` is an ordinary burn model and knows nothing of ranks; `train.rs` is an ordinary burn loop, run by every
//! rank.

mod args;
mod checkpoints;
#[path = "../common/mod.rs"]
mod common;
mod fit;
mod gpt;
mod report;
mod sample;
mod text;
mod train;

use std::process::ExitCode;

use burn::tensor::Device;
use burn_parallel::launch::StopSignal;

use crate::args::Args;
use crate::common::mesh;
use crate::common::program::{self, Ended, Failure};
use crate::common::start;
use crate::sample::{generate, readable};
use crate::text::Text;
use crate::train::{held_out_loss, train};

fn main() -> ExitCode {
    program::run(Args::from_command_line(), run)
}

/// Trains. Returns the signal that has ended the run, if one has.
fn run(args: &Args) -> Result<Option<StopSignal>, Failure> {
    let text = &Text::load(args.text.as_deref(), args.seq).map_err(Failure::Refused)?;
    let device = Device::flex();
    let args = &if args.auto { fit::choose(args, text)? } else { args.clone() };
    device.seed(args.seed);
    // Made once, before there are ranks: they would all draw from the same random numbers, in any order.
    let model = args.model().init(&mesh::autodiff(&args.strategy, device));

    // The first rank tells what came of it.
    let ran = start::run(
        &args.start,
        args.axes.ranks,
        |ranks| args.on(ranks).is_ok(),
        (args.seed, &args.given.clone().with("bytes of --text", text.fingerprint())),
        |rank| {
            // After some were lost there may be fewer ranks than the flags are for.
            let args = args.on(rank.size())?;
            let ended = train(rank, model.clone(), &args, text)?;
            Ok(ended.map(|outcome| (outcome, args)))
        },
    )?;
    let (outcome, args) = match ran {
        Some(Ended::Complete(ran)) => ran,
        Some(Ended::Stopped(signal)) => return Ok(Some(signal)),
        None => return Ok(None),
    };
    let args = &args;

    if let Some(path) = &args.json {
        outcome.write_json(args, path).map_err(|why| format!("cannot write --json {path:?}: {why}"))?;
    }
    let held_out = held_out_loss(&outcome.model, text);
    let sample = readable(&generate(&outcome.model, b"\n", 300, 0.8, args.seed));
    let summary = outcome.summary(args, held_out);
    program::tell(&format!("\nThe model writes:\n\n{}\n\n{summary}", sample.trim()))?;
    Ok(None)
}
