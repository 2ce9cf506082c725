//! Gives a state the values of a checkpoint: all of them, or none.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::ParamId;
use burn::optim::ModuleOptimizer;

use super::config::{CheckpointConfig, matches};
use super::index::Index;
use super::params::{self, ParamInfo};
use super::read::{CheckpointReader, ParamSource};
use super::reading::JointReading;
use super::refill::{Wanted, restored as restored_optimizer};
use super::scheduler::restored_scheduler;
use super::state::TrainState;
use super::{checkpoint_error, fault, file_problem};
use crate::Error;
use crate::graph::RandomUse;
use crate::train::ParallelModule;

/// What was restored, and what that took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Restored {
    /// The step after which the checkpoint was saved.
    pub step: u64,
    /// The bytes of tensors that this rank read: the blocks of 1 MiB in which there was something that it needed.
    pub bytes_read: u64,
}

/// What was read, before anything is changed.
pub(super) struct Loaded<P> {
    model: P,
    optimizers: Vec<Option<ModuleOptimizer>>,
    /// The parameters that any of them has moments of, on whichever rank.
    with_moments: HashSet<ParamId>,
    schedulers: Vec<Option<ModuleLrScheduler>>,
    random_step: u64,
    restored: Restored,
}

/// Reads this rank's part of a checkpoint. The state stays as it is, but for values that it keeps aside. Not
/// collective; the first rank warns of what cannot go on.
///
/// # Errors
/// As [`Checkpointer::restore`](super::Checkpointer::restore).
pub(super) fn load<P: ParallelModule>(
    reading: &JointReading<'_>,
    state: &mut TrainState<'_, P>,
    config: &CheckpointConfig,
    first: bool,
) -> Result<Loaded<P>, Error> {
    fault::point("index read");
    let (dir, index) = (&reading.dir, Arc::new(reading.index()?));
    let infos = params::infos(state.model.local())?;
    let kept = compare(dir, &index, &infos, state, config)?;
    if first && !kept.is_empty() {
        tell_kept(dir, &kept, infos.len());
    }
    let mut params = ParamSource { reader: CheckpointReader::new(dir, index.clone()), kept: Arc::new(kept) };
    let model = (*state.model).clone().load(&mut params)?;
    let mut reader = params.reader;
    let (mut optimizers, mut with_moments) = (Vec::new(), HashSet::new());
    for (name, optimizer) in &state.optimizers {
        let Some(stored) = index.optimizers.get(name) else {
            optimizers.push(None);
            continue;
        };
        // Every rank that holds a parameter updates it, whichever saves its value.
        let slices = params::moment_slices(state.model, optimizer, state.model.held_slices()?)?;
        let here = |info: &ParamInfo| Some((slices.get(&info.id)?, stored.get(&info.path)?));
        with_moments.extend(infos.iter().filter(|info| stored.contains_key(&info.path)).map(|info| info.id));
        let mut wanted = Vec::new();
        for info in &infos {
            let Some((slice, state)) = here(info) else { continue };
            let saved = index.model.get(&info.path).map(|tensor| tensor.burn_dtype()).transpose()?;
            wanted.push(Wanted { info, slice, saved_dtype: saved, state });
        }
        optimizers.push(Some(restored_optimizer(name, optimizer, &wanted, &mut |key, stored, ranges| {
            reader.read(key, stored, ranges)
        })?));
    }
    let mut schedulers = Vec::new();
    for (name, scheduler) in &state.schedulers {
        let numbers = index.schedulers.get(name);
        schedulers.push(numbers.map(|numbers| restored_scheduler(name, scheduler, numbers)).transpose()?);
    }
    for (name, slot) in &mut state.values {
        slot.read(index.values.get(name).cloned())
            .map_err(|why| file_problem(dir, format!("value `{name}` is not what this program takes for it: {why}")))?;
    }
    let replicas = state.model.report().replicas;
    if first && index.random_by == RandomUse::Replicas && index.replicas != replicas {
        log::warn!(
            "{}: dropout goes on with other numbers than it would have: they go by replica, of which there were {}, and now are \
             {replicas}. `draw_rows` before each step has them go by rows of the global batch",
            dir.display(),
            index.replicas
        );
    }
    let restored = Restored { step: index.step, bytes_read: reader.bytes_read };
    Ok(Loaded { model, optimizers, with_moments, schedulers, random_step: index.random_step, restored })
}

impl<P: ParallelModule> Loaded<P> {
    /// Puts what was read into the state.
    pub(super) fn put(self, state: &mut TrainState<'_, P>) -> Restored {
        *state.model = self.model;
        state.model.set_random_step(self.random_step);
        state.model.steps_restored(self.restored.step);
        state.model.moments_restored(&self.with_moments);
        for ((_, optimizer), loaded) in state.optimizers.iter_mut().zip(self.optimizers) {
            loaded.into_iter().for_each(|loaded| **optimizer = loaded);
        }
        for ((_, scheduler), loaded) in state.schedulers.iter_mut().zip(self.schedulers) {
            loaded.into_iter().for_each(|loaded| **scheduler = loaded);
        }
        state.values.iter_mut().for_each(|(_, slot)| slot.take());
        self.restored
    }
}

/// Demands that a checkpoint has what the state asks for, and no parameters besides. Returns the parameters that stay
/// as they are.
fn compare<P: ParallelModule>(
    dir: &Path,
    index: &Index,
    infos: &[ParamInfo],
    state: &TrainState<'_, P>,
    config: &CheckpointConfig,
) -> Result<HashSet<String>, Error> {
    let own: HashSet<&str> = infos.iter().map(|info| info.path.as_str()).collect();
    let (mut missing, mut kept) = (Vec::new(), HashSet::new());
    for path in &own {
        if index.model.contains_key(*path) {
            continue;
        }
        match matches(&config.allow_missing, path) {
            true => drop(kept.insert((*path).to_owned())),
            false => missing.push((*path).to_owned()),
        }
    }
    let named =
        state.optimizers.iter().map(|(name, _)| (format!("optimizers/{name}"), index.optimizers.contains_key(name)));
    let named = named
        .chain(
            state
                .schedulers
                .iter()
                .map(|(name, _)| (format!("schedulers/{name}"), index.schedulers.contains_key(name))),
        )
        .chain(state.values.iter().map(|(name, _)| (format!("values/{name}"), index.values.contains_key(name))));
    missing.extend(named.filter(|(name, there)| !there && !matches(&config.allow_missing, name)).map(|(name, _)| name));
    let strange = index.model.keys().filter(|path| !own.contains(path.as_str()));
    let unexpected: Vec<String> = strange.filter(|path| !matches(&config.allow_unexpected, path)).cloned().collect();
    let slices = state.model.held_slices()?;
    let mut misfits = Vec::new();
    for info in infos {
        if let (Some(slice), Some(stored)) = (slices.get(&info.id), index.model.get(&info.path))
            && slice.dims != stored.dims
        {
            misfits.push(format!("`{}` has dims {:?} there and {:?} here", info.path, stored.dims, slice.dims));
        }
    }
    missing.sort_unstable();
    let lacks_optimizer = missing.iter().any(|name| name.starts_with("optimizers/"));
    let optimizers = index.optimizers.keys().filter(|_| lacks_optimizer).cloned().collect();
    let mut problems = Vec::new();
    let mut list = |names: Vec<String>, words: &str| {
        if !names.is_empty() {
            problems.push(format!("{words} {}", listed(&names)));
        }
    };
    list(missing, "it lacks (`with_allow_missing` leaves such as they are)");
    list(optimizers, "it has the optimizers");
    list(unexpected, "it has what the model does not (`with_allow_unexpected` leaves such out)");
    list(misfits, "parameters are of other dims:");
    if problems.is_empty() {
        return Ok(kept);
    }
    Err(checkpoint_error(format!("{} does not fit: {}", dir.display(), problems.join("; "))))
}

/// Tells of the parameters that stay as they are, of so many: a pattern may match more than was meant.
fn tell_kept(dir: &Path, kept: &HashSet<String>, params: usize) {
    if kept.len() == params {
        log::warn!("{}: it has none of the {params} parameters of the model, which stay as they are", dir.display());
        return;
    }
    let mut kept: Vec<String> = kept.iter().cloned().collect();
    kept.sort_unstable();
    log::info!("{}: it lacks these parameters, which stay as they are: {}", dir.display(), listed(&kept));
}

/// Names, of which no more than some are told.
fn listed(names: &[String]) -> String {
    const MOST: usize = 20;
    let told = names[..names.len().min(MOST)].join(", ");
    if names.len() > MOST { format!("{told} and {} more", names.len() - MOST) } else { told }
}
