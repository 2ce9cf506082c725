//! Weights out of a Hugging Face directory and into one, each rank its part.

use std::path::Path;

use burn_parallel::hf::{self, Mapping, SaveConfig, Saved};
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
/// this `alpha` are added to their weights.
///
/// # Errors
/// As of [`hf::save`], if `to` is there and not empty, above all.
pub fn save(
    model: &Parallel<Llama>,
    world: &Communicator,
    (from, to): (&Path, &Path),
    alpha: Option<f64>,
) -> Result<Saved, Error> {
    let config = SaveConfig::new(Mapping::llama()).with_files_of(from);
    let config = match alpha {
        Some(alpha) => config.with_merged_adapters(alpha),
        None => config,
    };
    hf::save(model, world, to, &config)
}
