//! Fine-tunes a language model, from a Hugging Face directory to one: `cargo run --release --features finetune
//! --example finetune -- --help`.
//!
//! `model/` is an ordinary burn model and knows nothing of ranks, `data/` makes batches of files; `train.rs` is an
//! ordinary burn loop, run by every rank. docs/fine-tuning.md says how to use it.

mod args;
mod checkpoints;
#[path = "../common/mod.rs"]
mod common;
mod data;
mod directory;
mod dry_run;
mod evaluate;
mod generate;
mod input;
#[allow(dead_code, reason = "more than this program needs")]
mod lora;
#[allow(dead_code, unused_imports, reason = "a folder to copy, with more than this program needs")]
mod model;
mod report;
mod schedule;
mod train;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use crate::args::Args;
use crate::common::flags::one_line;
use crate::common::start::{self, Restarts};
use crate::input::Input;

fn main() -> ExitCode {
    env_logger::init();
    let args = match Args::from_command_line() {
        Ok(args) => args,
        Err(help) if !help.use_stderr() => {
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
        Err(wrong) => return fail(2, &one_line(&wrong)),
    };
    let input = match Input::open(&args) {
        Ok(input) => input,
        Err(wrong) => return fail(2, &wrong),
    };
    match run(&args, &input) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => fail(1, &why.to_string()),
    }
}

fn run(args: &Args, input: &Input) -> Result<(), Box<dyn Error>> {
    let said = if args.dry_run {
        start::run(&args.start, (args.axes.ranks, Restarts::default()), args.seed, |rank| {
            dry_run::run(rank, args, input)
        })?
    } else {
        let outcome = start::run(&args.start, (args.axes.ranks, Restarts::default()), args.seed, |rank| {
            train::run(rank, args, input)
        })?;
        // The first rank tells what came of it.
        if let (Some(path), Some(outcome)) = (&args.json, &outcome) {
            outcome.write_json(args, path).map_err(|why| format!("cannot write --json {path:?}: {why}"))?;
        }
        outcome.map(|outcome| outcome.summary(args))
    };
    match said.map(|said| writeln!(io::stdout(), "{said}")) {
        Some(Err(why)) if why.kind() != io::ErrorKind::BrokenPipe => Err(why.into()),
        _ => Ok(()),
    }
}

fn fail(code: u8, message: &str) -> ExitCode {
    eprintln!("finetune: {message}");
    ExitCode::from(code)
}
