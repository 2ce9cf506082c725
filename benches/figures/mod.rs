//! Figures of a bench, kept under a name and compared with those that were kept, as Criterion does with times.
//!
//! `-- --save-baseline NAME` writes them to `target/performance/NAME/BENCH.jsonl`, a line each, where figures that the
//! run did not take stay; `-- --baseline NAME` prints a table of ratios to what is there. `scripts/bench_ratios.py`
//! prints that of all benches between two names, those of Criterion too.

#[allow(dead_code)]
pub mod clock;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Figure {
    figure: String,
    value: f64,
    unit: String,
}

/// What a bench has found.
pub struct Figures {
    bench: &'static str,
    found: BTreeMap<String, Figure>,
}

const FLAGS: [&str; 2] = ["--save-baseline", "--baseline"];

/// The arguments of a bench without flags and what belongs to them.
pub fn arguments() -> Vec<String> {
    let (mut words, mut value) = (Vec::new(), false);
    for word in std::env::args().skip(1) {
        let flag = word.starts_with("--");
        if !flag && !value {
            words.push(word.clone());
        }
        value = FLAGS.contains(&word.as_str());
    }
    words
}

/// The flags, for processes that take figures for this one.
#[allow(dead_code)]
pub fn flags() -> Vec<String> {
    FLAGS.into_iter().filter_map(|name| Some([name.to_owned(), flag(name)?])).flatten().collect()
}

/// The value of a flag.
fn flag(name: &str) -> Option<String> {
    let value = std::env::args().skip_while(|word| word != name).nth(1);
    value.filter(|value| !value.starts_with("--"))
}

/// The middle one; of none NaN.
#[allow(dead_code)]
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Figures {
    pub fn of(bench: &'static str) -> Self {
        Self { bench, found: BTreeMap::new() }
    }

    /// Notes a figure: a name that stays the same from commit to commit, and a unit, `ratio` for one without.
    pub fn note(&mut self, figure: impl Into<String>, value: f64, unit: &str) {
        let figure = figure.into();
        self.found.insert(figure.clone(), Figure { figure, value, unit: unit.into() });
    }

    /// Compares and keeps what was noted, as the flags say.
    pub fn finish(self) {
        if let Some(name) = flag("--baseline") {
            let before = self.kept(&name);
            println!("\n| {} | {name} | now | now over {name} |\n|---|---|---|---|", self.bench);
            for (name, now) in &self.found {
                let Figure { value, unit, .. } = now;
                match before.get(name) {
                    Some(was) => {
                        println!("| {name} | {} {unit} | {value} {unit} | {:.3} |", was.value, value / was.value)
                    }
                    None => println!("| {name} | - | {value} {unit} | - |"),
                }
            }
        }
        if let Some(name) = flag("--save-baseline") {
            let mut all = self.kept(&name);
            let file = self.file(&name);
            all.extend(self.found);
            let line = |figure: &Figure| serde_json::to_string(figure).expect("a figure is plain data") + "\n";
            let lines: String = all.values().map(line).collect();
            let written =
                file.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(&file, lines));
            match written {
                Ok(()) => println!("kept in {}", file.display()),
                Err(problem) => eprintln!("{} cannot be written: {problem}", file.display()),
            }
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        root.join("target").join("performance").join(name).join(format!("{}.jsonl", self.bench))
    }

    /// What was kept under a name.
    fn kept(&self, name: &str) -> BTreeMap<String, Figure> {
        let text = std::fs::read_to_string(self.file(name)).unwrap_or_default();
        let figures = text.lines().filter_map(|line| serde_json::from_str::<Figure>(line).ok());
        figures.map(|figure| (figure.figure.clone(), figure)).collect()
    }
}
