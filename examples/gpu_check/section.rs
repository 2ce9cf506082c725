//! Sections: groups of checks that run in one process, apart from the others.

use std::io::{BufRead, BufReader, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use burn_parallel::Error;

use crate::device::Choice;
use crate::report::{Figures, Outcome, Row, Shortfall, Verdict};
use crate::{matmul, overhead, training, transports};

/// What a row of the section's process begins with.
const MARK: &str = "gpu_check row ";
/// How long a section may take without a new row.
const PATIENCE: Duration = Duration::from_secs(240);

/// A group of checks.
pub struct Section {
    pub name: &'static str,
    pub what: &'static str,
    run: fn(&mut Checks),
}

pub const SECTIONS: [Section; 4] = [
    Section { name: "transports", what: "what ranks do together, on this device", run: transports::run },
    Section { name: "matmul", what: "a multiplication split over ranks, beside a plain one", run: matmul::run },
    Section { name: "training", what: "a small language model, split, beside one device", run: training::run },
    Section { name: "overhead", what: "our all-reduce beside the bare call of NCCL", run: overhead::run },
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
    (section.run)(&mut Checks { section: section.name, device, quick });
    Ok(())
}

/// Runs a section in a process of its own.
pub fn run_apart(section: &Section, device: Choice, quick: bool) -> Result<Vec<Row>, Error> {
    let mut command = Command::new(std::env::current_exe().map_err(Error::user)?);
    command.args(["--child", section.name, "--device", &device.to_string()]).stdout(Stdio::piped());
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
    let (mut rows, mut last) = (Vec::<Row>::new(), String::from("its start"));
    let ended = loop {
        match lines.recv_timeout(PATIENCE) {
            Ok(line) => match line.strip_prefix(MARK).map(serde_json::from_str) {
                Some(Ok(row)) => rows.push(row),
                Some(Err(error)) => return Err(Error::user(format!("a row cannot be read: {error}"))),
                None => {
                    println!("{line}");
                    last = line.trim().into();
                }
            },
            Err(RecvTimeoutError::Disconnected) => {
                let status = child.wait().map_err(Error::user)?;
                break (!status.success()).then(|| format!("ended in `{last}`: {status}"));
            }
            Err(RecvTimeoutError::Timeout) => {
                let _ = child.kill();
                let _ = child.wait();
                break Some(format!("no end of `{last}` in {PATIENCE:?}"));
            }
        }
    };
    if let Some(detail) = ended.or_else(|| rows.is_empty().then(|| "it checked nothing".into())) {
        let (section, name) = (section.name.into(), "the section".into());
        let (outcome, figures) = (Outcome::Failed, Vec::new());
        rows.push(Row { section, name, outcome, detail, seconds: 0.0, figures });
    }
    Ok(rows)
}
