//! How the table of a plan is printed: whole, or in short.

use std::fmt;

use super::compressed_paths::compress_paths;
use super::table::{PlanRow, PlanTable};

impl fmt::Display for PlanTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write(self, self.rows(), f)
    }
}

/// A table in which parameters that lie alike, and whose paths differ in numbers only, are one row.
struct Short<'a>(&'a PlanTable);

impl fmt::Display for Short<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write(self.0, &merged(self.0.rows()), f)
    }
}

impl PlanTable {
    /// Prints as the table does, with one row for the parameters of all layers that have the same name, dims and
    /// layouts: with how many there are, and the bytes of all.
    ///
    /// ```
    /// use burn::{nn::{Linear, LinearConfig}, prelude::*};
    /// use burn_parallel::plan::Plan;
    ///
    /// let layer = || LinearConfig::new(4, 6).init(&Device::flex());
    /// let model: Vec<Linear> = vec![layer(), layer(), layer()];
    /// let said = Plan::new().shard("*weight", 1).table(&model, 2)?.in_short().to_string();
    /// assert!(said.contains("{0-2}.weight (3)") && said.lines().count() == 4);
    /// # Ok::<(), burn_parallel::Error>(())
    /// ```
    pub fn in_short(&self) -> impl fmt::Display + '_ {
        Short(self)
    }
}

/// The path without the numbers in it.
fn pattern(path: &str) -> Vec<&str> {
    path.split('.').map(|name| if name.parse::<usize>().is_ok() { "*" } else { name }).collect()
}

fn merged(rows: &[PlanRow]) -> Vec<PlanRow> {
    let alike = |one: &PlanRow, other: &PlanRow| {
        let lies = |row: &PlanRow| (row.dims.clone(), row.dtype, row.layouts.clone(), row.local_dims.clone());
        pattern(&one.path) == pattern(&other.path) && lies(one) == lies(other)
    };
    let mut groups: Vec<Vec<&PlanRow>> = Vec::new();
    for row in rows {
        match groups.iter_mut().find(|group| alike(group[0], row)) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    let one = |group: Vec<&PlanRow>| {
        let paths = compress_paths(group.iter().map(|row| row.path.as_str()));
        let path = match group.len() {
            1 => group[0].path.clone(),
            many => format!("{} ({many})", paths.trim_matches('`')),
        };
        PlanRow { path, bytes: group.iter().map(|row| row.bytes).sum(), ..group[0].clone() }
    };
    groups.into_iter().map(one).collect()
}

fn write(table: &PlanTable, rows: &[PlanRow], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let names = table.axes().iter().map(|(name, size)| format!("{name} {size}"));
    let head: Vec<String> = ["parameter".into(), "dims".into()]
        .into_iter()
        .chain(names)
        .chain(["local dims".into(), "bytes".into()])
        .collect();
    let line = |row: &PlanRow| -> Vec<String> {
        let (dims, local) = (format!("{:?}", row.dims), format!("{:?}", row.local_dims));
        let layouts = row.layouts.iter().map(ToString::to_string);
        [row.path.clone(), dims].into_iter().chain(layouts).chain([local, row.bytes.to_string()]).collect()
    };
    let lines: Vec<Vec<String>> = std::iter::once(head).chain(rows.iter().map(line)).collect();
    let columns = table.axes().len() + 4;
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for line in &lines {
        let (bytes, words) = line.split_last().map_or(("", &line[..]), |(last, rest)| (last.as_str(), rest));
        for (word, width) in words.iter().zip(&widths) {
            write!(f, "{word:width$}  ")?;
        }
        writeln!(f, "{bytes:>width$}", width = widths[columns - 1])?;
    }
    let (bytes, degree, share) = (table.bytes(), table.degree(), 100.0 * table.whole_share());
    let all = table.model_bytes();
    write!(
        f,
        "{bytes} bytes on each of {degree} ranks; of the model's {all} bytes {share:.1} % are whole on every rank"
    )?;
    match table.mostly_whole() {
        Some(warning) => write!(f, "\n{warning}"),
        None => Ok(()),
    }
}
