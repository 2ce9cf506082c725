//! Measures what `docs/strategies.md` tells, and draws its figures:
//! `cargo run --release --example strategies -- --text FILE --out docs/figures`.
//!
//! One small GPT under every strategy, and with small and large batches. Tables go to standard output, as Markdown.

#[path = "../common/mod.rs"]
#[allow(dead_code, reason = "what programs share that train one model")]
mod common;
mod critical;
mod curves;
mod figures;
#[path = "../train_lm/gpt.rs"]
#[allow(dead_code)]
mod gpt;
mod strategies;
#[path = "../train_lm/text.rs"]
#[allow(dead_code)]
mod text;
mod training;

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use crate::common::command_line::parse;
use crate::common::program::{self, Failure};
use crate::text::Text;
use crate::training::Sizes;

/// Compares strategies, and small batches with large ones, on a small GPT.
#[derive(Parser, Debug)]
#[command(name = "strategies", max_term_width = 100)]
struct Flags {
    /// The text to learn from, UTF-8 [default: the one that comes with `train_lm`]
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,

    /// Where the figures go
    #[arg(long, value_name = "DIR", default_value = "target/figures")]
    out: PathBuf,

    /// How many seeds the curves are of
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,

    /// Which parts are measured [default: all]
    #[arg(long, value_name = "PARTS", value_enum, value_delimiter = ',')]
    only: Vec<Part>,

    /// A run of seconds that shows that all of it works, and measures nothing of worth
    #[arg(long)]
    quick: bool,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The table of all strategies
    Strategies,
    /// Small and large batches: a table, and the figures
    Curves,
    /// The critical batch size by branches: a table
    Critical,
}

fn main() -> ExitCode {
    program::run(parse().map(|(flags, _)| flags), |flags: &Flags| run(flags).map(|()| None))
}

fn run(flags: &Flags) -> Result<(), Failure> {
    let wrong = |why: &dyn Display| format!("{}: {why}", flags.out.display());
    let sizes = if flags.quick { Sizes::quick() } else { Sizes::full() };
    let text = Text::load(flags.text.as_deref(), sizes.seq).map_err(Failure::Refused)?;
    std::fs::create_dir_all(&flags.out).map_err(|why| Failure::Refused(format!("--out {}", wrong(&why))))?;
    let wanted = |part| flags.only.is_empty() || flags.only.contains(&part);
    if wanted(Part::Strategies) {
        program::tell(&strategies::measure(&sizes)?)?;
    }
    if wanted(Part::Curves) {
        let curves = curves::measure(&sizes, &text, flags.seeds)?;
        program::tell(&curves::table(&curves))?;
        figures::draw(&curves, sizes.seq, &flags.out).map_err(|why| wrong(&why))?;
    }
    if wanted(Part::Critical) {
        program::tell(&critical::measure(&sizes, &text, flags.seeds)?)?;
    }
    Ok(())
}
