//! The command line: what it takes, and which of it makes no sense.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use burn_parallel::prelude::*;
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};

use crate::batch::{self, Rows};
use crate::device::Compute;
use crate::gpt::GptConfig;
use crate::start::{self, Launch, Start, Transport};
use crate::text::VOCAB;

/// What may be in the file of `--strategy`.
const STRATEGY_KEYS: &str = r#"Keys of a --strategy file, in TOML, with what they are when left out:
  dp                   what is left of the ranks
  pp, tp               1
  engine               "auto"; or "eager", "captured"
  [data]
  bucket_bytes         25000000
  first_bucket_bytes   1000000
  reduce_dtype         that of the gradients; or "BF16", "F16", "F32", "F64"
  overlap              true
  compare_every        0
  sharding             "none"; or "optimizer", "gradients", "parameters"
  sharding_ranks       all replicas
  keep                 "pass"; or "micro_batch", "step"
  noise_scale          false
  [tensor]
  plan                 needed if tp > 1: "megatron", "hugging_face", or a table of rules
  seed                 0
  check_inputs_every   1
  [pipeline]
  micro_batches        needed if pp > 1
  schedule             "1f1b"; or "gpipe", "zb_h1", { interleaved = { stages_per_rank = 2 } }, { custom = ".." }
  cut                  "balanced"; or { before = ["layers.2.*"] }, { patterns = [["layers.0.*"], ["*"]] }, ..
  whole_inputs         []
  seed                 0
  graphs               16
  check_inputs_every   1
The docs of `burn_parallel::train::Strategy` say what each does."#;

/// Trains a small byte-level GPT on any UTF-8 text, on several ranks.
#[derive(Parser, Debug)]
#[command(name = "train_lm", max_term_width = 100, after_help = STRATEGY_KEYS)]
struct Flags {
    /// The text to learn from, UTF-8 [default: a text that comes with the example]
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,

    /// How many ranks train together, threads or processes as --launch says [default: --dp times --pp times --tp, or 2]
    #[arg(long, value_name = "N", value_parser = up_to::<1024>)]
    ranks: Option<usize>,

    /// How many replicas of the model share each batch: data parallelism [default: --ranks divided by --pp and --tp]
    #[arg(long, value_name = "N", value_parser = up_to::<1024>)]
    dp: Option<usize>,

    /// How many ranks share each layer of a replica: tensor parallelism
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = up_to::<1024>)]
    tp: usize,

    /// How many ranks share the layers of a replica: pipeline parallelism
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = up_to::<1024>)]
    pp: usize,

    /// A file that says how the model is spread, in TOML or JSON, in place of --dp, --tp, --pp and what goes with them
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dp", "tp", "pp", "schedule", "micro_batches"])]
    strategy: Option<PathBuf>,

    /// What the replicas divide among themselves: 0 nothing, 1 the state of the optimizer, 2 gradients as well, 3 parameters as well
    #[arg(long, value_name = "STAGE", value_parser = zero, conflicts_with = "strategy")]
    zero: Option<Sharding>,

    /// In which order the stages of a pipeline take the micro-batches
    #[arg(long, value_name = "NAME", value_enum, default_value = "1f1b")]
    schedule: ScheduleName,

    /// How many micro-batches a pipeline divides its rows into [default: 4 times --pp, as far as there are rows]
    #[arg(long, value_name = "M", value_parser = up_to::<1_000_000>)]
    micro_batches: Option<usize>,

    /// How many steps to train
    #[arg(long, value_name = "N", default_value_t = 1200, value_parser = up_to::<1_000_000_000>)]
    steps: usize,

    /// The rows of a step, over all ranks; `auto` for as many as fit into memory at once, up to 1024 a replica
    #[arg(long, value_name = "N", default_value = "16", value_parser = batch::rows)]
    batch: Rows,

    /// Measures the gradient noise scale, the batch beyond which a larger one saves few steps
    #[arg(long)]
    noise_scale: bool,

    /// Doubles the batch, up to so many rows, whenever the noise scale is beyond the doubled one; the learning rate grows by the root
    #[arg(long, value_name = "MOST", value_parser = up_to::<1_000_000>)]
    grow_batch: Option<usize>,

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

    /// A directory for checkpoints, made if it is not there: one every --save-every steps, and one at the end
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,

    /// After how many steps each checkpoint is saved [default: at the end alone]
    #[arg(long, value_name = "N", requires = "save", value_parser = up_to::<1_000_000_000>)]
    save_every: Option<usize>,

    /// How many checkpoints are kept: the last ones
    #[arg(long, value_name = "K", requires = "save", default_value_t = 3, value_parser = up_to::<1_000_000>)]
    keep: usize,

    /// A directory of checkpoints, to go on from the last of them: with any flags that do not change the model. --steps counts
    /// the whole run. If it is the directory of --save, and there is none yet, the run begins anew
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,

    /// What the ranks are: threads, processes of this program, or what a launcher has started [default: env under
    /// mpirun and torchrun, else threads]
    #[arg(long, value_enum, value_name = "HOW")]
    launch: Option<Launch>,

    /// How many times the ranks are started again when some are lost, with --launch processes: they go on from the last checkpoint
    #[arg(long, value_name = "K", default_value_t = 0, requires = "resume")]
    restarts: usize,

    /// Takes ranks that are lost for gone, and goes on with fewer replicas, on this many ranks at least: the batch stays. Also
    /// with what torchrun has started [default: as many ranks as before]
    #[arg(long, value_name = "N", value_parser = up_to::<1024>)]
    min_ranks: Option<usize>,

    /// What the ranks compute on
    #[arg(long, value_enum, value_name = "DEVICE", default_value_t = Compute::Flex)]
    device: Compute,

    /// What joins the ranks [default: local for threads; mpi for what mpirun has started, if built in; else tcp]. nccl comes on
    /// top of these
    #[arg(long, value_enum, value_name = "ENGINE")]
    transport: Option<Transport>,
}

/// The schedules of pipelines by the names of the field.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ScheduleName {
    /// All forwards, then all backwards
    #[value(name = "gpipe")]
    GPipe,
    /// One forward, one backward
    #[value(name = "1f1b")]
    OneForwardOneBackward,
    /// One forward, one backward, with two stages on each rank
    #[value(name = "interleaved")]
    Interleaved,
    /// One forward, one backward, with gradients of weights in the gaps: ZB-H1
    #[value(name = "zb_h1")]
    ZeroBubble,
}

/// A run that makes sense.
#[derive(Clone, Debug)]
pub struct Args {
    /// The text to learn from; the project's own if there is none.
    pub text: Option<PathBuf>,
    /// How many ranks train together.
    pub ranks: usize,
    /// How many replicas of the model share each batch.
    pub dp: usize,
    /// How many ranks share each layer of a replica.
    pub tp: usize,
    /// How many ranks share the layers of a replica.
    pub pp: usize,
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
    /// Whether the noise of the gradient is measured.
    pub noise_scale: bool,
    /// Up to how many rows the batch may grow.
    pub grow_batch: Option<usize>,
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
    /// Where to keep checkpoints.
    pub save: Option<PathBuf>,
    /// After how many steps each is saved; at the end alone without a number.
    pub save_every: Option<usize>,
    /// How many are kept.
    pub keep: usize,
    /// From where to go on.
    pub resume: Option<PathBuf>,
    /// How many times the ranks are started again.
    pub restarts: usize,
    /// On how few ranks the run goes on, if not on all.
    pub min_ranks: Option<usize>,
    /// What the ranks compute on.
    pub device: Compute,
    /// How the ranks are started and joined.
    pub start: Start,
}

impl Args {
    /// Reads the command line; what makes no sense, alone or together, is an error, and so is a wish for help.
    pub fn from_command_line() -> Result<Self, clap::Error> {
        // `--steps -1` is a wrong number of steps, not a flag that nobody knows.
        let command = Flags::command().mut_args(|flag| flag.allow_negative_numbers(true));
        let flags = Flags::from_arg_matches(&command.try_get_matches()?)?;
        fn wrong<T>(why: String) -> Result<T, clap::Error> {
            Err(clap::Error::raw(ErrorKind::ValueValidation, why))
        }

        let start = start::choose(flags.launch, flags.device, flags.transport).or_else(wrong)?;
        let read = flags.strategy.as_ref().map(Strategy::read).transpose();
        let read = match read {
            Ok(strategy) => strategy,
            // In one line, as all that is refused.
            Err(problem) => return wrong(format!("--strategy: {}", problem.to_string().replace('\n', " "))),
        };
        let given = |axis: fn(&Strategy) -> usize, flag| read.as_ref().map_or(flag, axis);
        let (pp, tp) = (given(|strategy| strategy.pp, flags.pp), given(|strategy| strategy.tp, flags.tp));
        let flags = Flags { dp: read.as_ref().map_or(flags.dp, |strategy| strategy.dp), ..flags };
        let shown = if pp == 1 { format!("--tp {tp}") } else { format!("--pp {pp} x --tp {tp}") };
        // More ranks than can be counted are as wrong as none.
        let parts = pp.checked_mul(tp).filter(|parts| *parts > 0);
        let Some((parts, replicas)) = parts.and_then(|parts| {
            let product = |dp: usize| dp.checked_mul(parts).filter(|ranks| *ranks > 0);
            flags.dp.map_or(Some((parts, None)), |dp| Some((parts, Some(product(dp)?))))
        }) else {
            return wrong(format!("--dp {} x {shown} is no number of ranks", flags.dp.unwrap_or(1)));
        };
        let asked = flags.ranks.or(replicas).or(start.started);
        let ranks = asked.unwrap_or(parts.max(2));
        let few = flags.min_ranks.unwrap_or(ranks);
        if few > ranks {
            return wrong(format!("--min-ranks {few} is more than the {ranks} ranks"));
        }
        if let Some(started) = start.started.filter(|started| !(few..=ranks).contains(started)) {
            return wrong(format!("{started} ranks have been started, and the flags are for {ranks}"));
        }
        if flags.restarts > 0 && start.launch != Launch::Processes {
            return wrong("--restarts is for --launch processes: what other launchers start, they start again".into());
        }
        if flags.min_ranks.is_some() && flags.restarts == 0 && start.launch != Launch::Env {
            return wrong("--min-ranks is for ranks that are started again: give --restarts as well".into());
        }
        if flags.dp.is_none() && !ranks.is_multiple_of(parts) {
            return wrong(format!("{shown} does not divide --ranks {ranks}"));
        }
        let dp = flags.dp.unwrap_or(ranks / parts);
        if let Some(made) = replicas.filter(|made| *made != ranks) {
            return wrong(format!("--dp {dp} x {shown} makes {made} ranks, but --ranks is {ranks}"));
        }
        let Flags { d_model, heads, .. } = flags;
        let trial = batch::trial();
        let auto = flags.batch == Rows::Auto;
        if auto && (start.launch != Launch::Threads || flags.device != Compute::Flex) {
            return wrong(
                "--batch auto tries batches on ranks that are threads of a CPU: give --launch threads, or a number"
                    .into(),
            );
        }
        if auto && flags.micro_batch.is_some() {
            return wrong("--batch auto finds out how many rows go through at once: leave --micro-batch out".into());
        }
        // What is tried, or to begin with: one row in each micro-batch.
        let in_pipeline = match (&read, pp) {
            (_, 1) => 1,
            (Some(strategy), _) => strategy.pipeline.as_ref().map_or(1, |pipeline| pipeline.micro_batches),
            (None, _) => flags.micro_batches.unwrap_or(4 * pp),
        };
        let batch = match flags.batch {
            Rows::Number(rows) => rows,
            Rows::Auto => dp * in_pipeline * trial.unwrap_or(1),
        };
        if batch < dp {
            return wrong(format!(
                "--batch {batch} is smaller than --dp {dp}: every replica needs a row of each batch, give --dp {batch}"
            ));
        }
        if let Some(micro_batch) = flags.micro_batch.filter(|&rows| rows > batch) {
            return wrong(format!("--micro-batch {micro_batch} is larger than --batch {batch}"));
        }
        // The replica with fewest rows decides.
        let rows = batch / dp;
        if pp > 1 && flags.micro_batch.is_some() {
            return wrong(format!(
                "--micro-batch is for ranks that hold all layers: with --pp {pp}, give --micro-batches"
            ));
        }
        if let Some(micro_batches) = flags.micro_batches {
            if pp == 1 {
                return wrong(format!("--micro-batches {micro_batches} is for pipelines: give --pp as well"));
            }
            if micro_batches > rows {
                return wrong(format!("--micro-batches {micro_batches} is more than the {rows} rows of a replica"));
            }
        }
        if let Some(most) = flags.grow_batch.filter(|most| *most < batch) {
            return wrong(format!("--grow-batch {most} is smaller than --batch {batch}"));
        }
        if d_model % heads != 0 {
            return wrong(format!("--heads {heads} does not divide --d-model {d_model}"));
        }
        if heads % tp != 0 {
            return wrong(format!("--tp {tp} does not divide --heads {heads}: each rank takes whole heads"));
        }
        if let Some(json) = &flags.json
            && let Err(why) = writable(json, flags.text.as_deref())
        {
            return wrong(why);
        }

        let config = || {
            let micro_batches = flags.micro_batches.unwrap_or((4 * pp).min(rows));
            PipelineConfig::new(micro_batches).with_schedule(flags.schedule.schedule())
        };
        let strategy = match read {
            Some(strategy) => strategy,
            None => {
                let data = DataParallelConfig::new().with_sharding(flags.zero.unwrap_or_default());
                let strategy = Strategy::new().with_dp(dp).with_tp(tp, Plan::megatron()).with_data(data);
                if pp > 1 { strategy.with_pp(pp, config()) } else { strategy }
            }
        };
        let sharding = strategy.data.sharding;
        if dp == 1 && sharding != Sharding::None {
            let asked = match flags.zero {
                Some(_) => format!("--zero {}", sharding.zero_stage()),
                None => format!("--strategy: sharding = \"{sharding}\""),
            };
            return wrong(format!(
                "{asked} is divided among the replicas, and with --dp 1 there is one: give --dp 2 or more, or leave it out"
            ));
        }
        if let Err(problem) = strategy.axes(ranks) {
            return wrong(format!("--strategy: {problem}"));
        }
        let noise_scale = flags.noise_scale || flags.grow_batch.is_some();
        if noise_scale && strategy.data.sharding == Sharding::Parameters {
            return wrong(
                "--noise-scale compares the gradients of replicas, which --zero 3 sums up first: give --zero 2".into(),
            );
        }
        let data = strategy.data.clone().with_noise_scale(noise_scale || strategy.data.noise_scale);
        let strategy = strategy.with_data(data);
        // A trial leaves nothing behind.
        let kept = trial.is_none() || !auto;
        Ok(Self {
            text: flags.text,
            ranks,
            dp,
            tp,
            pp,
            strategy,
            steps: if kept { flags.steps } else { batch::TRIAL_STEPS },
            batch,
            auto: auto && trial.is_none(),
            noise_scale,
            grow_batch: flags.grow_batch,
            micro_batch: flags.micro_batch.unwrap_or(batch).min(batch.div_ceil(dp)),
            seq: flags.seq,
            layers: flags.layers,
            d_model,
            heads,
            lr: flags.lr,
            clip: flags.clip,
            seed: flags.seed,
            json: flags.json.filter(|_| kept),
            save: flags.save.filter(|_| kept),
            save_every: flags.save_every,
            keep: flags.keep,
            resume: flags.resume.filter(|_| kept),
            restarts: flags.restarts,
            min_ranks: flags.min_ranks,
            device: flags.device,
            start,
        })
    }

    /// The numbers of ranks that the run can go on with when some are lost.
    pub fn restart_sizes(&self) -> Vec<usize> {
        let Some(fewest) = self.min_ranks else { return Vec::new() };
        (fewest..=self.ranks).filter(|ranks| self.on(*ranks).is_ok()).collect()
    }

    /// The same run on fewer ranks: fewer replicas share the same batch, in micro-batches as large as before.
    pub fn on(&self, ranks: usize) -> Result<Self, Error> {
        if ranks == self.ranks {
            return Ok(self.clone());
        }
        let strategy = self.strategy.resized(self.ranks, ranks)?;
        let dp = ranks / (self.pp * self.tp);
        Ok(Self { ranks, dp, strategy, ..self.clone() })
    }

    /// The ranks that are in this process.
    pub fn ranks_here(&self) -> usize {
        if self.start.launch == Launch::Threads { self.ranks } else { 1 }
    }

    /// The same with as many rows as go through a layer at once on each replica.
    pub fn with_rows_at_once(&self, rows: usize) -> Self {
        let pipeline = self.strategy.pipeline.as_ref().filter(|_| self.pp > 1);
        let batch = self.dp * pipeline.map_or(1, |config| config.micro_batches) * rows;
        Self { batch, micro_batch: batch.div_ceil(self.dp), auto: false, ..self.clone() }
    }

    /// The most rows that go through a layer at once.
    pub fn rows_at_once(&self) -> usize {
        match self.pp {
            1 => self.micro_batch,
            _ => {
                let pipeline = self.strategy.pipeline.as_ref();
                self.batch.div_ceil(self.dp).div_ceil(pipeline.map_or(1, |config| config.micro_batches))
            }
        }
    }

    /// The model that the flags describe.
    pub fn model(&self) -> GptConfig {
        GptConfig::new(VOCAB, self.seq, self.d_model, self.heads, self.layers)
    }
}

impl ScheduleName {
    fn schedule(self) -> Schedule {
        match self {
            Self::GPipe => Schedule::GPipe,
            Self::OneForwardOneBackward => Schedule::OneForwardOneBackward,
            Self::Interleaved => Schedule::Interleaved { stages_per_rank: 2 },
            Self::ZeroBubble => Schedule::ZeroBubbleH1,
        }
    }
}

fn up_to<const MOST: usize>(value: &str) -> Result<usize, String> {
    match value.parse::<i128>() {
        Ok(n) if n < 1 => Err("it must be at least 1".into()),
        Ok(n) if n > MOST as i128 => Err(format!("it must be at most {MOST}")),
        Ok(n) => Ok(n as usize),
        Err(_) => Err("it must be a whole number".into()),
    }
}

fn zero(value: &str) -> Result<Sharding, String> {
    let stage = value.parse().map_err(|_| "it must be 0, 1, 2 or 3")?;
    Sharding::from_zero_stage(stage).map_err(|_| "it must be 0, 1, 2 or 3".into())
}

fn learning_rate(value: &str) -> Result<f64, String> {
    match value.parse() {
        Ok(rate) if rate > 0.0 && rate <= 1.0 => Ok(rate),
        Ok(_) => Err("it must be greater than 0 and at most 1".into()),
        Err(_) => Err("it must be a number".into()),
    }
}

fn norm(value: &str) -> Result<f64, String> {
    match value.parse() {
        Ok(norm) if norm > 0.0 && f64::is_finite(norm) => Ok(norm),
        Ok(_) => Err("it must be greater than 0 and finite".into()),
        Err(_) => Err("it must be a number".into()),
    }
}

/// Finds out before the training, not after it, that the outcome can't be written; leaves no file behind.
fn writable(json: &Path, text: Option<&Path>) -> Result<(), String> {
    let existed = json.exists();
    if existed && text.is_some_and(|text| json.canonicalize().ok() == text.canonicalize().ok()) {
        return Err(format!("--json {json:?} would overwrite the text"));
    }
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(json)
        .map_err(|why| format!("cannot write --json {json:?}: {why}"))?;
    if existed {
        return Ok(());
    }
    match fs::remove_file(json) {
        // Other ranks find it out as well.
        Err(why) if why.kind() != io::ErrorKind::NotFound => Err(format!("cannot write --json {json:?}: {why}")),
        _ => Ok(()),
    }
}
