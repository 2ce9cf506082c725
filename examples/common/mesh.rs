//! How a model is spread over ranks: flags, or a file, and which of them make no sense together.

use std::fmt;
use std::path::PathBuf;

use burn::tensor::Device;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;
use clap::builder::{PossibleValuesParser, TypedValueParser, ValueParser};
use clap::{Args, ValueEnum};
use serde_json::Value;

use super::flags::{count, up_to};

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
  noise_scale_every    0
  allow_unused_parameters  false
  [tensor]
  plan                 needed if tp > 1: "megatron", "hugging_face", or a table of rules
  seed                 0
  check_inputs_every   1 on CPUs, 100 on devices
  fusion               true
  [pipeline]
  micro_batches        needed if pp > 1
  schedule             "1f1b"; or "gpipe", "zb_h1", { interleaved = { stages_per_rank = 2 } }, { custom = ".." }
  cut                  "balanced"; or { before = ["*layers.2.*"] }, { patterns = [[..], [..]] }, ..
  whole_inputs         []
  seed                 0
  graphs               16
  check_inputs_every   1 on CPUs, 100 on devices
  fusion               true
docs/strategies.md says what each does. A key that nothing reads, as a `plan` where `tp` is 1, is an error."#;

/// How the model is spread.
#[derive(Args, Debug)]
pub struct MeshFlags {
    /// How many ranks train together, threads or processes as --launch says [default: those that a launcher has
    /// started; else --dp times --pp times --tp, with one replica if --dp is left out]
    #[arg(long, value_name = "N", value_parser = up_to::<1024>)]
    ranks: Option<usize>,

    /// How many replicas of the model share each batch: data parallelism [default: as many as there are ranks for,
    /// after --pp and --tp]
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

    /// How steps are run: `eager` by the model's own forward, for replicas alone (under --zero 3 with gradient
    /// checkpointing); `captured` as a graph whose operations are fused; `auto` captures where the model is split or
    /// cut, or its parameters are divided [default: auto]
    #[arg(long, value_name = "HOW", value_parser = engine(), conflicts_with = "strategy")]
    engine: Option<Engine>,

    /// In which order the stages of a pipeline take the micro-batches [default: 1f1b]
    #[arg(long, value_name = "NAME", value_enum)]
    schedule: Option<ScheduleName>,
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
    /// Whether a file says so, and not flags.
    pub in_file: bool,
}

impl Axes {
    /// What the user calls the size of an axis: a flag, or a key of the file.
    pub fn said(&self, axis: &str, size: usize) -> String {
        said(self.in_file, axis, size)
    }
}

impl fmt::Display for Axes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ranks, dp, pp, tp, .. } = self;
        write!(f, "{ranks} (dp {dp}, pp {pp}, tp {tp})")
    }
}

/// The sizes of the axes, and where they come from.
#[derive(Clone, Debug)]
pub struct MeshSizes {
    pub axes: Axes,
    /// What the file of `--strategy` says, if there is one.
    pub file: Option<Strategy>,
    /// What the replicas are called.
    pub replicas: String,
}

impl MeshSizes {
    /// The micro-batches of a pipeline that the file gives, if it does.
    pub fn micro_batches(&self) -> Option<usize> {
        let pipeline = self.file.as_ref()?.pipeline.as_ref()?;
        (self.axes.pp > 1).then_some(pipeline.micro_batches)
    }

    /// Whether a batch of so many rows has one for each replica.
    pub fn every_replica(&self, batch: usize) -> Result<(), String> {
        let dp = self.axes.dp;
        match batch < dp {
            true => Err(format!(
                "--batch {batch} is smaller than {}: every replica needs a row of each batch, give --batch {dp}",
                self.replicas
            )),
            false => Ok(()),
        }
    }

    /// Whether a replica with so many rows has one for each micro-batch that the file asks for.
    pub fn every_micro_batch(&self, rows: usize) -> Result<(), String> {
        match self.micro_batches() {
            Some(micro_batches) if micro_batches > rows => Err(format!(
                "--strategy: `pipeline.micro_batches = {micro_batches}` is more than the {} that a replica has of a batch: \
                 give fewer, or --batch {}",
                count(rows, "row"),
                micro_batches.saturating_mul(self.axes.dp)
            )),
            _ => Ok(()),
        }
    }

    /// Whether a model of so many layers can be cut into the stages of a pipeline, where the file does not say how:
    /// each layer has two blocks, attention and MLP, and embedding and head are one each.
    pub fn every_stage(&self, strategy: &Strategy, layers: usize) -> Result<(), String> {
        let Axes { pp, .. } = self.axes;
        let Some(pipeline) = strategy.pipeline.as_ref().filter(|pipeline| pp > 1 && pipeline.cut == Cut::Balanced)
        else {
            return Ok(());
        };
        let (each, blocks) = (pipeline.schedule.stages_per_rank(), 2 * layers + 2);
        let stages = pp.saturating_mul(each);
        if stages <= blocks {
            return Ok(());
        }
        let advice = match (each, blocks / each) {
            (1, most) => format!("take {most} ranks or fewer"),
            (_, 0 | 1) => "take another schedule".into(),
            (_, most) => format!("take {most} ranks or fewer, or another schedule"),
        };
        Err(format!(
            "{} with schedule {} makes {stages} stages, more than the {blocks} blocks of a model of {} (embedding, \
             attention and MLP of each layer, head): {advice}",
            self.axes.said("pp", pp),
            pipeline.schedule,
            count(layers, "layer")
        ))
    }
}

fn said(in_file: bool, axis: &str, size: usize) -> String {
    if in_file { format!("`{axis} = {size}` of --strategy") } else { format!("--{axis} {size}") }
}

impl MeshFlags {
    /// The sizes of the axes, where so many ranks have been `started` already, if any, and else are `least` if nothing
    /// says more. Of ranks that were started again some may be missing, down to `fewest`.
    pub fn read(&self, started: Option<usize>, least: usize, fewest: Option<usize>) -> Result<MeshSizes, String> {
        let file = self.strategy.as_ref().map(Strategy::read).transpose();
        // In one line, as all that is refused.
        let file = file.map_err(|problem| format!("--strategy: {}", problem.to_string().replace('\n', " ")))?;
        let no_micro_batch =
            |file: &Strategy| file.pp > 1 && file.pipeline.as_ref().is_some_and(|pipeline| pipeline.micro_batches == 0);
        if file.as_ref().is_some_and(no_micro_batch) {
            return Err("--strategy: `pipeline.micro_batches = 0`: it must be at least 1".into());
        }
        let given = |axis: fn(&Strategy) -> usize, flag| file.as_ref().map_or(flag, axis);
        let (pp, tp) = (given(|strategy| strategy.pp, self.pp), given(|strategy| strategy.tp, self.tp));
        let dp = file.as_ref().map_or(self.dp, |strategy| strategy.dp);
        if pp == 1
            && let Some(schedule) = self.schedule
        {
            return Err(format!("--schedule {} is for pipelines: give --pp as well", schedule.name()));
        }
        let said = |axis, size| said(file.is_some(), axis, size);
        let shown = match pp {
            1 => said("tp", tp),
            _ => format!("{} x {}", said("pp", pp), said("tp", tp)),
        };
        // More ranks than can be counted are as wrong as none.
        let parts = pp.checked_mul(tp).filter(|parts| *parts > 0);
        let Some((parts, replicas)) = parts.and_then(|parts| {
            let product = |dp: usize| dp.checked_mul(parts).filter(|ranks| *ranks > 0);
            dp.map_or(Some((parts, None)), |dp| Some((parts, Some(product(dp)?))))
        }) else {
            let replicas = dp.map_or(String::new(), |dp| said("dp", dp) + " x ");
            return Err(format!("{replicas}{shown} is no number of ranks"));
        };
        let ranks = self.ranks.or(replicas).or(started).unwrap_or(parts.max(least));
        let fewest = fewest.unwrap_or(ranks);
        if fewest > ranks {
            return Err(format!("--min-ranks {fewest} is more than the {ranks} ranks"));
        }
        if let Some(started) = started.filter(|started| !(fewest..=ranks).contains(started)) {
            let source = if file.is_some() { "the file of --strategy is" } else { "the flags are" };
            return Err(format!("{started} ranks have been started, and {source} for {ranks}"));
        }
        if dp.is_none() && !ranks.is_multiple_of(parts) {
            let of = match (self.ranks, started) {
                (None, Some(_)) => format!("the {ranks} ranks that have been started"),
                _ => format!("--ranks {ranks}"),
            };
            return Err(format!("{shown} does not divide {of}"));
        }
        let called = match (dp, self.ranks, started) {
            (None, None, Some(_)) => format!("the replicas of the {ranks} ranks that have been started"),
            (None, Some(_), _) => format!("the replicas of --ranks {ranks}"),
            _ => said("dp", dp.unwrap_or(ranks / parts)),
        };
        let dp = dp.unwrap_or(ranks / parts);
        if let Some(made) = replicas.filter(|made| *made != ranks) {
            return Err(format!("{} x {shown} makes {made} ranks, but --ranks is {ranks}", said("dp", dp)));
        }
        let axes = Axes { ranks, dp, pp, tp, in_file: file.is_some() };
        Ok(MeshSizes { axes, file, replicas: called })
    }

    /// How the model is spread: as the file says, or as the flags say, by a plan and with so many micro-batches, and by
    /// an engine if they do not say it.
    pub fn strategy(
        &self,
        mesh: &MeshSizes,
        plan: Plan,
        micro_batches: usize,
        engine: Engine,
    ) -> Result<Strategy, String> {
        let Axes { ranks, dp, pp, tp, .. } = mesh.axes;
        let engine = self.engine.unwrap_or(engine);
        if engine == Engine::Eager && mesh.file.is_none() && (pp > 1 || tp > 1) {
            let (axis, size) = if pp > 1 { ("pp", pp) } else { ("tp", tp) };
            return Err(format!(
                "--engine eager runs the model's own forward, and {} needs captured steps: leave it out",
                mesh.axes.said(axis, size)
            ));
        }
        let strategy = mesh.file.clone().unwrap_or_else(|| {
            let data = DataParallelConfig::new().with_sharding(self.zero.unwrap_or_default());
            let strategy = Strategy::new().with_dp(dp).with_data(data).with_engine(engine);
            let strategy = if tp == 1 { strategy } else { strategy.with_tp(tp, plan) };
            match pp {
                1 => strategy,
                _ => {
                    let schedule = self.schedule.map_or(Schedule::default(), ScheduleName::schedule);
                    strategy.with_pp(pp, PipelineConfig::new(micro_batches).with_schedule(schedule))
                }
            }
        });
        let sharding = strategy.data.sharding;
        if dp == 1 && sharding != Sharding::None {
            let asked = match self.zero {
                Some(_) => format!("--zero {}", sharding.zero_stage()),
                None => format!("--strategy: sharding = \"{sharding}\""),
            };
            let (one, two) = match mesh.file.as_ref().map(|file| file.dp) {
                Some(Some(_)) => (mesh.axes.said("dp", 1), "set `dp` to 2"),
                Some(None) => (format!("--ranks {ranks}"), "give twice as many"),
                None => (mesh.axes.said("dp", 1), "give --dp 2"),
            };
            return Err(format!(
                "{asked} is divided among the replicas, and with {one} there is one: {two} or more, or leave it out"
            ));
        }
        strategy.axes(ranks).map_err(|problem| format!("--strategy: {problem}"))?;
        Ok(strategy)
    }
}

/// A device for models and inputs of a strategy. Where eager replicas gather parameters for a pass, burn is to compute
/// views of them again in backward, and not to keep them.
pub fn autodiff(strategy: &Strategy, device: Device) -> Device {
    let device = device.autodiff();
    if recomputes(strategy) { device.gradient_checkpointing() } else { device }
}

/// Whether a strategy demands gradient checkpointing.
pub fn recomputes(strategy: &Strategy) -> bool {
    let data = &strategy.data;
    strategy.engine == Engine::Eager && data.sharding == Sharding::Parameters && data.keep == Keep::Pass
}

/// A strategy by its keys, as a file has them.
pub fn described(strategy: &Strategy) -> Result<Value, String> {
    serde_json::to_value(strategy).map_err(|why| why.to_string())
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
    fn name(self) -> String {
        self.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
    }

    fn schedule(self) -> Schedule {
        match self {
            Self::GPipe => Schedule::GPipe,
            Self::OneForwardOneBackward => Schedule::OneForwardOneBackward,
            Self::Interleaved => Schedule::Interleaved { stages_per_rank: 2 },
            Self::ZeroBubble => Schedule::ZeroBubbleH1,
        }
    }
}

fn zero(value: &str) -> Result<Sharding, String> {
    let stage = value.parse().map_err(|_| "it must be 0, 1, 2 or 3")?;
    Sharding::from_zero_stage(stage).map_err(|_| "it must be 0, 1, 2 or 3".into())
}

/// Reads `--engine`, by the names that it has in files.
fn engine() -> ValueParser {
    let engines = [("auto", Engine::Auto), ("eager", Engine::Eager), ("captured", Engine::Captured)];
    let names = PossibleValuesParser::new(engines.map(|(name, _)| name));
    let of = move |name: String| engines.iter().find(|(known, _)| *known == name).map_or(Engine::Auto, |(_, it)| *it);
    names.map(of).into()
}
