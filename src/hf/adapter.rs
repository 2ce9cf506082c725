//! LoRA adapters in the format of Python's `peft`.

use std::path::Path;

use burn::config::Config;
use burn::module::Lora;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::mapped::Mapped;
use super::mapping::Mapping;
use super::rule::{Names, Rule};
use super::weights::{Weights, open_stem, read_json};
use crate::Error;
use crate::plan::captures;
use crate::tensor_file::file_error;

/// In front of the names of all tensors.
const PREFIX: &str = "base_model.model.";
pub(super) const STEM: &str = "adapter_model";

/// The sizes of LoRA adapters: `weight + alpha / rank * a @ b`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    /// The columns of `a` and rows of `b`.
    pub rank: usize,
    /// What the product is scaled by, times `rank`.
    pub alpha: f64,
}

impl Config for AdapterConfig {}

impl AdapterConfig {
    /// Adapters of this rank and scale.
    pub const fn new(rank: usize, alpha: f64) -> Self {
        Self { rank, alpha }
    }

    /// What [`apply_lora`](burn::module::Module::apply_lora) makes adapters of these sizes with.
    pub fn lora(&self) -> Lora {
        Lora::new(self.rank, self.alpha)
    }
}

/// A directory of adapters that `peft` has made: `adapter_config.json` and `adapter_model.safetensors`.
///
/// ```no_run
/// use burn::module::Module;
/// use burn_parallel::hf::{self, Adapter, Mapping};
/// # use burn_parallel::prelude::*;
/// # fn with<M: Module>(model: M, rank: &Rank) -> Result<(), Error> {
/// let base = || hf::open("Llama-3.2-1B")?.mapped(Mapping::llama());
/// let adapter = Adapter::open("my-adapter")?;
/// // Either go on training the adapters: the weights of the base first, then the adapters.
/// let adapted = model.clone().apply_lora(adapter.config().lora());
/// let adapted = adapted.data_parallel(rank, DataParallelConfig::new())?.load(&mut base()?)?;
/// let adapted = adapted.load(&mut adapter.mapped(&Mapping::llama())?)?;
/// // Or add them to the weights as these are read.
/// let merged = base()?.merged(Adapter::open("my-adapter")?)?;
/// let model = model.data_parallel(rank, DataParallelConfig::new())?.load(&mut { merged })?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Adapter {
    pub(super) weights: Weights,
    config: AdapterConfig,
}

impl Adapter {
    /// Opens a directory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] as of [`open`](super::open), and if the adapters are of a kind that burn has none of:
    /// other than LoRA, of several ranks or alphas, with magnitudes (DoRA), or with biases or whole layers that were
    /// trained as well.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, Error> {
        let dir = dir.as_ref();
        let path = dir.join("adapter_config.json");
        let said = read_json(&path)?;
        let config = config_of(&said).map_err(|problem| file_error(&path, problem))?;
        let weights = open_stem(dir, STEM)?;
        for name in weights.names() {
            if module_of(name).is_none() {
                return Err(file_error(dir, format!("tensor `{name}` is no part of a LoRA adapter of a linear layer")));
            }
        }
        Ok(Self { weights, config })
    }

    /// The sizes. With `use_rslora` the `alpha` is that which scales by the square root of the rank.
    pub fn config(&self) -> AdapterConfig {
        self.config
    }

    /// The adapters as the parameters of a model to which [`apply_lora`](burn::module::Module::apply_lora) has given
    /// some, and whose weights `base` maps. All others keep their values.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is an adapter of a tensor that the mapping cuts, or joins with others, or
    /// does not have.
    pub fn mapped(self, base: &Mapping) -> Result<Mapped, Error> {
        for name in self.weights.names() {
            let module = module_of(name).unwrap_or_default();
            if let Some(problem) = unfit(base, module) {
                return Err(file_error(self.weights.dir(), problem));
            }
        }
        self.weights.mapped(adapters(base))
    }
}

/// The layer that a tensor of adapters belongs to.
pub(super) fn module_of(name: &str) -> Option<&str> {
    let name = name.strip_prefix(PREFIX)?;
    name.strip_suffix(".lora_A.weight").or_else(|| name.strip_suffix(".lora_B.weight"))
}

/// Why the adapter of a layer has no place under a mapping.
fn unfit(base: &Mapping, module: &str) -> Option<String> {
    let weight = format!("{module}.weight");
    let of = |rule: &&Rule| rule.file.all().iter().any(|pattern| captures(pattern, &weight).is_some());
    match base.rules.iter().find(of) {
        None => Some(format!("there is an adapter of `{weight}`, which no rule of the mapping fits")),
        Some(rule) if rule.file.all().len() + rule.model.all().len() > 2 => {
            Some(format!("there is an adapter of `{weight}`, which the mapping cuts, or joins with others"))
        }
        Some(_) => None,
    }
}

/// The mapping of the adapters of weights that another maps.
pub(super) fn adapters(base: &Mapping) -> Mapping {
    let weight = |name: &str| match name.strip_suffix(".*").or_else(|| name.strip_suffix(".weight")) {
        Some(module) => Some(module.to_owned()),
        None => name.ends_with('*').then(|| name.to_owned()),
    };
    let mut mapping = Mapping::new().keep_rest();
    for rule in &base.rules {
        let (Names::One(file), Names::One(model)) = (&rule.file, &rule.model) else { continue };
        let (Some(file), Some(model)) = (weight(file), weight(model)) else { continue };
        let of = |torch: &str, burn: &str| {
            Rule::new(format!("{PREFIX}{file}.lora_{torch}.weight"), format!("{model}.weight.lora.{burn}")).transposed()
        };
        let b = Rule { pairs: rule.pairs, ..of("B", "b") };
        mapping = mapping.rule(of("A", "a")).rule(b);
    }
    mapping
}

fn config_of(said: &Value) -> Result<AdapterConfig, String> {
    let number = |key: &str| said[key].as_f64().ok_or_else(|| format!("`{key}` is missing, or is no number"));
    let is = |key: &str| said[key].as_bool().unwrap_or(false);
    let empty = |key: &str| match &said[key] {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    };
    if said["peft_type"] != "LORA" {
        return Err(format!("the adapters are {}, and only LORA is known", said["peft_type"]));
    }
    for key in ["use_dora", "lora_bias"] {
        if is(key) {
            return Err(format!("`{key}` is true, and burn's adapters have no such thing"));
        }
    }
    for key in ["rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "trainable_token_indices"] {
        if !empty(key) {
            return Err(format!("`{key}` is {}, and burn's adapters have no such thing", said[key]));
        }
    }
    if !matches!(said["bias"].as_str(), None | Some("none")) {
        return Err(format!("`bias` is {}: biases that were trained are not read", said["bias"]));
    }
    let (rank, alpha) = (number("r")?, number("lora_alpha")?);
    if rank < 1.0 || rank.fract() != 0.0 {
        return Err(format!("`r` is {rank}"));
    }
    let alpha = if is("use_rslora") { alpha * rank.sqrt() } else { alpha };
    Ok(AdapterConfig { rank: rank as usize, alpha })
}
