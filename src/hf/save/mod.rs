//! Writing a directory from any mesh.

mod commit;
mod config;
mod exchange;
mod held;
mod merge;
mod own;
mod pieces;
mod plan;
mod problem;
mod rounds;
mod traffic;

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::DType;
use commit::{carry_over, config_for};
pub use config::SaveConfig;
use exchange::{Exchanged, exchange};
use merge::{FactorBytes, merge};
use own::{all_params, own_params};
use plan::{PlannedTensor, SavePlan};
use problem::{attempt, together, wrong};
use serde::Serialize;

use super::index::{Metadata, WrittenIndex};
use crate::Error;
use crate::comm::Communicator;
use crate::tensor_file::{Draft, PieceWriter, fault, write_file};
use crate::train::ParallelModule;

/// What was saved, and what that took.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SavedDirectory {
    /// The files of tensors, in order.
    pub files: Vec<String>,
    /// The tensors in them.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Of these the bytes that this rank wrote.
    pub bytes_written: u64,
    /// Bytes of its parts that this rank sent to others that wrote them, or merged adapters by them.
    pub bytes_sent: u64,
    /// The most bytes that this rank held at once beside its parts: a piece, messages on their way from it and to it,
    /// and the factors that it was sent of [adapters](SaveConfig::with_merged_adapters).
    pub largest_buffer: usize,
}

/// Writes a model as a Hugging Face directory, whatever it is spread over: `config.json`, `model.safetensors` or
/// numbered files with an index, and the files of a tokenizer. Collective: every rank of `world`, which are all that
/// the model is spread over, passes the same directory, in one file system, and the same config.
///
/// Tensors are written in [pieces](SaveConfig::with_piece_bytes), each by the rank that holds most of it and has least
/// to write, which gets what it lacks from the others: no rank ever holds more than its parts and three pieces.
/// Replicas share the work; what they hold alike is written once. A parameter that is used in two places, as a tied
/// embedding, is written once, under the first.
///
/// The directory is there as a whole or not at all: it is made under another name (`.NAME.unfinished`, beside it),
/// brought to the disk, and renamed. One that was left by a save that was ended is overwritten by the next.
///
/// ```
/// use burn::nn::{Linear, LinearConfig};
/// use burn_parallel::hf::{self, Mapping, Rule, SaveConfig};
/// use burn_parallel::prelude::*;
///
/// # let dir = std::env::temp_dir().join(format!("hf-save-doc-{}", std::process::id()));
/// let mapping = Mapping::new().rule(Rule::new("head.*", "*").transposed());
/// launch::threads(2).run(|rank| {
///     let model: Linear = LinearConfig::new(4, 6).init(&rank.device().autodiff());
///     let model = model.tensor_parallel(&rank, Plan::new().shard("weight", 1).shard("bias", 0))?;
///     let saved = hf::save(&model, &rank, &dir, &SaveConfig::new(mapping.clone()))?;
///     assert_eq!(saved.files, ["model.safetensors"]);
///     Ok(())
/// })?;
/// assert_eq!(hf::open(&dir)?.tensor_dims("head.weight"), Some(&[6, 4][..]));
/// # std::fs::remove_dir_all(&dir).unwrap();
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// On all ranks alike, with the rank that failed, also if it was one alone. [`Error::InvalidArgument`] if no rule of
/// the mapping fits a parameter, if two would be one tensor, if the model has adapters and the config does not
/// [merge](SaveConfig::with_merged_adapters) them, if the directory is there and not to be overwritten, or if the disk
/// of a rank fails: the model stays as it is, and what was there before too. [`Error::Pipeline`]'s words in it if a
/// pipeline is not cut yet. [`Error::Settings`] if the ranks pass different configs. The error of the world.
pub fn save<P: ParallelModule>(
    model: &P,
    world: &Communicator,
    dir: impl AsRef<Path>,
    config: &SaveConfig,
) -> Result<SavedDirectory, Error> {
    save_as("model", model, world, dir.as_ref(), || Ok(config.clone()))
}

/// [`save`] of files that are called otherwise, with the config that each rank makes for itself.
pub(super) fn save_as<P: ParallelModule>(
    stem: &str,
    model: &P,
    world: &Communicator,
    dir: &Path,
    config: impl FnOnce() -> Result<SaveConfig, Error>,
) -> Result<SavedDirectory, Error> {
    let group = world.split_named("hf::save", 0, world.rank() as i64)?;
    // What a rank finds wrong by itself is told before any waits for it.
    let prepared = attempt(|| {
        let config = config()?;
        let said = config.lines()?;
        let (own, draft) = (own_params(model, &config)?, Draft::new(dir, config.overwrite)?);
        Ok((config, said, own, draft))
    });
    let (config, said, mut own, draft) = together(prepared, &group)?;
    group.agree_on_directory("the directory", dir)?;
    group.agree_on(&said.into_iter().collect::<BTreeMap<_, _>>())?;
    let mut params = all_params(&own, &group)?;
    let brought = match config.merged {
        Some(alpha) => merge(&mut own, &mut params, alpha, &group)?,
        None => FactorBytes::default(),
    };
    let plan = SavePlan::new(&params, stem, &config)?;
    fault::point("planned");

    let first = group.rank() == 0;
    let begun = if first { attempt(|| begin(&draft, &plan)) } else { Ok(()) };
    together(begun, &group)?;
    fault::point("draft made");
    let number = |place: usize| params.binary_search_by_key(&place, |param| param.place).ok();
    let parts = own.into_iter().filter_map(|param| Some((number(param.place)?, param.part?))).collect();
    let (done, wrote) = exchange(&plan, &params, &parts, &draft.made_in, (config.piece_bytes, &group))?;
    fault::point("tensors written");
    let finished = together(wrote, &group).and_then(|()| {
        let ended = if first { attempt(|| end(&draft, &plan, stem, &config)) } else { Ok(()) };
        together(ended, &group)
    });
    if finished.is_err() && first {
        // The error that there is says more than one of this.
        let _ = draft.discard();
    }
    finished.map(|()| saved(&plan, done, brought))
}

fn saved(plan: &SavePlan, done: Exchanged, brought: FactorBytes) -> SavedDirectory {
    SavedDirectory {
        files: plan.files.iter().map(|(name, _)| name.clone()).collect(),
        tensors: plan.tensors.len(),
        bytes: plan.tensors.iter().map(|tensor| tensor.bytes() as u64).sum(),
        bytes_written: done.written,
        bytes_sent: done.sent + brought.sent as u64,
        largest_buffer: done.held + brought.held,
    }
}

/// Makes all files, for other ranks to write into.
fn begin(draft: &Draft, plan: &SavePlan) -> Result<(), Error> {
    draft.begin()?;
    for (name, new_file) in &plan.files {
        PieceWriter::create(&draft.made_in.join(name), new_file)?;
    }
    Ok(())
}

/// Writes what is not tensors, and gives the directory its name.
fn end(draft: &Draft, plan: &SavePlan, stem: &str, config: &SaveConfig) -> Result<(), Error> {
    let dir = &draft.made_in;
    if plan.files.len() > 1 {
        let file = |tensor: &PlannedTensor| plan.files[tensor.file].0.as_str();
        let weight_map: BTreeMap<&str, &str> =
            plan.tensors.iter().map(|tensor| (tensor.name.as_str(), file(tensor))).collect();
        let total_parameters = plan.tensors.iter().map(|tensor| tensor.elements() as u64).sum();
        let total_size = plan.tensors.iter().map(|tensor| tensor.bytes() as u64).sum();
        let index = WrittenIndex { metadata: Metadata { total_parameters, total_size }, weight_map };
        write_file(&dir.join(format!("{stem}.safetensors.index.json")), json(&index)?.as_bytes())?;
    }
    if let Some(from) = &config.files_of {
        let dtype = plan.float_dtype().and_then(|dtype| match dtype {
            DType::F32 => Some("float32"),
            DType::F16 => Some("float16"),
            DType::BF16 => Some("bfloat16"),
            DType::F64 => Some("float64"),
            _ => None,
        });
        let untied = plan.tensors.iter().any(|tensor| tensor.name == "lm_head.weight");
        let text = json(&config_for(from, dtype, untied)?)?;
        write_file(&dir.join("config.json"), text.as_bytes())?;
        carry_over(from, dir)?;
    }
    for (name, text) in &config.texts {
        write_file(&dir.join(name), text.as_bytes())?;
    }
    fault::point("files written");
    draft.commit()?;
    fault::point("committed");
    Ok(())
}

fn json(value: &impl Serialize) -> Result<String, Error> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(|why| wrong(why.to_string()))
}

#[cfg(all(test, unix))]
mod killed;
#[cfg(test)]
mod tests;
