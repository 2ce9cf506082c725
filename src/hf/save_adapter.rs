//! Writes the adapters of a model.

use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use serde_json::{Value, json};

use super::adapter::{AdapterConfig, STEM, adapters, module_of};
use super::mapping::Mapping;
use super::save::{SaveConfig, SavedDirectory, save_as};
use crate::Error;
use crate::comm::Communicator;
use crate::params::is_shard;
use crate::train::ParallelModule;

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
) -> Result<SavedDirectory, Error> {
    save_as(STEM, model, world, dir.as_ref(), || adapter_config(model, (base, adapter), config))
}

/// How adapters are written: with `peft`'s config, and no weights.
fn adapter_config<P: ParallelModule>(
    model: &P,
    (base, adapter): (&str, AdapterConfig),
    config: &SaveConfig,
) -> Result<SaveConfig, Error> {
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
    Ok(config.clone().with_mapping(adapters(&config.mapping)).with_file("adapter_config.json", text + "\n"))
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
        if !is_shard(name, holder) {
            self.path.push((name.into(), holder.into()));
        }
    }

    fn exit_module(&mut self, name: &str, holder: &str) {
        if !is_shard(name, holder) {
            self.path.pop();
        }
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
