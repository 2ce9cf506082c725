//! Weights out of a Hugging Face directory and into one, each rank its part.

use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use burn_parallel::hf::{self, Mapping, SaveConfig, SavedDirectory};
use burn_parallel::prelude::*;
use burn_parallel::train::Parallel;

use super::model::{Batch, Llama};

/// How a model of these names is split over `tp`: whole heads, columns and rows, the vocabulary, and adapters as the
/// weights that they are added to.
pub fn plan() -> Plan {
    let columns = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"];
    let rows = ["o_proj", "down_proj"];
    let plan = columns
        .into_iter()
        .fold(Plan::hugging_face(), |plan, name| plan.shard_if_present(format!("*{name}.weight.lora.b"), 1));
    rows.into_iter().fold(plan, |plan, name| plan.shard_if_present(format!("*{name}.weight.lora.a"), 0))
}

/// A model that is to be loaded, with zeros for weights that are not made yet: replicas make theirs when they are
/// wrapped, and need not draw what is replaced. Before adapters.
pub fn unfilled(model: Llama) -> Llama {
    model.map(&mut Unfilled)
}

struct Unfilled;

impl ModuleMapper for Unfilled {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if param.is_initialized() {
            return param;
        }
        let (id, shape, device) = (param.id, param.lazy_shape(), param.lazy_device());
        let dims = shape.clone();
        let zeros = move |device: &Device, trained: bool| {
            let zeros = Tensor::zeros(dims, device);
            if trained { zeros.require_grad() } else { zeros }
        };
        Param::uninitialized(id, zeros, device, true, shape)
    }
}

/// Gives a model the weights of a directory: each rank reads what it holds. Adapters keep their values. Collective;
/// `batch` is one of those that the model will be trained on, by whose cost a pipeline is cut.
///
/// # Errors
/// The file and the tensor that does not fit; that of [`prepare`](ParallelModule::prepare).
pub fn load(mut model: Parallel<Llama>, dir: &Path, batch: &Batch) -> Result<Parallel<Llama>, Error> {
    model.prepare(batch.clone(), Llama::loss)?;
    model.load(&mut hf::open(dir)?.mapped(Mapping::llama())?)
}

/// Writes a model as a directory, with the config and the tokenizer of the directory `from`. Collective. Adapters of
/// this `alpha` are added to their weights. A directory that is there is replaced at the end.
///
/// # Errors
/// As of [`hf::save`].
pub fn save(
    model: &Parallel<Llama>,
    world: &Communicator,
    (from, to): (&Path, &Path),
    alpha: Option<f64>,
) -> Result<SavedDirectory, Error> {
    let config = SaveConfig::new(Mapping::llama()).with_files_of(from).with_overwrite(true);
    let config = match alpha {
        Some(alpha) => config.with_merged_adapters(alpha),
        None => config,
    };
    hf::save(model, world, to, &config)
}
