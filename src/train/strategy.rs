//! The strategy: how a model is parallelised, as data.

use std::fmt;
use std::io;
use std::path::Path;

use burn::config::{Config, ConfigError, config_to_json};
use serde::{Deserialize, Serialize};

use super::unread;
use crate::Error;
use crate::data_parallel::DataParallelConfig;
use crate::forms::{Table, optional_table, read_text, table, with_forms};
use crate::pipeline_parallel::PipelineConfig;
use crate::sharding::Sharding;
use crate::tensor_parallel::TensorParallelConfig;

/// How a model is spread over a world: the axes and their sizes, and what each does. One value, or one file, for
/// [`Parallelize::parallelize`](super::Parallelize::parallelize).
///
/// In TOML, all of it but the sizes of the axes with their defaults left out:
///
/// ```
/// use burn_parallel::prelude::*;
///
/// let strategy: Strategy = r#"
///     dp = 2
///     pp = 2
///     tp = 2
///
///     [tensor]
///     plan = "megatron"                  # or its rules, as `Plan` says
///
///     [pipeline]
///     micro_batches = 8
///     schedule = "1f1b"                  # gpipe, zb_h1, { interleaved = { stages_per_rank = 2 } }, ...
///     cut = { before = ["layers.6.*"] }  # "balanced" without it
///
///     [data]
///     reduce_dtype = "BF16"
/// "#.parse()?;
/// let same = Strategy::new()
///     .with_dp(2)
///     .with_tp(2, Plan::megatron())
///     .with_pp(2, PipelineConfig::new(8).with_cut(Cut::before(["layers.6.*"])))
///     .with_data(DataParallelConfig::new().with_reduce_dtype(burn::tensor::FloatDType::BF16));
/// assert_eq!(strategy.to_string(), same.to_string());
/// # Ok::<(), Error>(())
/// ```
///
/// # Every key
/// With the value that it has when it is left out; `micro_batches` is needed. Where there is no default the line says
/// so. A key that nobody knows is an error, and so is one of `[tensor]`, or `[pipeline]`, that nothing reads beside the
/// others, as a `plan` where `tp` is 1. `[data]` may stay as it is for any number of replicas: a single one reads
/// `noise_scale_every` alone, and [`parallelize`](super::Parallelize::parallelize) warns of the others (by the crate
/// `log`).
///
/// ```
/// # let all: burn_parallel::train::Strategy = r#"
/// # dp = 4            # replicas; left out, as many as there are ranks for
/// pp = 1              # ranks that share the layers
/// tp = 1              # ranks that share each layer
/// engine = "auto"     # "eager" or "captured", see `Engine`
/// # "#.parse()?;
/// # let all: burn_parallel::train::Strategy = r#"
/// # tp = 2
///
/// [data]              # `DataParallelConfig`
/// bucket_bytes = 25_000_000
/// first_bucket_bytes = 1_000_000
/// reduce_dtype = "BF16"          # or "F16", "F32", "F64"; left out, gradients travel in their own dtype
/// overlap = true
/// compare_every = 0
/// sharding = "none"              # or "optimizer", "gradients", "parameters", see `Sharding`
/// sharding_ranks = 2             # left out, all replicas
/// keep = "pass"                  # or "micro_batch", "step", see `Keep`
/// allow_unused_parameters = false  # true lets ranks use different ones, in eager steps with "parameters"
/// noise_scale_every = 0          # 4 measures the noise of gradients in every 4th step, see `batch::NoiseScale`
///
/// [tensor]            # `TensorParallelConfig`
/// plan = "megatron"   # or "hugging_face", or a table of rules as in `Plan`; left out, nothing is split
/// seed = 0
/// check_inputs_every = 1         # left out, 1 on CPUs and 100 on devices
/// fusion = true       # groups of element-wise operations as one loop, on the host
/// # "#.parse()?;
/// # let all: burn_parallel::train::Strategy = r#"
/// # pp = 2
///
/// [pipeline]          # `PipelineConfig`
/// micro_batches = 8
/// schedule = "1f1b"   # or "gpipe", "zb_h1", { interleaved = { stages_per_rank = 2 } }, { custom = "0F0,0B0" }
/// cut = "balanced"    # { before = ["layers.6.*"] }, { patterns = [["embed.*"], ["*"]] }, { listed = [["path", 0]] }
/// whole_inputs = []   # as ["1"], the second input
/// seed = 0
/// graphs = 16
/// check_inputs_every = 1         # left out, 1 on CPUs and 100 on devices
/// fusion = true
/// # "#.parse()?;
/// # Ok::<(), burn_parallel::Error>(())
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Strategy {
    /// How many replicas of the model share each batch. None: as many as the world has ranks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dp: Option<usize>,
    /// How many ranks share the layers of a replica.
    pub pp: usize,
    /// How many ranks share each layer.
    pub tp: usize,
    /// How steps are run.
    pub engine: Engine,
    /// Data parallelism.
    #[serde(deserialize_with = "table")]
    pub data: DataParallelConfig,
    /// Tensor parallelism; also the seed of captured steps without a pipeline.
    #[serde(deserialize_with = "table")]
    pub tensor: TensorParallelConfig,
    /// Pipeline parallelism: needed if `pp` is above 1.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "optional_table")]
    pub pipeline: Option<PipelineConfig>,
}

/// How steps are run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// Eager, unless the model is split or cut, which needs a captured step, or replicas divide its parameters
    /// ([`Sharding::Parameters`]): captured steps hold no more than two groups of them whole, whatever layers do with
    /// them.
    #[default]
    Auto,
    /// By the model's own forward, at every step: shapes and decisions may change. For data parallelism alone. Divided
    /// parameters take a device with gradient checkpointing, as [`Keep::Pass`](crate::sharding::Keep::Pass) tells, or
    /// another [`Keep`](crate::sharding::Keep).
    Eager,
    /// Captured as a graph once for each shape of the inputs, with random numbers that do not depend on the number of
    /// ranks; on the host, in an optimised build, faster than eager steps, by loops over several operations, and slower
    /// without optimisation. [`graph`](crate::graph) says what a step must not do.
    Captured,
}

/// Why steps are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chosen {
    /// The strategy asks for it, or for what needs it.
    ByUser,
    /// For what it saves where parameters are divided: eager steps would do as well.
    ForParameters,
}

/// Files are those of [`Strategy::read`]: TOML, or JSON if the name ends in `.json`, without what nothing reads.
impl Config for Strategy {
    fn save<P: AsRef<Path>>(&self, file: P) -> io::Result<()> {
        let text = match is_json(file.as_ref()) {
            true => config_to_json(&unread::left_out(self)),
            false => self.to_string(),
        };
        std::fs::write(file, text)
    }

    fn load<P: AsRef<Path>>(file: P) -> Result<Self, ConfigError> {
        let file = file.as_ref();
        if !file.exists() {
            return Err(ConfigError::FileNotFound(file.display().to_string()));
        }
        Self::read(file).map_err(|error| ConfigError::InvalidFormat(error.to_string()))
    }

    fn load_binary(data: &[u8]) -> Result<Self, ConfigError> {
        let text = std::str::from_utf8(data).map_err(|problem| problem.to_string());
        text.and_then(Self::of_json).map_err(ConfigError::InvalidFormat)
    }
}

impl Strategy {
    /// Replicas alone, as many as there are ranks.
    pub fn new() -> Self {
        Self {
            dp: None,
            pp: 1,
            tp: 1,
            engine: Engine::Auto,
            data: DataParallelConfig::new(),
            tensor: TensorParallelConfig::default(),
            pipeline: None,
        }
    }

    /// Sets the number of replicas; by default as many as the world has ranks for.
    pub fn with_dp(mut self, replicas: usize) -> Self {
        self.dp = Some(replicas);
        self
    }

    /// Sets how many ranks share each layer, and by what plan.
    pub fn with_tp(mut self, ranks: usize, config: impl Into<TensorParallelConfig>) -> Self {
        (self.tp, self.tensor) = (ranks, config.into());
        self
    }

    /// Sets how many ranks share the layers, and how.
    pub fn with_pp(mut self, ranks: usize, config: PipelineConfig) -> Self {
        (self.pp, self.pipeline) = (ranks, Some(config));
        self
    }

    /// Sets how replicas are averaged.
    pub fn with_data(mut self, config: DataParallelConfig) -> Self {
        self.data = config;
        self
    }

    /// Sets how steps are run.
    pub fn with_engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }

    /// Reads a strategy from a file: JSON if its name ends in `.json`, else TOML.
    ///
    /// # Errors
    /// [`Error::Strategy`] if it cannot be read, or has keys that nothing reads: those that it says
    /// [above](Self#every-key).
    pub fn read(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let wrong = |problem: String| strategy_error(format!("{}: {problem}", path.display()));
        let text = read_text(path).map_err(wrong)?;
        if is_json(path) { Self::of_json(&text) } else { Self::of_toml(&text) }.map_err(wrong)
    }

    fn of_json(text: &str) -> Result<Self, String> {
        let Table(strategy): Table<Self> = with_forms(|| serde_json::from_str(text))?;
        unread::check(&strategy)?;
        Ok(strategy)
    }

    fn of_toml(text: &str) -> Result<Self, String> {
        let strategy: Self = with_forms(|| toml::from_str(text))?;
        unread::check(&strategy)?;
        Ok(strategy)
    }

    /// The sizes of the axes `dp`, `pp` and `tp` in a world of so many ranks.
    ///
    /// # Errors
    /// [`Error::Strategy`] if they do not go together with the world or with each other's settings.
    pub fn axes(&self, ranks: usize) -> Result<[usize; 3], Error> {
        let Self { dp, pp, tp, engine, .. } = self;
        let wrong = |problem| Err(strategy_error(problem));
        if let Some(axis) = [("dp", dp.unwrap_or(1)), ("pp", *pp), ("tp", *tp)].iter().find(|(_, size)| *size == 0) {
            return wrong(format!("axis `{}` has size 0; an axis that is not used has size 1", axis.0));
        }
        let parts = pp.checked_mul(*tp).filter(|parts| ranks.is_multiple_of(*parts));
        let Some(parts) = parts else {
            let dp = dp.map_or(String::new(), |dp| {
                format!(", and dp {dp} is to multiply that: start {} ranks", dp.saturating_mul(*pp).saturating_mul(*tp))
            });
            return wrong(format!("pp {pp} x tp {tp} does not divide the {ranks} ranks of the world{dp}"));
        };
        let dp = dp.unwrap_or(ranks / parts);
        if dp.checked_mul(parts) != Some(ranks) {
            let all = "set `dp` to what is left, or leave it out";
            return wrong(format!("dp {dp} x pp {pp} x tp {tp} are not the {ranks} ranks of the world: {all}"));
        }
        if *pp > 1 && self.pipeline.is_none() {
            return wrong(format!(
                "pp is {pp}, but `pipeline` is missing, which says into how many micro-batches: `micro_batches` in \
                 `[pipeline]`"
            ));
        }
        if let Some(pipeline) = self.pipeline.as_ref().filter(|pipeline| *pp > 1 && !pipeline.schedule.trains()) {
            return wrong(format!(
                "`pipeline.schedule` is {}, which has no backward pass: nothing would be trained. Take another, as `1f1b`: \
                 `forward_with` evaluates with any",
                pipeline.schedule
            ));
        }
        if *tp > 1 && self.tensor.plan == Default::default() {
            return wrong(format!(
                "tp is {tp}, but `tensor.plan` says of no parameter how it is split: `plan = \"megatron\"` in \
                 `[tensor]`, or rules"
            ));
        }
        if *engine == Engine::Eager && (*pp > 1 || *tp > 1) {
            return wrong(format!("engine is `eager`, but pp {pp} x tp {tp} needs captured steps: leave it out"));
        }
        Ok([dp, *pp, *tp])
    }

    /// This strategy on another number of ranks, as after some were lost: with as many replicas as these make. The
    /// other axes stay. A pipeline's micro-batches become more in proportion, so that each is as large as before when
    /// fewer replicas share the same batch; without a pipeline, give
    /// [`step_micro_batches`](super::ParallelModule::step_micro_batches) more of them.
    ///
    /// # Errors
    /// [`Error::Strategy`] if it does not fit so many ranks.
    pub fn resized(&self, from: usize, to: usize) -> Result<Self, Error> {
        let [before, pp, tp] = self.axes(from)?;
        let [dp, ..] = Self { dp: None, ..self.clone() }.axes(to)?;
        if let Some(ranks) = self.data.sharding_ranks.filter(|ranks| !dp.is_multiple_of(*ranks)) {
            return Err(strategy_error(format!(
                "on {to} ranks there are {dp} replicas, which groups of `data.sharding_ranks` {ranks} do not divide: leave it out"
            )));
        }
        let mut pipeline = self.pipeline.clone();
        if let Some(config) = &mut pipeline
            && dp != before
        {
            let micro_batches = config.micro_batches.saturating_mul(before).div_ceil(dp);
            // Interleaved schedules take as many micro-batches at a time as there are stages.
            let whole = config.micro_batches.is_multiple_of(pp);
            config.micro_batches = if whole { micro_batches.next_multiple_of(pp) } else { micro_batches };
        }
        Ok(Self { dp: Some(dp), pp, tp, pipeline, ..self.clone() })
    }

    /// Whether steps are captured in a world of so many ranks.
    ///
    /// # Errors
    /// As [`axes`](Self::axes).
    pub fn captures(&self, ranks: usize) -> Result<bool, Error> {
        let [dp, ..] = self.axes(ranks)?;
        Ok(self.captured(dp).is_some())
    }

    /// Whether steps are captured, with so many replicas; and by whose choice.
    pub(super) fn captured(&self, replicas: usize) -> Option<Chosen> {
        let divided = replicas > 1 && self.data.sharding == Sharding::Parameters;
        match self.engine {
            Engine::Captured => Some(Chosen::ByUser),
            _ if self.pp > 1 || self.tp > 1 => Some(Chosen::ByUser),
            Engine::Auto if divided => Some(Chosen::ForParameters),
            Engine::Auto | Engine::Eager => None,
        }
    }
}

impl Default for Strategy {
    fn default() -> Self {
        Self::new()
    }
}

/// As TOML, without what nothing reads.
impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&toml::to_string(&unread::left_out(self)).map_err(|_| fmt::Error)?)
    }
}

/// From TOML.
impl std::str::FromStr for Strategy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::of_toml(text).map_err(strategy_error)
    }
}

/// Whether a file is JSON, by its name.
fn is_json(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "json")
}

fn strategy_error(problem: String) -> Error {
    Error::Strategy { problem }
}

#[cfg(test)]
mod tests {
    use super::Strategy;
    use crate::pipeline_parallel::PipelineConfig;
    use crate::plan::Plan;

    #[test]
    fn fewer_ranks_are_fewer_replicas() {
        let strategy = Strategy::new().with_dp(3).with_tp(2, Plan::megatron()).with_pp(2, PipelineConfig::new(4));
        let resized = strategy.resized(12, 8).unwrap();
        assert_eq!(resized.axes(8).unwrap(), [2, 2, 2]);
        assert_eq!(resized.pipeline.unwrap().micro_batches, 6);
        assert_eq!(strategy.resized(12, 4).unwrap().pipeline.unwrap().micro_batches, 12);
        assert!(strategy.resized(12, 6).unwrap_err().to_string().contains("does not divide the 6 ranks"));
        let mut divided = Strategy::new();
        divided.data.sharding_ranks = Some(2);
        assert_eq!(divided.resized(8, 4).unwrap().dp, Some(4));
        assert!(divided.resized(8, 3).unwrap_err().to_string().contains("sharding_ranks"));
    }
}
