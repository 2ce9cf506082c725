//! Checks the library on the devices of one machine, in a few minutes, and prints a table. Made to be built on one machine
//! and carried to another that has a GPU and no Rust: see docs/gpu.md, and `scripts/gpu.sh`, which starts it.
//!
//! ```sh
//! cargo run --release --features cuda,wgpu --example gpu_check -- --device cuda --json gpu.json
//! ```
//!
//! Each section runs in a process of its own: one that crashes or hangs is a failed row, and the others run all the same.
//! The exit code is 0 if all passed, 1 if something failed, 2 if nothing failed but something did not run.

mod device;
mod matmul;
mod overhead;
mod report;
mod section;
mod training;
#[path = "../../tests/transport_suite/mod.rs"]
mod transport_suite;
mod transports;
mod waits;

use std::path::PathBuf;
use std::process::ExitCode;

use burn_parallel::Error;
use clap::Parser;

use crate::device::Choice;
use crate::report::Report;
use crate::section::{SECTIONS, Section};

/// Checks burn-parallel on a device.
#[derive(Debug, Parser)]
struct Args {
    /// What to check.
    #[arg(long, value_enum, default_value_t = Choice::Cuda)]
    device: Choice,
    /// Where the results go as JSON.
    #[arg(long, default_value = "gpu_check.json")]
    json: PathBuf,
    /// Only this section; may be given several times.
    #[arg(long, value_parser = SECTIONS.map(|section| section.name))]
    only: Vec<String>,
    /// Smaller sizes and fewer rounds.
    #[arg(long)]
    quick: bool,
    /// Runs this section here, and writes its rows for the process that started this one.
    #[arg(long, hide = true)]
    child: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match &args.child {
        Some(name) => section::run_here(name, args.device, args.quick).map(|()| 0),
        None => check(&args),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn check(args: &Args) -> Result<u8, Error> {
    let chosen = |section: &&Section| args.only.is_empty() || args.only.iter().any(|name| name == section.name);
    let mut rows = Vec::new();
    for section in SECTIONS.iter().filter(chosen) {
        println!("== {}: {}", section.name, section.what);
        rows.extend(section::run_apart(section, args.device, args.quick)?);
    }
    let report = Report { device: args.device.to_string(), machine: args.device.describe(), rows };
    report.print();
    report.write(&args.json)?;
    println!("written to {}", args.json.display());
    Ok(report.exit_code())
}
