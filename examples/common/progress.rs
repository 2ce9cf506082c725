//! How far a training is.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

use burn_parallel::prelude::*;

use super::program::running;

/// Without a terminal, a line appears this often.
const EVERY: Duration = Duration::from_secs(5);

/// Tells how far the training is: a bar on a terminal, a line now and then elsewhere, nothing on ranks but the first.
pub struct Progress {
    shown: Option<Shown>,
    steps: usize,
    tokens: usize,
    /// How long the program had been running when it began.
    before: Duration,
    started: Instant,
    /// How long each step took.
    seconds: Vec<f64>,
    /// The processor time of this process before the first step and after each, where the system tells.
    processor: Vec<f64>,
    spoke: Option<Instant>,
}

/// What steps took, in seconds.
#[derive(Clone, Debug, Default)]
pub struct Seconds {
    /// From the start of the program to the first step.
    pub before: f64,
    /// Each step.
    pub steps: Vec<f64>,
    /// The processor time of each step, of all ranks in this process together; none where the system does not tell.
    pub processor: Vec<f64>,
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
            // What is learned and what it takes in lines of their own: together they are wider than many terminals.
            let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} steps, {eta} left\n{wide_msg}\n{prefix}");
            let bar = ProgressBar::new(steps as u64).with_finish(ProgressFinish::Abandon);
            Shown::Bar(bar.with_style(style.unwrap_or(ProgressStyle::default_bar())))
        });
        let (before, started) = (running(), Instant::now());
        Self {
            shown,
            steps,
            tokens: 0,
            before,
            started,
            seconds: Vec::new(),
            processor: processor().into_iter().collect(),
            spoke: None,
        }
    }

    /// What the steps so far took.
    pub fn seconds(&self) -> Seconds {
        let processor = self.processor.windows(2).map(|pair| pair[1] - pair[0]).collect();
        Seconds { before: self.before.as_secs_f64(), steps: self.seconds.clone(), processor }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Tells something else, on the rank that speaks.
    pub fn note(&self, said: &str) {
        match &self.shown {
            Some(Shown::Bar(bar)) => bar.suspend(|| eprintln!("{said}")),
            Some(Shown::Lines) => eprintln!("{said}"),
            None => {}
        }
    }

    /// Tells of a step: its tokens over all ranks, and what `what` says of learning and of what it takes, given the
    /// time so far.
    pub fn step(&mut self, step: usize, tokens: usize, what: impl FnOnce(Duration) -> [String; 2]) {
        self.tokens += tokens;
        self.seconds.push(self.elapsed().as_secs_f64() - self.seconds.iter().sum::<f64>());
        self.processor.extend(processor());
        let Some(shown) = &self.shown else { return };
        let done = step + 1;
        let due = || done == self.steps || self.spoke.is_none_or(|at| at.elapsed() >= EVERY);
        if matches!(shown, Shown::Lines) && !due() {
            return;
        }
        let elapsed = self.elapsed();
        let speed = self.tokens as f64 / elapsed.as_secs_f64();
        let [learned, more] = what(elapsed);
        let more = if more.is_empty() { more } else { format!(", {more}") };
        let took = format!("{speed:.0} tokens/s{more}");
        match shown {
            Shown::Bar(bar) => {
                bar.set_message(learned);
                bar.set_prefix(took);
                bar.set_position(done as u64);
                if done == self.steps {
                    bar.finish();
                }
            }
            Shown::Lines => {
                eprintln!("step {done}/{}: {learned}, {took}", self.steps);
                self.spoke = Some(Instant::now());
            }
        }
    }
}

/// Demands that what came of the step of this number is a number: nothing can be learned from another, nor is it saved.
pub fn finite(what: &str, number: usize, value: f64) -> Result<(), Error> {
    match value.is_finite() {
        true => Ok(()),
        false => Err(Error::user(format!("the {what} of step {} is {value}: a lower --lr may help", number + 1))),
    }
}

/// The processor time that this process has taken, in seconds, where the system has a clock of it.
#[cfg(unix)]
fn processor() -> Option<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid `timespec`, which the call fills.
    let code = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    (code == 0).then_some(time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64)
}

#[cfg(not(unix))]
fn processor() -> Option<f64> {
    None
}
