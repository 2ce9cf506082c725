//! What a run tells: on the way how fast it is, at its end a table and a JSON file.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use burn_parallel::batch::BatchSplit;
use serde::{Deserialize, Serialize};

use crate::args::{Args, Length};
use crate::common::batch::Batch;
use crate::common::figures::{Figures, Json as FiguresJson, row, table};
use crate::common::flags::count;
use crate::common::usage::PipelineUsage;
use crate::data::set::BatchSize;

/// The held-out loss after so many steps, in nats per token.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct HeldOut {
    pub step: usize,
    pub loss: f64,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Losses in nats per token, and what they took.
    pub figures: Figures,
    /// The parameters of the model, without adapters.
    pub parameters: usize,
    pub held_out: Vec<HeldOut>,
    /// The prompt with what the model adds to it.
    pub sample: Option<String>,
    /// How large the batch was in the end, and how noisy the gradient.
    pub batch: Batch,
}

#[derive(Serialize)]
struct Json<'a> {
    #[serde(flatten)]
    figures: FiguresJson<'a>,
    held_out: &'a [HeldOut],
    rows: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    noise_scale_rows: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sample: Option<&'a str>,
}

impl Outcome {
    /// Writes the outcome as JSON.
    pub fn write_json(&self, args: &Args, path: &Path) -> io::Result<()> {
        let figures = self.figures.json(args.axes, self.parameters);
        let json = Json {
            figures,
            held_out: &self.held_out,
            rows: self.batch.rows(),
            noise_scale_rows: self.batch.noise_rows().ok(),
            sample: self.sample.as_deref(),
        };
        fs::write(path, serde_json::to_string(&json)? + "\n")
    }

    /// How the last batch was divided.
    fn divided(&self, args: &Args) -> String {
        let at_once = args.rows.div_ceil(args.in_pipeline());
        match BatchSplit::of(&args.strategy, args.axes.ranks, self.batch.rows(), Some(at_once)) {
            Ok(split) if args.batch() > 0 => split.to_string(),
            // Rows that only have tokens in common, or fewer than there are micro-batches: they are filled up.
            _ => format!("{}, at most {} at once", count(args.axes.dp, "replica"), count(at_once, "row")),
        }
    }

    /// What ends a run: the sample and a table.
    pub fn summary(&self, args: &Args) -> String {
        let per_token = "nats per token";
        let batch = match args.size {
            BatchSize::Rows(rows) => format!("{} x {} tokens", self.batch.sizes(rows), args.seq),
            BatchSize::Tokens { most, .. } => format!("at most {most} tokens in rows of {}", args.seq),
        };
        let length = match args.length {
            Length::Steps(steps) => format!("{steps} steps"),
            Length::Epochs(epochs) => format!("{epochs} epochs, {} steps", self.figures.losses.len()),
        };
        let mut rows = vec![
            row("ranks", args.axes.to_string()),
            row("model", format!("{} parameters: {}", self.parameters, args.model.display())),
        ];
        // Of a run that had all its steps behind it there is nothing to tell of them.
        let trained = self.figures.steps > 0;
        if trained {
            rows.push(row("training", format!("{length} of {batch}, at most {} at once", count(args.rows, "row"))));
        }
        if let Some(lora) = &args.lora {
            rows.push(row("adapters", format!("rank {}, on {}", lora.rank, lora.targets.join(", "))));
        }
        if trained {
            rows.push(row("batch", self.divided(args)));
            rows.push(row("gradient noise scale", self.batch.advice(args.growth)));
        }
        rows.extend(self.figures.losses(per_token));
        if let Some(last) = self.held_out.last() {
            rows.push(row("loss, held-out data", format!("{:.4} {per_token}, after step {}", last.loss, last.step)));
        }
        rows.extend(self.figures.costs(args.clip, args.axes, &args.strategy));
        rows.extend(args.saving.save.iter().map(|dir| row("written to", dir.display().to_string())));
        let table = table(rows);
        match &self.sample {
            Some(sample) => format!("\nThe model writes:\n\n{}\n\n{table}", harmless(sample)),
            None => table,
        }
    }
}

/// How fast a run is.
pub struct Speed {
    /// Floating point operations a token, forward and backward.
    operations: f64,
    /// Those that all ranks together can make in a second.
    peak: Option<f64>,
    /// Whether it is known how long ranks wait for each other: not within layers that they share.
    waits: bool,
}

impl Speed {
    pub fn new(args: &Args) -> Self {
        let config = &args.config;
        let heads = (config.heads + config.kv_heads) * 2 * config.head_size;
        let layer = config.width * (heads + 3 * config.inner);
        let weights = (config.layers * layer + config.width * config.vocab) as f64;
        // Each token sees half the row before it, twice: in the scores and in their sum.
        let scores = (config.layers * config.heads * config.head_size * args.seq) as f64;
        // Twice for a multiplication with its sum; once forward and twice backward, of which adapters spare the
        // gradients of weights.
        let operations = if args.lora.is_some() { 4.0 * weights + 6.0 * scores } else { 6.0 * (weights + scores) };
        let peak = args.peak.map(|peak| peak * args.axes.ranks as f64);
        Self { operations, peak, waits: args.axes.tp == 1 }
    }

    /// What the steps so far have used.
    pub fn said(&self, tokens: usize, elapsed: Duration, waited: Duration, pipeline: &PipelineUsage) -> String {
        let seconds = elapsed.as_secs_f64();
        let speed = self.operations * tokens as f64 / seconds;
        let idle = pipeline.idle + (1.0 - pipeline.idle) * waited.as_secs_f64() / seconds;
        let mut said = match self.peak {
            Some(peak) => format!("{:.1} % of the peak", 100.0 * speed / peak),
            None => format!("{:.1} GFLOP/s", speed / 1e9),
        };
        if self.waits {
            said += &format!(", {:.0} % busy", 100.0 * (1.0 - idle).max(0.0));
        }
        if let Some(bytes) = resident() {
            said += &format!(", {} MiB", bytes >> 20);
        }
        said
    }
}

/// The memory of this process, in bytes, where the system tells.
fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? << 10)
}

/// Generated text that does a terminal no harm.
fn harmless(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\n' && c != '\t' { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}
