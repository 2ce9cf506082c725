//! A save, from what a rank has to the commit.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::agree::{attempt, gather, together};
use super::config::CheckpointConfig;
use super::contents::{Contents, ParamScalars, Snapshot};
use super::directory::{check_free, name_of, prune};
use super::index::{INDEX, INDEX_CHECKSUM, Index, StoredFile, StoredSlice, StoredTensor, checksum};
use super::opened::Opened;
use super::order::{index_checksum, ordered, put_down_order};
use super::plan::{TensorKey, WritePlan, add_scalars};
use super::write::{Changed, Outcome, check_files, file_name, write};
use super::{checkpoint_error, fault, file_problem};
use crate::Error;
use crate::comm::{Communicator, ReduceOp};
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
    /// None if it wrote none.
    bytes: Option<u64>,
    checksums: Vec<Vec<String>>,
    scalars: ParamScalars,
}

/// Writes a checkpoint. Collective.
///
/// # Errors
/// As [`Checkpointer::save`](super::Checkpointer::save).
pub(super) fn run(
    snapshot: Snapshot,
    opened: &Opened,
    config: &CheckpointConfig,
    group: &Communicator,
) -> Result<Saved, Error> {
    let save = Save { snapshot: &snapshot, opened, config, group };
    for again in [false, true] {
        if let Some(saved) = save.run(again)? {
            return Ok(saved);
        }
        snapshot.forget();
    }
    Err(checkpoint_error("optimizers give out other moments each time that they are asked"))
}

/// A save of a state.
struct Save<'a> {
    snapshot: &'a Snapshot,
    opened: &'a Opened,
    config: &'a CheckpointConfig,
    group: &'a Communicator,
}

impl Save<'_> {
    /// Writes the checkpoint, if all optimizers on all ranks have the moments that they are known to have. That they
    /// have not is an error if they were looked at just before, `again`.
    fn run(&self, again: bool) -> Result<Option<Saved>, Error> {
        let Self { snapshot, opened, config, group } = *self;
        let root = &opened.root;
        let contents = together(attempt(|| snapshot.contents()), group)?;
        let plan = together(attempt(|| WritePlan::new(&contents, group)), group)?;
        fault::point("planned");
        let (first, dir) = (group.rank() == 0, root.join(name_of(snapshot.step)));
        let draft = together(attempt(|| opened.draft(&dir)), group)?;
        let begun = if first { attempt(|| self.begin(&draft)) } else { Ok(None) };
        let _held = together(begun, group)?;
        fault::point("draft made");
        let written = self.finish(&contents, &plan, &draft, again);
        if !matches!(written, Ok(Some(_))) && first {
            // The error that there is says more than one of this.
            let _ = draft.discard();
        }
        let Some(bytes_written) = written? else { return Ok(None) };
        snapshot.own_steps.add(snapshot.step);
        if first {
            let own = snapshot.own_steps.all();
            if let Err(error) = put_down_order(root, &own, None) {
                log::warn!("it is not put down that {} is the latest checkpoint: {error}", dir.display());
            }
            if let Err(error) = ordered(root, &own).and_then(|steps| prune(root, config, &steps)) {
                log::warn!("old checkpoints are not removed: {error}");
            }
        }
        Ok(Some(Saved { step: snapshot.step, dir, bytes_written }))
    }

    /// Makes the draft, on rank 0, and returns what [holds](Opened::begin) it.
    fn begin(&self, draft: &Draft) -> Result<Option<Arc<File>>, Error> {
        let Self { snapshot, opened, .. } = *self;
        let root = &opened.root;
        snapshot.progress.check()?;
        // Made anew, what vanished with its checkpoints, as a disk that is no longer mounted, would go unnoticed.
        if !root.is_dir() {
            return Err(file_problem(root, "is not there any more: bring it back, or open another `Checkpointer`"));
        }
        opened.check_alone()?;
        check_free(root, snapshot.step)?;
        opened.clean_up()?;
        // That the run has gone back to an earlier step: what it writes is the latest as soon as it is there.
        put_down_order(root, &snapshot.own_steps.all(), Some(snapshot.step))?;
        let held = opened.begin(draft)?.map(Arc::new);
        held.iter().for_each(|held| snapshot.progress.holds(held));
        Ok(held)
    }

    /// Writes into the draft and gives it its name. Returns the bytes that this rank wrote; `None` if an optimizer of
    /// some rank has other moments than were known.
    fn finish(&self, contents: &Contents, plan: &WritePlan, draft: &Draft, again: bool) -> Result<Option<u64>, Error> {
        let group = self.group;
        let lost = |why| self.opened.lost(draft, why);
        let write = || match write(contents, plan, group.rank(), &draft.made_in).map_err(lost)? {
            Outcome::Changed(Changed { optimizer, path }) if again => Err(checkpoint_error(format!(
                "optimizer `{optimizer}` does not give out the same moments of `{path}` twice, though nobody has stepped it"
            ))),
            outcome => Ok(outcome),
        };
        let outcome = together(attempt(write), group)?;
        let changed = u64::from(matches!(outcome, Outcome::Changed(_)));
        let changed = if group.size() > 1 { group.all_reduce(vec![changed], ReduceOp::Max)?[0] } else { changed };
        let Outcome::Written(written) = outcome else { return Ok(None) };
        if changed > 0 {
            return Ok(None);
        }
        fault::point("tensors written");
        let bytes = written.bytes.unwrap_or(0);
        let told = ToldFile { bytes: written.bytes, checksums: written.checksums, scalars: written.scalars };
        let told = serde_json::to_vec(&told).map_err(|why| checkpoint_error(why.to_string()));
        let told = self.snapshot.progress.check().and(told);
        let told = gather(together(told, group)?, group)?;
        let committed = match group.rank() {
            0 => attempt(|| self.commit(&told, plan, draft)),
            _ => Ok(()),
        };
        together(committed, group)?;
        Ok(Some(bytes))
    }

    /// Writes the index, on rank 0: after that, and the renaming, the checkpoint is there.
    fn commit(&self, told: &[Vec<u8>], plan: &WritePlan, draft: &Draft) -> Result<(), Error> {
        let Self { snapshot, opened, config, group } = *self;
        let mut index = index(told, plan, snapshot, config, group.size())?;
        index.replaces = index_checksum(&opened.root, snapshot.step);
        let text = index.text()?;
        let write =
            |name, text: &[u8]| write_file(&draft.made_in.join(name), text).map_err(|why| opened.lost(draft, why));
        write(INDEX, &text)?;
        write(INDEX_CHECKSUM, (checksum(&text) + "\n").as_bytes())?;
        fault::point("index written");
        check_files(&index.files, &draft.made_in).map_err(|why| opened.lost(draft, why))?;
        snapshot.progress.check()?;
        opened.commit(draft, snapshot.step)?;
        fault::point("committed");
        Ok(())
    }
}

fn index(
    told: &[Vec<u8>],
    plan: &WritePlan,
    snapshot: &Snapshot,
    config: &CheckpointConfig,
    ranks: usize,
) -> Result<Index, Error> {
    let mut index = Index::new(snapshot.step, snapshot.random, ranks);
    let (mut files, mut all_scalars) = (Vec::new(), plan.scalars.clone());
    for (rank, told) in told.iter().enumerate() {
        let told: ToldFile = serde_json::from_slice(told).map_err(|why| checkpoint_error(why.to_string()))?;
        add_scalars(&mut all_scalars, told.scalars, rank)?;
        files.push(told.bytes.map(|bytes| {
            index.files.push(StoredFile { name: file_name(rank), bytes });
            (index.files.len() - 1, told.checksums.into_iter())
        }));
    }
    index.made_under = config.strategy.clone();
    index.schedulers = snapshot.schedulers.clone();
    index.values = snapshot.values.clone();
    for (optimizer, params) in all_scalars {
        let stored = index.optimizers.entry(optimizer).or_default();
        for (path, scalars) in params {
            stored.entry(path).or_default().scalars = scalars;
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
