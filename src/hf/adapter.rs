//! LoRA adapters in the format of Python's `peft`.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use burn::module::{Lora, Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use serde_json::{Value, json};

use super::mapped::Mapped;
use super::mapping::Mapping;
use super::rule::{Names, Rule};
use super::save::{SaveConfig, Saved, save_as};
use super::weights::{Weights, open_stem, read_json};
use crate::Error;
use crate::comm::Communicator;
use crate::params::SliceSource;
use crate::plan::captures;
use crate::tensor_file::file_error;
use crate::train::ParallelModule;

/// In front of the names of all tensors.
const PREFIX: &str = "base_model.model.";
const STEM: &str = "adapter_model";

/// The sizes of LoRA adapters: `weight + alpha / rank * a @ b`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdapterConfig {
    /// The columns of `a` and rows of `b`.
    pub rank: usize,
    /// What the product is scaled by, times `rank`.
    pub alpha: f64,
}

impl AdapterConfig {
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
    weights: Weights,
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
fn module_of(name: &str) -> Option<&str> {
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
fn adapters(base: &Mapping) -> Mapping {
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

/// Weights to which the adapters of another directory are added as they are read: a [`SliceSource`] for the model
/// without adapters. A rank computes the rows and columns that it holds, and nothing else is read.
#[derive(Debug)]
pub struct Merged {
    base: Mapped,
    adapters: Mapped,
    scale: f64,
    /// What is known of parameters: the rank of the adapter, if there is one.
    known: HashMap<String, Option<usize>>,
}

impl Mapped {
    /// Adds adapters to the weights as they are read.
    ///
    /// # Errors
    /// As [`Adapter::mapped`].
    pub fn merged(self, adapter: Adapter) -> Result<Merged, Error> {
        let scale = adapter.config.alpha / adapter.config.rank as f64;
        for name in adapter.weights.names() {
            let weight = format!("{}.weight", module_of(name).unwrap_or_default());
            if !self.weights().has(&weight) {
                let problem = format!("has an adapter of `{weight}`, and the base no such tensor");
                return Err(file_error(adapter.weights.dir(), problem));
            }
        }
        let adapters = adapter.mapped(self.mapping())?;
        Ok(Merged { base: self, adapters, scale, known: HashMap::new() })
    }
}

impl Merged {
    /// How many bytes were read so far, of both directories.
    pub fn bytes_read(&self) -> u64 {
        self.base.bytes_read() + self.adapters.bytes_read()
    }

    /// The rank of a parameter's adapter, if it has one.
    fn rank(&mut self, path: &str) -> Result<Option<usize>, Error> {
        if let Some(rank) = self.known.get(path) {
            return Ok(*rank);
        }
        let a = self.adapters.found(&format!("{path}.lora.a"))?;
        let rank = a.and_then(|a| a.dims().get(1).copied());
        self.known.insert(path.into(), rank);
        Ok(rank)
    }

    fn added(&mut self, path: &str, ranges: &[Range<usize>], rank: usize) -> Result<TensorData, Error> {
        let [rows, columns] = ranges else {
            return Err(Error::invalid("Merged", format!("`{path}` has an adapter and is no matrix")));
        };
        let device = Device::flex();
        let read = |source: &mut Mapped, path: &str, ranges: [Range<usize>; 2]| {
            let data = source.read_as(path, &ranges, DType::F32)?;
            Ok::<_, Error>(Tensor::<2>::from_data(data, (&device, DType::F32)))
        };
        let base = read(&mut self.base, path, [rows.clone(), columns.clone()])?;
        let a = read(&mut self.adapters, &format!("{path}.lora.a"), [rows.clone(), 0..rank])?;
        let b = read(&mut self.adapters, &format!("{path}.lora.b"), [0..rank, columns.clone()])?;
        let merged = base + a.matmul(b).mul_scalar(self.scale);
        merged.try_into_data().map_err(|why| Error::invalid("Merged", format!("`{path}`: {why:?}")))
    }
}

impl SliceSource for Merged {
    fn dims(&mut self, path: &str) -> Result<Option<Vec<usize>>, Error> {
        self.base.dims(path)
    }

    fn read(&mut self, path: &str, ranges: &[Range<usize>]) -> Result<TensorData, Error> {
        match self.rank(path)? {
            Some(rank) => self.added(path, ranges, rank),
            None => self.base.read(path, ranges),
        }
    }

    fn read_as(&mut self, path: &str, ranges: &[Range<usize>], dtype: DType) -> Result<TensorData, Error> {
        match self.rank(path)? {
            Some(rank) => self.added(path, ranges, rank).map(|data| data.convert_dtype(dtype)),
            None => self.base.read_as(path, ranges, dtype),
        }
    }

    fn keeps(&mut self, path: &str) -> bool {
        self.base.keeps(path)
    }
}

/// Writes the adapters of a model, and nothing else, as a directory that `peft` reads: `adapter_config.json` and
/// `adapter_model.safetensors`. Collective, as [`save`](super::save), of whose config the mapping is that of the
/// weights. `base` is what `peft` shall load the weights from: a directory, or a name.
///
/// # Errors
/// As [`save`](super::save); [`Error::InvalidArgument`] if the model has no adapters.
pub fn save_adapter<P: ParallelModule>(
    model: &P,
    world: &Communicator,
    dir: impl AsRef<Path>,
    (base, adapter): (&str, AdapterConfig),
    config: &SaveConfig,
) -> Result<Saved, Error> {
    let targets = targets(model, &config.mapping)?;
    let said = json!({
        "peft_type": "LORA",
        "task_type": Value::Null,
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
    });
    let text =
        serde_json::to_string_pretty(&said).map_err(|why| Error::invalid("hf::save_adapter", why.to_string()))?;
    let config = config.clone().with_mapping(adapters(&config.mapping)).with_file("adapter_config.json", text + "\n");
    save_as(STEM, model, world, dir.as_ref(), &config)
}

/// The paths of the first factors of all adapters, with the type of the layer that each is in.
#[derive(Default)]
struct Adapted {
    path: Vec<(String, String)>,
    found: Vec<(String, String)>,
}

impl ModuleVisitor for Adapted {
    fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
        // .., the weight, the adapter, the factor.
        if let [.., (_, holder), (adapter, _), (factor, _)] = self.path.as_slice()
            && adapter == "lora"
            && factor == "a"
        {
            let path = self.path.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(".");
            self.found.push((path, holder.clone()));
        }
    }

    fn enter_module(&mut self, name: &str, holder: &str) {
        self.path.push((name.into(), holder.into()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// The layers that have adapters.
fn targets<P: ParallelModule>(model: &P, base: &Mapping) -> Result<Vec<String>, Error> {
    let mapping = adapters(base);
    let mut found = Vec::new();
    let mut visitor = Adapted::default();
    model.local().visit(&mut visitor);
    for (path, holder) in visitor.found {
        let weight = path.strip_suffix(".lora.a").unwrap_or(&path);
        if holder.contains("Embedding") {
            let problem =
                format!("`{weight}` is an embedding, whose adapters `peft` has in another form: give it none");
            return Err(Error::invalid("hf::save_adapter", problem));
        }
        let Some((_, filled, _)) = mapping.of_model(&path).next() else {
            let problem =
                format!("the adapter of `{weight}` has no place: no rule of one name on each side fits the weight");
            return Err(Error::invalid("hf::save_adapter", problem));
        };
        found.extend(filled.files.first().and_then(|name| module_of(name)).map(Into::into));
    }
    match found.is_empty() {
        true => Err(Error::invalid("hf::save_adapter", "the model has no adapters: `apply_lora` gives it some")),
        false => Ok(found),
    }
}
