//! Reads and writes timetables in PyTorch's CSV format.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use csv::{ReaderBuilder, Trim, WriterBuilder};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{Action, Timetable, schedule_error};
use crate::Error;
use crate::forms::read_text;

impl Timetable {
    /// Reads a timetable from a file, see [`FromStr`](#impl-FromStr-for-Timetable).
    ///
    /// # Errors
    /// [`Error::Schedule`] if the file cannot be read or is not a timetable.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let named = |problem: String| schedule_error(format!("{}: {problem}", path.display()));
        read_text(path).map_err(named)?.parse().map_err(|error| match error {
            Error::Schedule { problem } => named(problem),
            other => other,
        })
    }
}

/// A line for each rank, actions between commas. Empty cells, which other programs write for idle time, are skipped,
/// and so are lines that begin with `#`. A rank without actions is a line of two quotation marks.
///
/// ```
/// use burn_parallel::pipeline_parallel::schedule::{Routes, Timetable};
///
/// let timetable: Timetable = "
///     ## two ranks, two micro-batches
///     0F0, 0F1,    , 0B0, 0B1
///        , 1F0, 1B0, 1F1, 1B1
/// ".parse()?;
/// timetable.validate(&Routes::chain(2))?;
/// assert_eq!(timetable.to_string(), "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n");
/// # Ok::<(), burn_parallel::Error>(())
/// ```
impl FromStr for Timetable {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        // Trimmed first: the reader knows comments and blank lines only at the very beginning of a line.
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let text = lines.join("\n");
        let mut reader = ReaderBuilder::new();
        reader.has_headers(false).flexible(true).comment(Some(b'#')).trim(Trim::All);
        let mut rows = Vec::new();
        for record in reader.from_reader(text.as_bytes()).records() {
            let record = record.map_err(|problem| schedule_error(problem.to_string()))?;
            let line = record.position().map_or(0, |position| position.line());
            let mut row = Vec::new();
            for (cell, text) in record.iter().enumerate().filter(|(_, text)| !text.is_empty()) {
                let action: Action = text.parse().map_err(|error| match error {
                    Error::Schedule { problem } => schedule_error(format!("line {line}, cell {}: {problem}", cell + 1)),
                    other => other,
                })?;
                row.push(action);
            }
            rows.push(row);
        }
        Self::new(rows)
    }
}

impl fmt::Display for Timetable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut writer = WriterBuilder::new().flexible(true).from_writer(Vec::new());
        for row in self.rows() {
            let cells: Vec<String> =
                if row.is_empty() { vec![String::new()] } else { row.iter().map(Action::to_string).collect() };
            writer.write_record(cells).map_err(|_| fmt::Error)?;
        }
        let text = writer.into_inner().map_err(|_| fmt::Error)?;
        f.write_str(&String::from_utf8_lossy(&text))
    }
}

/// As its text.
impl Serialize for Timetable {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timetable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}
