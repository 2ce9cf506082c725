//! Draws timetables as text: ranks against time.

use std::fmt::Write;

use super::{Simulation, Timetable};

/// Columns that a grid has at most, before the unit of time is made coarser.
const WIDEST: f64 = 400.0;

/// Actions shown on either side of a marked one.
const AROUND: usize = 4;

impl Simulation {
    /// The step as text: a line for each rank, a column for each unit of time, which is the shortest action. An action
    /// stands where it begins, and `-` follows as long as it runs; `.` is idle.
    ///
    /// ```
    /// use burn_parallel::pipeline_parallel::schedule::{Costs, Routes, Schedule};
    ///
    /// let timetable = Schedule::OneForwardOneBackward.timetable(2, 3)?;
    /// let simulation = timetable.simulate(&Routes::chain(2), &Costs::default())?;
    /// assert_eq!(simulation.grid(), "\
    /// rank 0 | 0F0 0F1 .   .   0B0 --- 0F2 0B1 --- .   0B2 ---
    /// rank 1 | .   1F0 1B0 --- 1F1 1B1 --- 1F2 1B2 --- .   .
    /// ");
    /// # Ok::<(), burn_parallel::Error>(())
    /// ```
    pub fn grid(&self) -> String {
        let shortest = self.events.iter().map(|event| event.end - event.start).filter(|time| *time > 0.0);
        let unit = shortest.fold(f64::INFINITY, f64::min).max(self.makespan / WIDEST);
        let column = |time: f64| if unit.is_finite() && unit > 0.0 { (time / unit).round() as usize } else { 0 };
        let mut rows: Vec<Vec<String>> = vec![Vec::new(); self.busy.len()];
        for event in &self.events {
            let row = &mut rows[event.rank];
            let label = event.action.to_string();
            let begin = column(event.start).max(row.len());
            row.resize(begin, ".".into());
            row.push(label);
            row.resize(column(event.end).max(begin + 1), String::new());
        }
        let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
        let width = rows.iter().flatten().map(String::len).max().unwrap_or_default();
        let mut text = String::new();
        for (rank, mut row) in rows.into_iter().enumerate() {
            row.resize(columns, ".".into());
            let cell = |cell: &String| if cell.is_empty() { "-".repeat(width) } else { format!("{cell:width$}") };
            line(&mut text, self.busy.len(), rank, row.iter().map(cell));
        }
        text
    }
}

/// The rows around one place, in the order of the rows and not in time; the place itself in `>` and `<` if `mark`.
pub(super) fn marked(timetable: &Timetable, rank: usize, place: usize, mark: bool) -> String {
    let window = place.saturating_sub(AROUND)..place + AROUND + 1;
    let cell = |row: usize, at: usize| match timetable.rows()[row].get(at) {
        Some(action) if mark && (row, at) == (rank, place) => format!(">{action}<"),
        Some(action) => format!(" {action} "),
        None => String::new(),
    };
    let cells: Vec<Vec<String>> =
        (0..timetable.ranks()).map(|row| window.clone().map(|at| cell(row, at)).collect()).collect();
    let width = cells.iter().flatten().map(String::len).max().unwrap_or_default();
    let mut text = String::new();
    for (rank, row) in cells.into_iter().enumerate() {
        let dots = (window.start > 0).then(|| "..".to_owned());
        line(
            &mut text,
            timetable.ranks(),
            rank,
            dots.into_iter().chain(row.iter().map(|cell| format!("{cell:width$}"))),
        );
    }
    text.truncate(text.trim_end().len());
    text
}

fn line(text: &mut String, ranks: usize, rank: usize, cells: impl Iterator<Item = String>) {
    let digits = ranks.saturating_sub(1).to_string().len();
    let cells: Vec<String> = cells.collect();
    let _ = writeln!(text, "rank {rank:digits$} | {}", cells.join(" ").trim_end());
}
