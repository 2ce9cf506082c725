//! The command line: what it takes, and which of it makes no sense.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device};
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;
use clap::{Parser, ValueEnum};

use crate::checkpoints::folder;
use crate::common::attention::Attention;
use crate::common::batch::{self, GrowthFlags, Rows};
use crate::common::command_line::parse;
use crate::common::device::Compute;
use crate::common::fit::{self, FitFlags};
use crate::common::flags::{count, learning_rate, norm, up_to, writable, wrong};
use crate::common::given::Given;
use crate::common::mesh::{Axes, MeshFlags, STRATEGY_KEYS, described, recomputes};
use crate::common::saving::{SaveFlags, has_checkpoints};
use crate::common::start::{LaunchFlags, Start};
use crate::data::set::BatchSize;
use crate::directory;
use crate::lora::{LoraConfig, TARGETS};
use crate::model::{Autocast, LlamaConfig};

const SAVE: &str = "A directory for what comes of it: `model`, a Hugging Face directory, and with --lora `adapter`, at the end; \
                    `checkpoints`, one every --save-every steps, and one at the end";
const ENGINE: &str = "How steps are run: `captured` as a graph whose operations are fused, since all rows are of one length; `eager` by \
                      the model's own forward, for replicas alone; `auto` captures where the model is split or cut, or its parameters are \
                      divided [default: captured on CPUs, else auto]";
const RESUME: &str = "The --save directory of a run, to go on from its last checkpoint, on any mesh. --steps and --epochs count the \
                      whole run. If it is that of --save, and has no checkpoint yet, the run begins anew";

/// Fine-tunes a language model of the Llama family, from a Hugging Face directory to one, on any mesh of ranks.
#[derive(Parser, Debug)]
#[command(name = "finetune", max_term_width = 100, after_help = STRATEGY_KEYS)]
#[command(mut_arg("save", |save| save.help(SAVE)))]
#[command(mut_arg("resume", |resume| resume.help(RESUME)))]
#[command(mut_arg("engine", |engine| engine.help(ENGINE)))]
struct Flags {
    /// The directory of the model: config.json, *.safetensors, tokenizer.json
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// What to train on: JSON Lines if the name ends in .jsonl, each line with `text`, `prompt` and `completion`, or
    /// `messages`; else a plain text
    #[arg(long, value_name = "FILE")]
    data: PathBuf,

    /// What to measure the held-out loss on, as --data
    #[arg(long, value_name = "FILE")]
    eval: Option<PathBuf>,

    /// After how many steps each it is measured [default: at the end alone]
    #[arg(long, value_name = "N", requires = "eval", value_parser = up_to::<1_000_000_000>)]
    eval_every: Option<usize>,

    #[command(flatten)]
    mesh: MeshFlags,

    /// The rows of a step, over all ranks; `auto` for as many as fit into memory at once, up to 8192 tokens a replica
    /// and the rows of an epoch
    #[arg(long, value_name = "N", default_value = "8", value_parser = batch::rows)]
    batch: Rows,

    /// The tokens of a step, over all ranks, in place of --batch: as many rows as have no more, without padding
    #[arg(long, value_name = "N", conflicts_with_all = ["batch", "grow_batch"], value_parser = up_to::<1_000_000_000>)]
    batch_tokens: Option<usize>,

    #[command(flatten)]
    fit: FitFlags,

    #[command(flatten)]
    growth: GrowthFlags,

    /// The rows that go through the model at once on a rank [default: all that it has; in a pipeline a fourth for each
    /// of its ranks]
    #[arg(long, value_name = "N", value_parser = up_to::<1_000_000>)]
    micro_batch: Option<usize>,

    /// The length of a row in tokens
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = up_to::<1_000_000>)]
    seq: usize,

    /// One document a row, in place of as many as it has room for
    #[arg(long)]
    unpacked: bool,

    /// How many steps to train
    #[arg(long, value_name = "N", conflicts_with = "epochs", value_parser = up_to::<1_000_000_000>)]
    steps: Option<usize>,

    /// How often to go through the data
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = up_to::<1_000_000>)]
    epochs: usize,

    /// What products are computed in: weights, gradients, the optimizer's state, norms and losses are f32 always
    #[arg(long, value_name = "TYPE", value_enum, default_value = "f32")]
    dtype: Products,

    /// Computes operations that cost little once more in backward, in place of keeping what they gave: for --engine
    /// eager, with which --zero 3 always does it, and pipelines. Other captured steps hold less than that, and it does
    /// nothing
    #[arg(long)]
    recompute: bool,

    /// The highest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 5e-5, value_parser = learning_rate)]
    lr: f64,

    /// In how many steps the learning rate rises to --lr
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = none_up_to::<1_000_000_000>)]
    warmup: usize,

    /// How the learning rate goes on then
    #[arg(long, value_name = "NAME", value_enum, default_value = "cosine")]
    scheduler: Scheduler,

    /// The weight decay of AdamW
    #[arg(long, value_name = "RATE", default_value_t = 0.0, value_parser = share)]
    weight_decay: f64,

    /// The largest norm of the gradient: larger ones are scaled down to it [default: none]
    #[arg(long, value_name = "NORM", value_parser = norm)]
    clip: Option<f64>,

    /// Trains low-rank adapters of this rank, and nothing else
    #[arg(long, value_name = "RANK", value_parser = up_to::<65_536>)]
    lora: Option<usize>,

    /// What the adapters are scaled by, times their rank [default: twice the rank]
    #[arg(long, value_name = "ALPHA", requires = "lora", value_parser = norm)]
    lora_alpha: Option<f64>,

    /// Which projections have adapters: `all`, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
    #[arg(long, value_name = "LIST", requires = "lora", value_delimiter = ',', default_value = "q_proj,v_proj")]
    lora_targets: Vec<String>,

    /// The seed of the order of the data, of adapters, and of the sample
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    #[command(flatten)]
    saving: SaveFlags,

    /// Writes a text that begins so with the trained model; where --data are conversations, the answer to this message
    #[arg(long, value_name = "PROMPT")]
    generate: Option<String>,

    /// How many tokens are added to it at most
    #[arg(long, value_name = "N", requires = "generate", default_value_t = 100, value_parser = up_to::<1_000_000>)]
    generate_tokens: usize,

    /// How freely they are chosen: 0 takes always the likeliest
    #[arg(long, value_name = "T", requires = "generate", default_value_t = 0.0, value_parser = temperature)]
    temperature: f64,

    /// Where to write losses, speed and communication as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// The peak of what a rank computes on in TFLOP/s, of which the progress then says the share that is used
    #[arg(long, value_name = "TFLOPS", value_parser = norm)]
    peak: Option<f64>,

    /// Says how the model would be spread, what each rank would hold, and what the first batch is, and stops;
    /// --dry-run=whole with a line for each parameter, where those of all layers have one
    #[arg(long, value_name = "HOW", value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "short")]
    dry_run: Option<DryRun>,

    #[command(flatten)]
    launch: LaunchFlags,
}

/// What products are computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Products {
    /// 32 bits
    F32,
    /// 16 bits, with the range of 32
    Bf16,
}

/// How much is said of a run that is not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DryRun {
    /// One line for parameters of all layers that lie alike
    Short,
    /// A line for each parameter
    Whole,
}

/// How the learning rate goes on after its rise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scheduler {
    /// As it is
    Constant,
    /// Down to 0, evenly
    Linear,
    /// Down to 0, along half a cosine
    Cosine,
}

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    Steps(usize),
    Epochs(usize),
}

/// What is written with the trained model.
#[derive(Clone, Debug)]
pub struct Prompt {
    pub text: String,
    /// The most tokens that are added.
    pub length: usize,
    pub temperature: f64,
}

/// A run that makes sense.
#[derive(Clone, Debug)]
pub struct Args {
    /// The directory of the model.
    pub model: PathBuf,
    /// What kind of model it is.
    pub config: LlamaConfig,
    pub data: PathBuf,
    pub eval: Option<PathBuf>,
    pub eval_every: Option<usize>,
    /// How many ranks there are along each axis.
    pub axes: Axes,
    /// How the model is spread.
    pub strategy: Strategy,
    pub size: BatchSize,
    /// Whether the batch is still to be found out.
    pub auto: bool,
    /// What it is found out by.
    pub fit: FitFlags,
    /// What is measured of the batch, and whether it grows.
    pub growth: GrowthFlags,
    /// The rows of a step of one call, which has one shape always.
    pub rows: usize,
    /// The length of a row in tokens.
    pub seq: usize,
    pub packed: bool,
    /// Whether operations that cost little are computed again in backward.
    pub recompute: bool,
    /// What flags ask for that is not done, and why.
    pub notes: Vec<String>,
    pub length: Length,
    pub lr: f64,
    pub warmup: usize,
    pub scheduler: Scheduler,
    pub weight_decay: f64,
    pub clip: Option<f64>,
    pub lora: Option<LoraConfig>,
    pub seed: u64,
    /// Where the run is saved, and from where it goes on.
    pub saving: SaveFlags,
    pub prompt: Option<Prompt>,
    pub json: Option<PathBuf>,
    /// Floating point operations a second.
    pub peak: Option<f64>,
    /// How much is said of a run that is not made.
    pub dry_run: Option<DryRun>,
    /// How the ranks are started and joined.
    pub start: Start,
    /// What the other ranks are to be given as well.
    pub given: Given,
}

impl Args {
    /// Reads the command line and the config of the model; what makes no sense, alone or together, is an error, and so
    /// is a wish for help.
    pub fn from_command_line() -> Result<Self, clap::Error> {
        let (flags, given) = parse::<Flags>()?;
        Self::of(flags, given).or_else(wrong)
    }

    fn of(flags: Flags, given: Given) -> Result<Self, String> {
        let start = flags.launch.read()?;
        let mesh = flags.mesh.read(start.started, 1, start.min_ranks)?;
        let axes @ Axes { dp, pp, tp, .. } = mesh.axes;
        let autocast = match flags.dtype {
            Products::F32 => Autocast::default(),
            Products::Bf16 => Autocast(Some(DType::BF16)),
        };
        let config = LlamaConfig { autocast, ..LlamaConfig::read(&flags.model)? };
        let Flags { seq, .. } = flags;
        if seq > config.positions {
            let most = config.positions;
            return Err(format!("--seq {seq} is more than the {most} tokens that the model was made for"));
        }
        let (trial, auto) = (fit::trial(), flags.batch == Rows::Auto);
        flags.fit.check(flags.batch)?;
        if auto {
            fit::check_auto(&start, flags.micro_batch)?;
        }
        if flags.growth.grow_batch.is_some() && flags.steps.is_none() {
            return Err("--grow-batch: how many steps an epoch has is not known before: give --steps".into());
        }
        let in_pipeline = if pp == 1 { 1 } else { mesh.micro_batches().unwrap_or(4 * pp) };
        let batch = match flags.batch {
            Rows::Number(rows) => rows,
            // What is tried, or to begin with: one row in each micro-batch.
            Rows::Auto => dp * in_pipeline * trial.unwrap_or(1),
        };
        let size = match flags.batch_tokens {
            Some(most) if most < seq * dp => {
                let replicas = &mesh.replicas;
                return Err(format!("--batch-tokens {most} is less than a row of --seq {seq} for each of {replicas}"));
            }
            Some(most) => BatchSize::Tokens { most, replicas: dp },
            None => {
                mesh.every_replica(batch)?;
                flags.growth.check(batch)?;
                BatchSize::Rows(batch)
            }
        };
        // What a replica has of a batch of full rows, at most.
        let share = match size {
            BatchSize::Rows(rows) => rows.div_ceil(dp),
            BatchSize::Tokens { most, .. } => most / seq / dp,
        };
        if let Some(micro_batch) = flags.micro_batch.filter(|rows| *rows > share) {
            return Err(format!("--micro-batch {micro_batch} is more than the {} of a replica", count(share, "row")));
        }
        if pp > 1 && flags.micro_batch.is_some() && mesh.file.is_some() {
            return Err("--micro-batch: the file of --strategy says the micro-batches of its pipeline".into());
        }
        mesh.every_micro_batch(share)?;
        let micro = flags.micro_batch.unwrap_or(if pp == 1 { share } else { (share / (4 * pp)).max(1) });
        let plan = if tp == 1 { Plan::new() } else { directory::plan() };
        // On devices burn fuses the operations of eager steps as well.
        let engine = if start.device == Compute::Flex { Engine::Captured } else { Engine::Auto };
        let strategy = flags.mesh.strategy(&mesh, plan, share.div_ceil(micro), engine)?;
        let no_noise = flags.growth.check_gradients(axes, &strategy, share.div_ceil(micro))?;
        mesh.every_stage(&strategy, config.layers)?;
        let captured = strategy.captures(axes.ranks).map_err(|problem| problem.to_string())?;
        let recompute = flags.recompute && (pp > 1 || !captured) || recomputes(&strategy);
        let idle = (flags.recompute && !recompute).then(|| idle_recompute(axes, &strategy));
        let notes = idle.into_iter().chain(no_noise).collect();
        let (rows, at_once) = match &strategy.pipeline {
            Some(pipeline) if pp > 1 => (share.max(pipeline.micro_batches), share.div_ceil(pipeline.micro_batches)),
            _ => (micro, micro),
        };
        if !auto {
            // Each row has documents of its own.
            let attention = Attention { seq, heads: config.heads, rows: at_once, masks: at_once };
            attention.fits(axes, &strategy, &start)?;
        }
        let lora = flags.lora.map(|rank| {
            let alpha = flags.lora_alpha.unwrap_or(2.0 * rank as f64);
            let targets = match flags.lora_targets.as_slice() {
                [all] if all == "all" => TARGETS.map(String::from).to_vec(),
                some => some.to_vec(),
            };
            LoraConfig { rank, alpha, targets, seed: flags.seed }
        });
        if let Some(lora) = &lora {
            lora.check().map_err(|why| format!("--lora: {why}"))?;
        }
        if let Some(json) = &flags.json {
            writable(json, Some(&flags.data))?;
            writable(json, flags.eval.as_deref())?;
        }
        flags.saving.check(folder)?;
        no_model_yet(flags.saving.save.as_deref(), &flags.model)?;
        let described = described(&strategy)?;
        // A trial leaves nothing behind.
        let kept = trial.is_none() || !auto;
        let prompt =
            flags.generate.map(|text| Prompt { text, length: flags.generate_tokens, temperature: flags.temperature });
        Ok(Self {
            model: flags.model,
            config,
            data: flags.data,
            eval: flags.eval.filter(|_| kept),
            eval_every: flags.eval_every,
            axes,
            strategy,
            size,
            auto: auto && kept,
            fit: flags.fit,
            growth: flags.growth,
            rows,
            seq,
            packed: !flags.unpacked,
            recompute,
            notes,
            length: match flags.steps {
                _ if !kept => Length::Steps(fit::TRIAL_STEPS),
                Some(steps) => Length::Steps(steps),
                None => Length::Epochs(flags.epochs),
            },
            lr: flags.lr,
            warmup: if kept { flags.warmup } else { 0 },
            scheduler: flags.scheduler,
            weight_decay: flags.weight_decay,
            clip: flags.clip,
            lora,
            seed: flags.seed,
            saving: if kept { flags.saving } else { flags.saving.none() },
            prompt: prompt.filter(|_| kept),
            json: flags.json.filter(|_| kept),
            peak: flags.peak.map(|peak| peak * 1e12),
            dry_run: flags.dry_run.filter(|_| kept),
            start,
            given: given.with("strategy", described),
        })
    }

    /// A device that keeps what backward needs, as the flags say.
    pub fn autodiff(&self, device: &Device) -> Device {
        let device = device.clone().autodiff();
        if self.recompute { device.gradient_checkpointing() } else { device }
    }

    /// The rows of a step, at first: none if its tokens are counted.
    pub fn batch(&self) -> usize {
        match self.size {
            BatchSize::Rows(rows) => rows,
            BatchSize::Tokens { .. } => 0,
        }
    }

    /// The micro-batches of a pipeline, in each of which there is a row at least; else 1.
    pub fn in_pipeline(&self) -> usize {
        self.strategy.pipeline.as_ref().filter(|_| self.axes.pp > 1).map_or(1, |pipeline| pipeline.micro_batches)
    }

    /// The same run on fewer ranks: fewer replicas share the same batches, in micro-batches as large as before.
    pub fn on(&self, ranks: usize) -> Result<Self, Error> {
        if ranks == self.axes.ranks {
            return Ok(self.clone());
        }
        let strategy = self.strategy.resized(self.axes.ranks, ranks)?;
        let at_once = self.rows.div_ceil(self.in_pipeline());
        let axes = Axes { ranks, dp: ranks / (self.axes.pp * self.axes.tp), ..self.axes };
        let fewer = Self { axes, strategy, ..self.clone() };
        Ok(Self { rows: at_once * fewer.in_pipeline(), ..fewer })
    }

    /// The same with what is measured in a run of so many steps.
    pub fn measuring(self, steps: usize) -> Self {
        Self { strategy: self.growth.strategy(self.strategy, steps), ..self }
    }

    /// The same with as many rows as go through a layer at once on each replica.
    pub fn with_rows_at_once(&self, rows: usize) -> Self {
        let rows = rows * self.in_pipeline();
        Self { size: BatchSize::Rows(rows * self.axes.dp), rows, auto: false, ..self.clone() }
    }
}

/// Why `--recompute` does nothing where steps are captured, and no pipeline divides forward from backward.
fn idle_recompute(axes: Axes, strategy: &Strategy) -> String {
    let why = match (axes.tp, strategy.data.sharding) {
        (1, _) if strategy.engine == Engine::Captured && axes.in_file => "`engine = \"captured\"` has".into(),
        (1, _) if strategy.engine == Engine::Captured => "--engine captured has".into(),
        (1, _) => "divided parameters have".into(),
        (tp, _) => format!("{} has", axes.said("tp", tp)),
    };
    format!(
        "--recompute does nothing: {why} steps captured, whose fused loops hold less than what would be computed again"
    )
}

/// Whether there is no model where the outcome is to be but of the run that goes on: not of another, and not the one
/// that is trained.
fn no_model_yet(save: Option<&Path>, model: &Path) -> Result<(), String> {
    let Some(dir) = save else { return Ok(()) };
    let Some(name) = ["model", "adapter"].into_iter().find(|name| dir.join(name).exists()) else { return Ok(()) };
    let same = |one: &Path, other: &Path| {
        one.canonicalize().ok().is_some_and(|one| other.canonicalize().is_ok_and(|it| it == one))
    };
    let taken = format!("--save {}: there is a {name} already", dir.display());
    if same(&dir.join(name), model) {
        return Err(format!("{taken}, that of --model: give another directory"));
    }
    // Those of another run than the one that goes on are refused by themselves.
    if !has_checkpoints(&folder(dir)) {
        return Err(format!("{taken}, and no checkpoint of its run: give another directory"));
    }
    Ok(())
}

fn none_up_to<const MOST: usize>(value: &str) -> Result<usize, String> {
    match value.parse::<i128>() {
        Ok(n) if n < 0 => Err("it must be at least 0".into()),
        Ok(0) => Ok(0),
        _ => up_to::<MOST>(value),
    }
}

fn share(value: &str) -> Result<f64, String> {
    match value.parse() {
        Ok(rate) if (0.0..=1.0).contains(&rate) => Ok(rate),
        Ok(_) => Err("it must be from 0 to 1".into()),
        Err(_) => Err("it must be a number".into()),
    }
}

fn temperature(value: &str) -> Result<f64, String> {
    match value.parse() {
        Ok(temperature) if temperature >= 0.0 && f64::is_finite(temperature) => Ok(temperature),
        Ok(_) => Err("it must be 0 or more, and finite".into()),
        Err(_) => Err("it must be a number".into()),
    }
}
