//! Checks the library on the devices of one machine, in a few minutes, and prints a table. Made to be built on one
//! machine and carried to another that has a GPU and no Rust: see docs/gpu.md, and `scripts/gpu.sh`, which starts it.
//!
//! ```sh
//! cargo run --release --features cuda,wgpu --example gpu_check -- --device cuda --json gpu.json
//! ```
//!
//! Each section runs in a process of its own: one that crashes or hangs is a failed row, and the others run all the
//! same. All of it ends in a time that is given, with a table of what was reached; `--only` goes on with the rest. The
//! exit code is 0 if all passed, 1 if something failed, 2 if nothing failed but something did not run.

#[path = "../../tests/common"]
mod common {
    pub mod failing;
    pub mod priority;
}
mod device;
mod matmul;
mod overhead;
mod report;
mod section;
mod training;
#[path = "../../tests/common/transport_suite/mod.rs"]
mod transport_suite;
mod transports;
mod waits;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use burn_parallel::Error;
use clap::Parser;

use crate::device::Choice;
use crate::report::{Report, Row};
use crate::section::{SECTIONS, Section};

/// Checks burn-parallel on a device.
#[derive(Debug, Parser)]
struct Args {
    /// What to check.
    #[arg(long, value_enum, default_value_t = Choice::Cuda)]
    device: Choice,
    /// Where the results go as JSON, after each check. With --only, what it holds of other sections stays.
    #[arg(long, default_value = "gpu_check.json")]
    json: PathBuf,
    /// Only this section; may be given several times.
    #[arg(long, value_parser = SECTIONS.map(|section| section.name))]
    only: Vec<String>,
    /// Smaller sizes and fewer rounds.
    #[arg(long)]
    quick: bool,
    /// How long all of it may take; the table is printed then, whatever is missing.
    #[arg(long, default_value_t = 540)]
    seconds: u64,
    /// Runs this section here, and writes its rows for the process that started this one.
    #[arg(long, hide = true)]
    child: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match &args.child {
        Some(name) => {
            section::end_with_parent();
            section::run_here(name, args.device, args.quick).map(|()| 0)
        }
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
    let sections: Vec<&Section> = SECTIONS.iter().filter(chosen).collect();
    let mut report = Report { device: args.device.to_string(), machine: args.device.describe(), rows: Vec::new() };
    if !args.only.is_empty()
        && let Some(before) = Report::read(&args.json).filter(|before| before.device == report.device)
    {
        let elsewhere = |row: &Row| sections.iter().all(|section| section.name != row.section);
        report.rows = before.rows.into_iter().filter(elsewhere).collect();
    }
    let end = Instant::now() + Duration::from_secs(args.seconds);
    for (number, section) in sections.iter().enumerate() {
        println!("== {}: {}", section.name, section.what);
        // The others shall come to their turn as well.
        let later = (sections.len() - number - 1) as u32;
        let left = end.saturating_duration_since(Instant::now());
        let deadline = Instant::now() + left.saturating_sub(later * left / (2 * sections.len() as u32));
        section::run_apart(section, args.device, args.quick, deadline, |row| {
            report.rows.push(row);
            // Said at the end, should it not work then either.
            let _ = report.write(&args.json);
        })?;
    }
    report.print();
    report.write(&args.json)?;
    println!("written to {}", args.json.display());
    Ok(report.exit_code())
}
