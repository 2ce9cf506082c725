//! What was checked and how it went: a table to read, JSON to keep.

use std::fmt;
use std::path::Path;

use burn_parallel::Error;
use comfy_table::{ContentArrangement, Table, presets};
use serde::{Deserialize, Serialize};

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It ran and was right.
    Passed,
    /// It ran and was wrong, or did not come to its end.
    Failed,
    /// It did not run: something is missing here.
    Skipped,
    /// It did not run: the library says that it does not do this on this device.
    Refused,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passed => "passed",
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
            Self::Refused => "refused",
        })
    }
}

/// Something that was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figure {
    pub name: String,
    pub value: f64,
    pub unit: String,
}

/// One check.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub section: String,
    pub name: String,
    pub outcome: Outcome,
    /// Why, where it did not pass.
    pub detail: String,
    pub seconds: f64,
    pub figures: Vec<Figure>,
}

/// What a check returns when it passes: what it measured.
pub type Figures = Vec<Figure>;

pub fn figure(name: impl Into<String>, value: f64, unit: &str) -> Figure {
    Figure { name: name.into(), value, unit: unit.into() }
}

/// Why a check did not pass.
#[derive(Debug)]
pub enum Shortfall {
    Failed(String),
    Skipped(String),
    Refused(String),
}

impl From<Error> for Shortfall {
    fn from(error: Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<Result<Figures, Shortfall>> for Verdict {
    fn from(result: Result<Figures, Shortfall>) -> Self {
        match result {
            Ok(figures) => Self { outcome: Outcome::Passed, detail: String::new(), figures },
            Err(Shortfall::Failed(detail)) => Self { outcome: Outcome::Failed, detail, figures: Vec::new() },
            Err(Shortfall::Skipped(detail)) => Self { outcome: Outcome::Skipped, detail, figures: Vec::new() },
            Err(Shortfall::Refused(detail)) => Self { outcome: Outcome::Refused, detail, figures: Vec::new() },
        }
    }
}

/// How a check went, without its name.
pub struct Verdict {
    pub outcome: Outcome,
    pub detail: String,
    pub figures: Figures,
}

/// All checks of a run, and what they ran on.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub device: String,
    pub machine: Vec<String>,
    pub rows: Vec<Row>,
}

impl Report {
    fn count(&self, outcome: Outcome) -> usize {
        self.rows.iter().filter(|row| row.outcome == outcome).count()
    }

    /// 0 if all passed, 1 if something failed, 2 if something did not run.
    pub fn exit_code(&self) -> u8 {
        match (self.count(Outcome::Failed), self.count(Outcome::Skipped) + self.count(Outcome::Refused)) {
            (0, 0) if !self.rows.is_empty() => 0,
            (0, _) => 2,
            _ => 1,
        }
    }

    pub fn print(&self) {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(["section", "check", "outcome", "s", "figures, or why"]);
        for row in &self.rows {
            let figures = row.figures.iter().map(|one| format!("{} {} {}", one.name, short(one.value), one.unit));
            // The first line says it; the JSON has the rest.
            let why: String = row.detail.lines().next().unwrap_or_default().chars().take(150).collect();
            let last = if why.is_empty() { figures.collect::<Vec<_>>().join(", ") } else { why };
            let seconds = format!("{:.1}", row.seconds);
            table.add_row([&row.section, &row.name, &row.outcome.to_string(), &seconds, &last]);
        }
        println!("\ndevice: {}", self.device);
        self.machine.iter().for_each(|line| println!("{line}"));
        println!("\n{table}\n");
        println!(
            "{} passed, {} failed, {} skipped, {} refused",
            self.count(Outcome::Passed),
            self.count(Outcome::Failed),
            self.count(Outcome::Skipped),
            self.count(Outcome::Refused)
        );
    }

    /// What was written there before, if it was this.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let json = serde_json::to_string_pretty(self).map_err(Error::user)?;
        std::fs::write(path, json + "\n").map_err(|error| Error::user(format!("{}: {error}", path.display())))
    }
}

/// A number with three digits that tell.
fn short(value: f64) -> String {
    match value.abs() {
        x if x >= 100.0 => format!("{value:.0}"),
        x if x >= 10.0 => format!("{value:.1}"),
        x if x >= 0.1 || x == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.1e}"),
    }
}
