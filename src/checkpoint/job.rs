//! A save, from what a rank has to the commit.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::agree::{gather, together};
use super::contents::Snapshot;
use super::directory::{clean_up, name_of, prune};
use super::index::{INDEX, INDEX_CHECKSUM, Index, StoredFile, StoredSlice, StoredTensor, checksum};
use super::options::CheckpointOptions;
use super::plan::{TensorKey, WritePlan};
use super::write::{file_name, write};
use super::{checkpoint_error, fault, file_problem};
use crate::Error;
use crate::comm::Communicator;
use crate::tensor_file::{Draft, name_of as dtype_name, write_file};

/// What was saved, and what that took.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Saved {
    /// The step.
    pub step: u64,
    /// The directory of the checkpoint.
    pub dir: PathBuf,
    /// The bytes that this rank wrote.
    pub bytes_written: u64,
}

/// What a rank tells rank 0 of its file.
#[derive(Serialize, Deserialize)]
struct ToldFile {
    bytes: u64,
    checksums: Vec<Vec<String>>,
}

/// Writes a checkpoint. Collective.
///
/// # Errors
/// As [`Checkpointer::save`](super::Checkpointer::save).
pub(super) fn run(
    mut snapshot: Snapshot,
    root: &Path,
    options: &CheckpointOptions,
    group: &Communicator,
) -> Result<Saved, Error> {
    let contents = together(snapshot.contents(), group)?;
    let plan = together(WritePlan::new(&contents, group), group)?;
    fault::point("planned");
    let (first, dir) = (group.rank() == 0, root.join(name_of(snapshot.step)));
    let draft = together(Draft::new(&dir, true), group)?;
    let begin = || {
        // Made anew, what vanished with its checkpoints, as a disk that is no longer mounted, would go unnoticed.
        if !root.is_dir() {
            return Err(file_problem(root, "is not there any more: bring it back, or open another `Checkpointer`"));
        }
        clean_up(root).and_then(|()| draft.begin())
    };
    let begun = if first { begin() } else { Ok(()) };
    together(begun, group)?;
    fault::point("draft made");
    let written = finish(&contents, &plan, &snapshot, &draft, options, group);
    if written.is_err() && first {
        // The error that there is says more than one of this.
        let _ = draft.discard();
    }
    let bytes_written = written?;
    if first && let Err(error) = prune(root, options) {
        log::warn!("old checkpoints are not removed: {error}");
    }
    Ok(Saved { step: snapshot.step, dir, bytes_written })
}

/// Writes into the draft and gives it its name. Returns the bytes that this rank wrote.
fn finish(
    contents: &super::contents::Contents,
    plan: &WritePlan,
    snapshot: &Snapshot,
    draft: &Draft,
    options: &CheckpointOptions,
    group: &Communicator,
) -> Result<u64, Error> {
    let written = together(write(contents, plan, group.rank(), &draft.made_in), group)?;
    fault::point("tensors written");
    let bytes = written.as_ref().map_or(0, |written| written.bytes);
    let told = written.map(|written| ToldFile { bytes: written.bytes, checksums: written.checksums });
    let told = serde_json::to_vec(&told).map_err(|why| checkpoint_error(why.to_string()))?;
    let told = gather(told, group)?;
    let committed =
        if group.rank() == 0 { commit(&told, plan, snapshot, draft, options, group.size()) } else { Ok(()) };
    together(committed, group)?;
    Ok(bytes)
}

/// Writes the index: after that, and the renaming, the checkpoint is there.
fn commit(
    told: &[Vec<u8>],
    plan: &WritePlan,
    snapshot: &Snapshot,
    draft: &Draft,
    options: &CheckpointOptions,
    ranks: usize,
) -> Result<(), Error> {
    let index = index(told, plan, snapshot, options, ranks)?;
    let text = serde_json::to_vec(&index).map_err(|why| checkpoint_error(why.to_string()))?;
    write_file(&draft.made_in.join(INDEX), &text)?;
    write_file(&draft.made_in.join(INDEX_CHECKSUM), (checksum(&text) + "\n").as_bytes())?;
    fault::point("index written");
    draft.commit()?;
    fault::point("committed");
    Ok(())
}

fn index(
    told: &[Vec<u8>],
    plan: &WritePlan,
    snapshot: &Snapshot,
    options: &CheckpointOptions,
    ranks: usize,
) -> Result<Index, Error> {
    let mut index = Index::new(snapshot.step, snapshot.random, ranks);
    let mut files = Vec::new();
    for (rank, told) in told.iter().enumerate() {
        let told: Option<ToldFile> = serde_json::from_slice(told).map_err(|why| checkpoint_error(why.to_string()))?;
        files.push(told.map(|told| {
            index.files.push(StoredFile { name: file_name(rank), bytes: told.bytes });
            (index.files.len() - 1, told.checksums.into_iter())
        }));
    }
    index.made_under = options.made_under.clone();
    index.schedulers = snapshot.schedulers.clone();
    index.values = snapshot.values.clone();
    for (optimizer, params) in &plan.scalars {
        let stored = index.optimizers.entry(optimizer.clone()).or_default();
        for (path, scalars) in params {
            stored.entry(path.clone()).or_default().scalars = scalars.clone();
        }
    }
    for (key, tensor) in &plan.tensors {
        let mut slices = Vec::new();
        for (ranges, writer) in &tensor.slices {
            let file = files.get_mut(*writer).and_then(Option::as_mut);
            let (file, checksums) = file
                .and_then(|(file, checksums)| Some((*file, checksums.next()?)))
                .ok_or_else(|| checkpoint_error(format!("rank {writer} has not told of {ranges:?} of `{key}`")))?;
            slices.push(StoredSlice::new(file, key.name(ranges), ranges, checksums));
        }
        let dtype = dtype_name(tensor.dtype).unwrap_or_default().to_owned();
        let stored = StoredTensor { dtype, dims: tensor.dims.clone(), slices };
        match key {
            TensorKey::Param(path) => {
                index.model.insert(path.clone(), stored);
            }
            TensorKey::Moment { optimizer, path, moment } => {
                let params = index.optimizers.entry(optimizer.clone()).or_default();
                params.entry(path.clone()).or_default().moments.insert(moment.clone(), stored);
            }
        }
    }
    Ok(index)
}
