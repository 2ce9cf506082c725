//! Trains a small GPT on text: `cargo run --release --example train_lm -- --help`.
//!
//! `gpt.rs` is an ordinary burn model and knows nothing of ranks; `train.rs` is an ordinary burn loop, run by every rank.

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

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use burn::tensor::Device;
use burn_parallel::launch::StopSignal;

use crate::args::Args;
use crate::common::flags::one_line;
use crate::common::start;
use crate::sample::{generate, readable};
use crate::text::Text;
use crate::train::{Ended, held_out_loss, train};

fn main() -> ExitCode {
    // Ranks that were lost and started again are a warning.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let args = match Args::from_command_line() {
        Ok(args) => args,
        Err(help) if !help.use_stderr() => {
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            return fail(2, &one_line(&wrong));
        }
    };
    let text = match Text::load(args.text.as_deref(), args.seq) {
        Ok(text) => text,
        Err(wrong) => return fail(2, &wrong),
    };
    match run(&args, &text) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(signal)) => ExitCode::from(signal.exit_code()),
        Err(why) => match why.downcast_ref() {
            Some(burn_parallel::Error::Stopped { signal }) => fail(signal.exit_code(), &why.to_string()),
            _ => fail(1, &why.to_string()),
        },
    }
}

/// Trains. Returns the signal that has ended the run, if one has.
fn run(args: &Args, text: &Text) -> Result<Option<StopSignal>, Box<dyn Error>> {
    let device = Device::flex();
    let args = &if args.auto { fit::choose(args)? } else { args.clone() };
    device.seed(args.seed);
    // Made once, before there are ranks: they would all draw from the same random numbers, in any order.
    let model = args.model().init(&device.autodiff());

    // The first rank tells what came of it.
    let ran = start::run(&args.start, (args.axes.ranks, args.restarts()), args.seed, |rank| {
        // After some were lost there may be fewer ranks than the flags are for.
        let args = args.on(rank.size())?;
        Ok((train(rank, model.clone(), &args, text)?, args))
    })?;
    let (outcome, args) = match ran {
        Some((Ended::Complete(outcome), args)) => (outcome, args),
        Some((Ended::Stopped(signal), _)) => return Ok(Some(signal)),
        None => return Ok(None),
    };
    let args = &args;

    if let Some(path) = &args.json {
        outcome.write_json(args, path).map_err(|why| format!("cannot write --json {path:?}: {why}"))?;
    }
    let held_out = held_out_loss(&outcome.model, text);
    let sample = readable(&generate(&outcome.model, b"\n", 300, 0.8, args.seed));
    let summary = outcome.summary(args, held_out);
    match writeln!(io::stdout(), "\nThe model writes:\n\n{}\n\n{summary}", sample.trim()) {
        Err(why) if why.kind() != io::ErrorKind::BrokenPipe => Err(why.into()),
        _ => Ok(None),
    }
}

fn fail(code: u8, message: &str) -> ExitCode {
    eprintln!("train_lm: {message}");
    ExitCode::from(code)
}
