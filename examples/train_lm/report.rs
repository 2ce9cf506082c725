//! What a run tells: a progress bar on the way, a table and a JSON file at the end.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::{Duration, Instant};

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::args::Args;

/// Without a terminal, a line appears this often.
const EVERY: Duration = Duration::from_secs(2);

/// Tells how far the training is: a bar on a terminal, a line now and then elsewhere, nothing on ranks but the first.
pub struct Progress {
    shown: Option<Shown>,
    steps: usize,
    tokens: usize,
    started: Instant,
    spoke: Option<Instant>,
}

enum Shown {
    Bar(ProgressBar),
    Lines,
}

impl Progress {
    /// Starts the clock; only one rank speaks.
    pub fn new(steps: usize, speaks: bool) -> Self {
        let shown = speaks.then(|| {
            if !io::stderr().is_terminal() {
                return Shown::Lines;
            }
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} steps, {eta} left, {msg}");
            Shown::Bar(ProgressBar::new(steps as u64).with_style(style.unwrap_or(ProgressStyle::default_bar())))
        });
        Self { shown, steps, tokens: 0, started: Instant::now(), spoke: None }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Tells of a step: its loss, its tokens over all ranks, and the time that went into communication so far.
    pub fn step(&mut self, step: usize, loss: f64, tokens: usize, communication: Duration) {
        self.tokens += tokens;
        let Some(shown) = &self.shown else { return };
        let seconds = self.elapsed().as_secs_f64();
        let message = format!(
            "loss {loss:.4}, {:.0} tokens/s, {:.1} % communication",
            self.tokens as f64 / seconds,
            100.0 * communication.as_secs_f64() / seconds
        );
        let done = step + 1;
        match shown {
            Shown::Bar(bar) => {
                bar.set_message(message);
                bar.set_position(done as u64);
                if done == self.steps {
                    bar.finish();
                }
            }
            Shown::Lines if done == self.steps || self.spoke.is_none_or(|at| at.elapsed() >= EVERY) => {
                eprintln!("step {done}/{}: {message}", self.steps);
                self.spoke = Some(Instant::now());
            }
            Shown::Lines => {}
        }
    }
}

/// What came of a training.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The loss of each step over the whole batch, in nats per byte.
    pub losses: Vec<f64>,
    /// The loss on text that was held out, if there was enough of it.
    pub held_out: Option<f64>,
    /// The tokens of all steps and ranks.
    pub tokens: usize,
    /// The time that the steps took.
    pub elapsed: Duration,
    /// The part of it that the rank spent waiting for communication.
    pub communication: Duration,
    /// The bytes that the rank sent in all steps.
    pub bytes_sent: u64,
    /// The collectives that the rank called in all steps.
    pub calls: u64,
    /// How many numbers the model learned.
    pub parameters: usize,
    /// Text that the trained model wrote.
    pub sample: String,
}

#[derive(Serialize)]
struct Json<'a> {
    losses: &'a [f64],
    tokens_per_second: f64,
    axes: BTreeMap<&'static str, usize>,
    bytes_sent_per_step: f64,
    calls_per_step: f64,
    parameters: usize,
}

impl Outcome {
    /// Tokens of all ranks per second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.elapsed.as_secs_f64()
    }

    fn per_step(&self, total: u64) -> f64 {
        total as f64 / self.losses.len() as f64
    }

    /// Writes the outcome as JSON.
    pub fn write_json(&self, args: &Args, path: &Path) -> io::Result<()> {
        let json = Json {
            losses: &self.losses,
            tokens_per_second: self.tokens_per_second(),
            axes: BTreeMap::from([("dp", args.dp)]),
            bytes_sent_per_step: self.per_step(self.bytes_sent),
            calls_per_step: self.per_step(self.calls),
            parameters: self.parameters,
        };
        fs::write(path, serde_json::to_string(&json)? + "\n")
    }

    /// The sample and the table that end a run.
    pub fn summary(&self, args: &Args) -> String {
        let Self { losses, elapsed, .. } = self;
        let seconds = elapsed.as_secs_f64();
        let mut table = Table::new();
        table.load_preset(UTF8_FULL_CONDENSED);
        let mut row = |name: &str, value: String| {
            table.add_row([name.to_owned(), value]);
        };
        row("ranks", format!("{} (dp {})", args.ranks, args.dp));
        row(
            "model",
            format!(
                "{} parameters: {} layers, width {}, {} heads",
                self.parameters, args.layers, args.d_model, args.heads
            ),
        );
        row(
            "training",
            format!(
                "{} steps of {} x {} bytes, at most {} rows at once",
                args.steps, args.batch, args.seq, args.micro_batch
            ),
        );
        row("loss, first step", format!("{:.4} nats per byte", losses[0]));
        row("loss, last steps", format!("{:.4} nats per byte", last_tenth(losses)));
        row(
            "loss, held-out text",
            match self.held_out {
                Some(loss) => format!("{loss:.4} nats per byte"),
                None => "none: the text is too short".into(),
            },
        );
        row("time", format!("{seconds:.1} s, {:.0} tokens/s", self.tokens_per_second()));
        row(
            "communication",
            format!(
                "{:.1} % of the time, {:.0} bytes and {:.1} calls a step and rank",
                100.0 * self.communication.as_secs_f64() / seconds,
                self.per_step(self.bytes_sent),
                self.per_step(self.calls)
            ),
        );
        format!("\nThe model writes:\n\n{}\n\n{table}\n", self.sample.trim())
    }
}

/// The mean over the last tenth of the steps: single batches differ.
fn last_tenth(losses: &[f64]) -> f64 {
    let last = &losses[losses.len() - losses.len().div_ceil(10)..];
    last.iter().sum::<f64>() / last.len() as f64
}
