//! Trains a small GPT on text: `cargo run --release --example train_lm -- --help`.
//!
//! `gpt.rs` is an ordinary burn model and knows nothing of ranks; `train.rs` is an ordinary burn loop, run by every rank.

mod args;
mod batch;
mod checkpoints;
mod device;
mod gpt;
mod memory;
mod report;
mod sample;
mod start;
mod text;
mod train;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use burn::tensor::Device;

use crate::args::Args;
use crate::sample::{generate, readable};
use crate::text::Text;
use crate::train::{held_out_loss, train};

fn main() -> ExitCode {
    env_logger::init();
    let args = match Args::from_command_line() {
        Ok(args) => args,
        Err(help) if !help.use_stderr() => {
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            // The first paragraph says what is wrong, the others of clap how the usage is.
            let message = wrong.to_string();
            let lines: Vec<&str> = message.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
            let line = lines.join(" ");
            return fail(2, line.strip_prefix("error: ").unwrap_or(&line));
        }
    };
    let text = match Text::load(args.text.as_deref(), args.seq) {
        Ok(text) => text,
        Err(wrong) => return fail(2, &wrong),
    };
    match run(&args, &text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => fail(1, &why.to_string()),
    }
}

fn run(args: &Args, text: &Text) -> Result<(), Box<dyn Error>> {
    let device = Device::flex();
    let args = &if args.auto { batch::choose(args)? } else { args.clone() };
    device.seed(args.seed);
    // Made once, before there are ranks: they would all draw from the same random numbers, in any order.
    let model = args.model().init(&device.autodiff());

    // The first rank tells what came of it.
    let Some(outcome) = start::run(args, |rank| train(rank, model.clone(), args, text))? else { return Ok(()) };

    if let Some(path) = &args.json {
        outcome.write_json(args, path).map_err(|why| format!("cannot write --json {path:?}: {why}"))?;
    }
    let held_out = held_out_loss(&outcome.model, text);
    let sample = readable(&generate(&outcome.model, b"\n", 300, 0.8, args.seed));
    let summary = outcome.summary(args, held_out);
    match writeln!(io::stdout(), "\nThe model writes:\n\n{}\n\n{summary}", sample.trim()) {
        Err(why) if why.kind() != io::ErrorKind::BrokenPipe => Err(why.into()),
        _ => Ok(()),
    }
}

fn fail(code: u8, message: &str) -> ExitCode {
    eprintln!("train_lm: {message}");
    ExitCode::from(code)
}
