//! The command line: what it takes, and which of it makes no sense.

use std::path::PathBuf;

use burn_parallel::batch::BatchSplit;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;
use clap::Parser;

use crate::checkpoints::folder;
use crate::common::attention::Attention;
use crate::common::batch::{self, Batch, GrowthFlags, Rows};
use crate::common::command_line::parse;
use crate::common::fit::{self, FitFlags};
use crate::common::flags::{count, learning_rate, norm, up_to, writable, wrong};
use crate::common::given::Given;
use crate::common::mesh::{Axes, MeshFlags, STRATEGY_KEYS, described};
use crate::common::saving::SaveFlags;
use crate::common::start::{LaunchFlags, Start};
use crate::gpt::GptConfig;
use crate::text::VOCAB;

/// The ranks, if neither flags nor a launcher say how many.
const RANKS: usize = 2;

const RANKS_HELP: &str = "How many ranks train together, threads or processes as --launch says [default: those that a launcher has \
                          started; else --dp times --pp times --tp; 2 if none of these is given]";

/// Trains a small byte-level GPT on any UTF-8 text, on several ranks.
#[derive(Parser, Debug)]
#[command(name = "train_lm", max_term_width = 100, after_help = STRATEGY_KEYS)]
#[command(mut_arg("ranks", |ranks| ranks.help(RANKS_HELP)))]
struct Flags {
    /// The text to learn from, UTF-8 [default: a text that comes with the example]
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,

    #[command(flatten)]
    mesh: MeshFlags,

    /// How many micro-batches a pipeline divides its rows into [default: 4 times --pp, as far as there are rows]
    #[arg(long, value_name = "M", conflicts_with = "strategy", value_parser = up_to::<1_000_000>)]
    micro_batches: Option<usize>,

    /// How many steps to train
    #[arg(long, value_name = "N", default_value_t = 1200, value_parser = up_to::<1_000_000_000>)]
    steps: usize,

    /// The rows of a step, over all ranks; `auto` for as many as fit into memory at once, up to 1024 a replica
    /// and those that the text has
    #[arg(long, value_name = "N", default_value = "16", value_parser = batch::rows)]
    batch: Rows,

    #[command(flatten)]
    fit: FitFlags,

    #[command(flatten)]
    growth: GrowthFlags,

    /// The rows that go through the model at once on a rank [default: all that it has]
    #[arg(long, value_name = "N", value_parser = up_to::<1_000_000>)]
    micro_batch: Option<usize>,

    /// The length of a row in bytes
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = up_to::<65_536>)]
    seq: usize,

    /// The layers of the model
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = up_to::<1024>)]
    layers: usize,

    /// The width of the model
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = up_to::<65_536>)]
    d_model: usize,

    /// The attention heads of each layer
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = up_to::<65_536>)]
    heads: usize,

    /// The highest learning rate: it warms up to this, then falls to a tenth of it
    #[arg(long, value_name = "RATE", default_value_t = 3e-3, value_parser = learning_rate)]
    lr: f64,

    /// The largest norm of the gradient: larger ones are scaled down to it [default: none]
    #[arg(long, value_name = "NORM", value_parser = norm)]
    clip: Option<f64>,

    /// The seed of the weights, the batches and the sample
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Where to write losses, speed and communication as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    #[command(flatten)]
    saving: SaveFlags,

    #[command(flatten)]
    launch: LaunchFlags,
}

/// A run that makes sense.
#[derive(Clone, Debug)]
pub struct Args {
    /// The text to learn from; the project's own if there is none.
    pub text: Option<PathBuf>,
    /// How many ranks there are along each axis.
    pub axes: Axes,
    /// How the model is spread.
    pub strategy: Strategy,
    /// How many steps to train.
    pub steps: usize,
    /// The rows of a step over all ranks.
    pub batch: usize,
    /// The most rows that go through the model at once on a rank.
    pub micro_batch: usize,
    /// Whether the batch is still to be found out.
    pub auto: bool,
    /// What it is found out by.
    pub fit: FitFlags,
    /// What is measured of the batch, and whether it grows.
    pub growth: GrowthFlags,
    /// What is told before the run begins.
    pub note: Option<String>,
    /// The length of a row in tokens.
    pub seq: usize,
    /// The layers of the model.
    pub layers: usize,
    /// The width of the model.
    pub d_model: usize,
    /// The attention heads of each layer.
    pub heads: usize,
    /// The highest learning rate.
    pub lr: f64,
    /// The largest norm of the gradient.
    pub clip: Option<f64>,
    /// The seed of everything random.
    pub seed: u64,
    /// Where to write the outcome as JSON.
    pub json: Option<PathBuf>,
    /// Where the run is saved, and from where it goes on.
    pub saving: SaveFlags,
    /// How the ranks are started and joined.
    pub start: Start,
    /// What the other ranks are to be given as well.
    pub given: Given,
}

impl Args {
    /// Reads the command line; what makes no sense, alone or together, is an error, and so is a wish for help.
    pub fn from_command_line() -> Result<Self, clap::Error> {
        let (flags, given) = parse::<Flags>()?;
        Self::of(flags, given).or_else(wrong)
    }

    fn of(flags: Flags, given: Given) -> Result<Self, String> {
        let start = flags.launch.read()?;
        let mesh = flags.mesh.read(start.started, RANKS, start.min_ranks)?;
        let axes @ Axes { dp, pp, tp, .. } = mesh.axes;
        let Flags { d_model, heads, .. } = flags;
        let (trial, auto) = (fit::trial(), flags.batch == Rows::Auto);
        flags.fit.check(flags.batch)?;
        if auto {
            fit::check_auto(&start, flags.micro_batch)?;
        }
        // What is tried, or to begin with: one row in each micro-batch.
        let in_pipeline = match pp {
            1 => 1,
            _ => mesh.micro_batches().or(flags.micro_batches).unwrap_or(4 * pp),
        };
        let batch = match flags.batch {
            Rows::Number(rows) => rows,
            Rows::Auto => dp * in_pipeline * trial.unwrap_or(1),
        };
        mesh.every_replica(batch)?;
        if let Some(micro_batch) = flags.micro_batch.filter(|&rows| rows > batch) {
            return Err(format!("--micro-batch {micro_batch} is larger than --batch {batch}"));
        }
        // The replica with fewest rows decides.
        let rows = batch / dp;
        mesh.every_micro_batch(rows)?;
        if pp > 1 && flags.micro_batch.is_some() {
            let instead = match mesh.file {
                Some(_) => "`pipeline.micro_batches` of the file says how many there are",
                None => "give --micro-batches",
            };
            return Err(format!(
                "--micro-batch is for ranks that hold all layers: with {}, {instead}",
                axes.said("pp", pp)
            ));
        }
        if let Some(micro_batches) = flags.micro_batches {
            if pp == 1 {
                return Err(format!("--micro-batches {micro_batches} is for pipelines: give --pp as well"));
            }
            if micro_batches > rows {
                return Err(format!(
                    "--micro-batches {micro_batches} is more than the {} of a replica",
                    count(rows, "row")
                ));
            }
        }
        flags.growth.check(batch)?;
        if d_model % heads != 0 {
            return Err(format!("--heads {heads} does not divide --d-model {d_model}"));
        }
        if heads % tp != 0 {
            return Err(format!(
                "{} does not divide --heads {heads}: each rank takes whole heads",
                axes.said("tp", tp)
            ));
        }
        if let Some(json) = &flags.json {
            writable(json, flags.text.as_deref())?;
        }
        flags.saving.check(folder)?;

        let micro_batches = flags.micro_batches.unwrap_or((4 * pp).min(rows));
        let strategy = flags.mesh.strategy(&mesh, Plan::megatron(), micro_batches, Engine::Auto)?;
        let strategy = flags.growth.strategy(strategy, flags.steps);
        let micro_batch = flags.micro_batch.unwrap_or(batch).min(batch.div_ceil(dp));
        let note = flags.growth.check_gradients(axes, &strategy, batch.div_ceil(dp).div_ceil(micro_batch))?;
        mesh.every_stage(&strategy, flags.layers)?;
        let described = described(&strategy)?;
        // A trial leaves nothing behind.
        let kept = trial.is_none() || !auto;
        let args = Self {
            text: flags.text,
            axes,
            strategy,
            steps: if kept { flags.steps } else { fit::TRIAL_STEPS },
            batch,
            auto: auto && kept,
            fit: flags.fit,
            growth: flags.growth,
            note,
            micro_batch,
            seq: flags.seq,
            layers: flags.layers,
            d_model,
            heads,
            lr: flags.lr,
            clip: flags.clip,
            seed: flags.seed,
            json: flags.json.filter(|_| kept),
            saving: if kept { flags.saving } else { flags.saving.none() },
            start,
            given: given.with("strategy", described),
        };
        if !auto {
            // One mask serves all rows.
            let attention = Attention { seq: args.seq, heads, rows: args.rows_at_once(), masks: 1 };
            attention.fits(axes, &args.strategy, &args.start)?;
        }
        Ok(args)
    }

    /// The same run on fewer ranks: fewer replicas share the same batch, in micro-batches as large as before.
    pub fn on(&self, ranks: usize) -> Result<Self, Error> {
        if ranks == self.axes.ranks {
            return Ok(self.clone());
        }
        let strategy = self.strategy.resized(self.axes.ranks, ranks)?;
        let dp = ranks / (self.axes.pp * self.axes.tp);
        Ok(Self { axes: Axes { ranks, dp, ..self.axes }, strategy, ..self.clone() })
    }

    /// The same with as many rows as go through a layer at once on each replica.
    pub fn with_rows_at_once(&self, rows: usize) -> Self {
        let pipeline = self.strategy.pipeline.as_ref().filter(|_| self.axes.pp > 1);
        let batch = self.axes.dp * pipeline.map_or(1, |config| config.micro_batches) * rows;
        Self { batch, micro_batch: batch.div_ceil(self.axes.dp), auto: false, ..self.clone() }
    }

    /// The most rows that go through a layer at once.
    pub fn rows_at_once(&self) -> usize {
        match self.axes.pp {
            1 => self.micro_batch,
            _ => {
                let pipeline = self.strategy.pipeline.as_ref();
                self.batch.div_ceil(self.axes.dp).div_ceil(pipeline.map_or(1, |config| config.micro_batches))
            }
        }
    }

    /// How a batch is divided. One that has grown takes more micro-batches of the same size.
    pub fn split(&self, batch: &Batch) -> Result<BatchSplit, Error> {
        BatchSplit::of(&self.strategy, self.axes.ranks, batch.rows(), Some(self.rows_at_once()))
    }

    /// The model that the flags describe.
    pub fn model(&self) -> GptConfig {
        GptConfig::new(VOCAB, self.seq, self.d_model, self.heads, self.layers)
    }
}
