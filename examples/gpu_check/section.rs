//! Sections: groups of checks that run in one process, apart from the others.

use std::io::{BufRead, BufReader, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use burn_parallel::Error;

use crate::common::priority::ranks_come_last;
use crate::device::Choice;
use crate::report::{Figures, Outcome, Row, Shortfall, Verdict};
use crate::{matmul, overhead, training, transports};

/// What a row of the section's process begins with.
const MARK: &str = "gpu_check row ";
/// How long a section may take without a new line.
const TIME_OUT: Duration = Duration::from_secs(150);

/// A group of checks.
pub struct Section {
    pub name: &'static str,
    pub what: &'static str,
    run: fn(&mut Checks),
}

/// What takes longest comes last.
pub const SECTIONS: [Section; 4] = [
    Section { name: "transports", what: "what ranks do together, on this device", run: transports::run },
    Section { name: "overhead", what: "our all-reduce beside the bare call of NCCL", run: overhead::run },
    Section { name: "training", what: "a small language model, split, beside one device", run: training::run },
    Section { name: "matmul", what: "multiplications split over ranks, beside a plain one", run: matmul::run },
];

/// The checks of a section as they run.
pub struct Checks {
    section: &'static str,
    pub device: Choice,
    pub quick: bool,
}

impl Checks {
    /// Runs a check and tells how it went, whatever it does.
    pub fn check(&mut self, name: impl Into<String>, body: impl FnOnce() -> Result<Figures, Shortfall>) {
        let (name, began) = (name.into(), Instant::now());
        println!("   {name}");
        let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(Shortfall::Failed(format!("panicked: {}", text.unwrap_or("(no message)"))))
        });
        let Verdict { outcome, detail, figures } = result.into();
        let seconds = began.elapsed().as_secs_f64();
        let row = Row { section: self.section.into(), name, outcome, detail, seconds, figures };
        match serde_json::to_string(&row) {
            Ok(row) => println!("{MARK}{row}"),
            Err(error) => eprintln!("a row cannot be written: {error}"),
        }
        let _ = std::io::stdout().flush();
    }
}

/// Runs a section in this process.
pub fn run_here(name: &str, device: Choice, quick: bool) -> Result<(), Error> {
    let unknown = || Error::user(format!("there is no section {name}"));
    let section = SECTIONS.iter().find(|section| section.name == name).ok_or_else(unknown)?;
    // What is measured is to be what there is; a quick look may be one at a software device.
    if quick && device.open(0).is_ok() {
        ranks_come_last();
    }
    (section.run)(&mut Checks { section: section.name, device, quick });
    Ok(())
}

/// Ends this process when the one that started it has gone: a section that hangs would keep the GPU.
pub fn end_with_parent() {
    thread::spawn(|| {
        // Nothing is ever written to it.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(1);
    });
}

/// Runs a section in a process of its own, which ends at `deadline` at the latest. `told` gets each row as it comes.
pub fn run_apart(
    section: &Section,
    device: Choice,
    quick: bool,
    deadline: Instant,
    mut told: impl FnMut(Row),
) -> Result<(), Error> {
    let mut empty = true;
    let about = |outcome: Outcome, detail: String| {
        let (section, name) = (section.name.into(), "the section".into());
        Row { section, name, outcome, detail, seconds: 0.0, figures: Vec::new() }
    };
    let again = format!("`--only {}` runs it by itself, `--seconds` gives more", section.name);
    if deadline <= Instant::now() {
        told(about(Outcome::Skipped, format!("no time was left for it; {again}")));
        return Ok(());
    }
    let mut command = Command::new(std::env::current_exe().map_err(Error::user)?);
    command.args(["--child", section.name, "--device", &device.to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    if quick {
        command.arg("--quick");
    }
    let mut child = command.spawn().map_err(Error::user)?;
    let (sender, lines) = channel();
    if let Some(stdout) = child.stdout.take() {
        thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
    }
    let mut last = String::from("its start");
    let ended = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left.min(TIME_OUT)) {
            Ok(line) => match line.strip_prefix(MARK).map(serde_json::from_str) {
                Some(Ok(row)) => {
                    empty = false;
                    told(row);
                }
                Some(Err(error)) => break Some(about(Outcome::Failed, format!("a row cannot be read: {error}"))),
                None => {
                    println!("{line}");
                    last = line.trim().into();
                }
            },
            Err(RecvTimeoutError::Disconnected) => {
                let status = child.wait().map_err(Error::user)?;
                break (!status.success()).then(|| about(Outcome::Failed, format!("ended in `{last}`: {status}")));
            }
            Err(RecvTimeoutError::Timeout) if left > TIME_OUT => {
                break Some(about(Outcome::Failed, format!("no end of `{last}` in {TIME_OUT:?}")));
            }
            Err(RecvTimeoutError::Timeout) => {
                break Some(about(Outcome::Skipped, format!("no time was left from `{last}` on; {again}")));
            }
        }
    };
    // Whatever it still does.
    let _ = child.kill();
    let _ = child.wait();
    match ended {
        Some(why) => told(why),
        None if empty => told(about(Outcome::Failed, "it checked nothing".into())),
        None => {}
    }
    Ok(())
}
