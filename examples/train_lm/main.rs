//! Trains a small GPT on text: `cargo run --release --example train_lm -- --help`.
//!
//! `gpt.rs` is an ordinary burn model and knows nothing of ranks; `train.rs` is an ordinary burn loop.

mod args;
mod gpt;
mod report;
mod sample;
mod text;
mod train;

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use burn::tensor::Device;

use crate::args::Args;
use crate::text::Text;

fn main() -> ExitCode {
    env_logger::init();
    let args = match Args::from_command_line() {
        Ok(args) => args,
        Err(help) if !help.use_stderr() => {
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            // The first line says what is wrong, the others of clap how the usage is.
            let message = wrong.to_string();
            let line = message.lines().next().unwrap_or_default();
            return fail(2, line.strip_prefix("error: ").unwrap_or(line));
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
    if args.ranks > 1 {
        return Err(format!("--ranks {}: this version trains on one rank only", args.ranks).into());
    }
    let device = Device::flex().autodiff();
    device.seed(args.seed);
    let model = args.model().init(&device);

    let (train, held_out) = text.split();
    eprintln!("{train} bytes to learn from, {held_out} held out");
    let outcome = train::train(model, &device, args, text)?;

    if let Some(path) = &args.json {
        outcome.write_json(args, path).map_err(|why| format!("cannot write --json {path:?}: {why}"))?;
    }
    match io::stdout().write_all(outcome.summary(args).as_bytes()) {
        Err(why) if why.kind() != io::ErrorKind::BrokenPipe => Err(why.into()),
        _ => Ok(()),
    }
}

fn fail(code: u8, message: &str) -> ExitCode {
    eprintln!("train_lm: {message}");
    ExitCode::from(code)
}
