//! Flags that several programs have, and which of them make no sense together.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, ValueEnum};

/// What may be in the file of `--strategy`.
pub const STRATEGY_KEYS: &str = r#"Keys of a --strategy file, in TOML, with what they are when left out:
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
  fusion               true
  [pipeline]
  micro_batches        needed if pp > 1
  schedule             "1f1b"; or "gpipe", "zb_h1", { interleaved = { stages_per_rank = 2 } }, { custom = ".." }
  cut                  "balanced"; or { before = ["layers.2.*"] }, { patterns = [["layers.0.*"], ["*"]] }, ..
  whole_inputs         []
  seed                 0
  graphs               16
  check_inputs_every   1
  fusion               true
The docs of `burn_parallel::train::Strategy` say what each does."#;

/// How the model is spread.
#[derive(Args, Debug)]
pub struct MeshFlags {
    /// How many ranks train together, threads or processes as --launch says [default: --dp times --pp times --tp]
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
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dp", "tp", "pp", "schedule"])]
    strategy: Option<PathBuf>,

    /// What the replicas divide among themselves: 0 nothing, 1 the state of the optimizer, 2 gradients as well, 3
    /// parameters as well
    #[arg(long, value_name = "STAGE", value_parser = zero, conflicts_with = "strategy")]
    zero: Option<Sharding>,

    /// In which order the stages of a pipeline take the micro-batches
    #[arg(long, value_name = "NAME", value_enum, default_value = "1f1b")]
    schedule: ScheduleName,
}

/// How many ranks there are along each axis.
#[derive(Clone, Copy, Debug)]
pub struct Axes {
    /// How many ranks train together.
    pub ranks: usize,
    /// How many replicas of the model share each batch.
    pub dp: usize,
    /// How many ranks share the layers of a replica.
    pub pp: usize,
    /// How many ranks share each layer of a replica.
    pub tp: usize,
}

impl fmt::Display for Axes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ranks, dp, pp, tp } = self;
        write!(f, "{ranks} (dp {dp}, pp {pp}, tp {tp})")
    }
}

/// The axes, and the file of `--strategy` if there is one.
pub type Mesh = (Axes, Option<Strategy>);

impl MeshFlags {
    /// The sizes of the axes, where so many ranks have been `started` already, if any, and else are `least` if nothing
    /// says more. Of ranks that were started again some may be missing, down to `fewest`.
    pub fn read(&self, started: Option<usize>, least: usize, fewest: Option<usize>) -> Result<Mesh, String> {
        let read = self.strategy.as_ref().map(Strategy::read).transpose();
        // In one line, as all that is refused.
        let read = read.map_err(|problem| format!("--strategy: {}", problem.to_string().replace('\n', " ")))?;
        let given = |axis: fn(&Strategy) -> usize, flag| read.as_ref().map_or(flag, axis);
        let (pp, tp) = (given(|strategy| strategy.pp, self.pp), given(|strategy| strategy.tp, self.tp));
        let dp = read.as_ref().map_or(self.dp, |strategy| strategy.dp);
        let shown = if pp == 1 { format!("--tp {tp}") } else { format!("--pp {pp} x --tp {tp}") };
        // More ranks than can be counted are as wrong as none.
        let parts = pp.checked_mul(tp).filter(|parts| *parts > 0);
        let Some((parts, replicas)) = parts.and_then(|parts| {
            let product = |dp: usize| dp.checked_mul(parts).filter(|ranks| *ranks > 0);
            dp.map_or(Some((parts, None)), |dp| Some((parts, Some(product(dp)?))))
        }) else {
            return Err(format!("--dp {} x {shown} is no number of ranks", dp.unwrap_or(1)));
        };
        let ranks = self.ranks.or(replicas).or(started).unwrap_or(parts.max(least));
        let fewest = fewest.unwrap_or(ranks);
        if fewest > ranks {
            return Err(format!("--min-ranks {fewest} is more than the {ranks} ranks"));
        }
        if let Some(started) = started.filter(|started| !(fewest..=ranks).contains(started)) {
            return Err(format!("{started} ranks have been started, and the flags are for {ranks}"));
        }
        if dp.is_none() && !ranks.is_multiple_of(parts) {
            return Err(format!("{shown} does not divide --ranks {ranks}"));
        }
        let dp = dp.unwrap_or(ranks / parts);
        if let Some(made) = replicas.filter(|made| *made != ranks) {
            return Err(format!("--dp {dp} x {shown} makes {made} ranks, but --ranks is {ranks}"));
        }
        Ok((Axes { ranks, dp, pp, tp }, read))
    }

    /// How the model is spread: as the file says, or as the flags say, by a plan and with so many micro-batches.
    pub fn strategy(&self, (axes, read): Mesh, plan: Plan, micro_batches: usize) -> Result<Strategy, String> {
        let Axes { ranks, dp, pp, tp } = axes;
        let strategy = read.unwrap_or_else(|| {
            let data = DataParallelConfig::new().with_sharding(self.zero.unwrap_or_default());
            let strategy = Strategy::new().with_dp(dp).with_tp(tp, plan).with_data(data);
            match pp {
                1 => strategy,
                _ => {
                    let config = PipelineConfig::new(micro_batches).with_schedule(self.schedule.schedule());
                    strategy.with_pp(pp, config)
                }
            }
        });
        let sharding = strategy.data.sharding;
        if dp == 1 && sharding != Sharding::None {
            let asked = match self.zero {
                Some(_) => format!("--zero {}", sharding.zero_stage()),
                None => format!("--strategy: sharding = \"{sharding}\""),
            };
            return Err(format!(
                "{asked} is divided among the replicas, and with --dp 1 there is one: give --dp 2 or more, or leave it out"
            ));
        }
        strategy.axes(ranks).map_err(|problem| format!("--strategy: {problem}"))?;
        Ok(strategy)
    }
}

/// The flags of the command line.
pub fn parse<F: CommandFactory + FromArgMatches>() -> Result<F, clap::Error> {
    // `--steps -1` is a wrong number of steps, not a flag that nobody knows.
    let command = F::command().mut_args(|flag| flag.allow_negative_numbers(true));
    F::from_arg_matches(&command.try_get_matches()?)
}

/// Flags that make no sense together.
pub fn wrong<T>(why: String) -> Result<T, clap::Error> {
    Err(clap::Error::raw(ErrorKind::ValueValidation, why))
}

/// What is wrong with the flags, in one line.
pub fn one_line(wrong: &clap::Error) -> String {
    // The first paragraph says what is wrong, the others of clap how the usage is.
    let message = wrong.to_string();
    let lines: Vec<&str> = message.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let line = lines.join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

/// The schedules of pipelines by the names of the field.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ScheduleName {
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

pub fn up_to<const MOST: usize>(value: &str) -> Result<usize, String> {
    match value.parse::<i128>() {
        Ok(n) if n < 1 => Err("it must be at least 1".into()),
        Ok(n) if n > MOST as i128 => Err(format!("it must be at most {MOST}")),
        Ok(n) => Ok(n as usize),
        Err(_) => Err("it must be a whole number".into()),
    }
}

pub fn zero(value: &str) -> Result<Sharding, String> {
    let stage = value.parse().map_err(|_| "it must be 0, 1, 2 or 3")?;
    Sharding::from_zero_stage(stage).map_err(|_| "it must be 0, 1, 2 or 3".into())
}

/// Whether a batch of so many rows has one for each of `dp` replicas.
pub fn every_replica(batch: usize, dp: usize) -> Result<(), String> {
    match batch < dp {
        true => Err(format!(
            "--batch {batch} is smaller than --dp {dp}: every replica needs a row of each batch, give --batch {dp}"
        )),
        false => Ok(()),
    }
}

pub fn learning_rate(value: &str) -> Result<f64, String> {
    match value.parse() {
        Ok(rate) if rate > 0.0 && rate <= 1.0 => Ok(rate),
        Ok(_) => Err("it must be greater than 0 and at most 1".into()),
        Err(_) => Err("it must be a number".into()),
    }
}

pub fn norm(value: &str) -> Result<f64, String> {
    match value.parse() {
        Ok(norm) if norm > 0.0 && f64::is_finite(norm) => Ok(norm),
        Ok(_) => Err("it must be greater than 0 and finite".into()),
        Err(_) => Err("it must be a number".into()),
    }
}

/// Finds out before the training, not after it, that the outcome can't be written; leaves no file behind.
pub fn writable(json: &Path, text: Option<&Path>) -> Result<(), String> {
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
