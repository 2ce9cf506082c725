//! What a rank brings to a checkpoint.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use burn::module::ParamId;
use burn::optim::ModuleOptimizer;
use burn::tensor::DType;
use serde_json::Value;

use super::background::Progress;
use super::checkpoint_error;
use super::index::SavedRandom;
use super::moments::{self, KnownState, KnownStates};
use super::params::{self, ParamInfo};
use super::plan::TensorKey;
use super::scalar::StoredScalar;
use super::scheduler::of_scheduler;
use super::state::TrainState;
use crate::Error;
use crate::graph::{Compared, Updates};
use crate::lock::lock;
use crate::params::ParamSlice;
use crate::tensor::PlainTensor;
use crate::train::ParallelModule;

/// A part of a tensor that this rank holds.
#[derive(Clone)]
pub(super) struct Slice {
    pub(super) key: TensorKey,
    /// The dims of the whole.
    pub(super) dims: Vec<usize>,
    /// Which part it is.
    pub(super) ranges: Vec<Range<usize>>,
    pub(super) value: SliceValue,
}

/// The elements of a slice from the first on; padding may follow along each dim.
#[derive(Clone)]
pub(super) enum SliceValue {
    There(PlainTensor),
    /// Those of a moment of this parameter, which its optimizer has.
    Moment(ParamId, DType),
}

impl SliceValue {
    pub(super) fn dtype(&self) -> DType {
        match self {
            Self::There(value) => value.dtype(),
            Self::Moment(_, dtype) => *dtype,
        }
    }
}

/// The steps of a run whose checkpoints it has restored or written, in this order.
#[derive(Clone, Default)]
pub(super) struct OwnSteps(Arc<Mutex<Vec<u64>>>);

impl OwnSteps {
    /// This is the latest now.
    pub(super) fn add(&self, step: u64) {
        let mut own = lock(&self.0);
        own.retain(|other| *other != step);
        own.push(step);
    }

    pub(super) fn all(&self) -> Vec<u64> {
        lock(&self.0).clone()
    }
}

/// What the moments of an optimizer on this rank are of.
pub(super) struct OfMoments {
    /// What it updates of each parameter.
    pub(super) held: HashMap<ParamId, ParamSlice>,
    /// Those of them whose moments this rank saves: what several stages of a pipeline hold, one of them does.
    pub(super) saved: HashSet<ParamId>,
}

/// Numbers of an optimizer for each parameter, by optimizer and path.
pub(super) type ParamScalars = BTreeMap<String, BTreeMap<String, BTreeMap<String, StoredScalar>>>;

/// A state as it is at one moment. It shares its tensors with the state, of which nothing is copied: what trains on in
/// the meantime writes its new values elsewhere.
pub(super) struct Snapshot {
    pub(super) step: u64,
    pub(super) random: SavedRandom,
    slices: Vec<Slice>,
    infos: Vec<ParamInfo>,
    optimizers: Vec<(String, ModuleOptimizer, OfMoments)>,
    pub(super) schedulers: BTreeMap<String, BTreeMap<String, StoredScalar>>,
    /// Those of the program, on rank 0.
    pub(super) values: BTreeMap<String, Value>,
    /// What the save before has found out of the optimizers.
    known: KnownStates,
    /// Those of the run up to this save.
    pub(super) own_steps: OwnSteps,
    updates: SavedUpdates,
    /// How far the save is.
    pub(super) progress: Progress,
}

/// What `optimize` was given up to this save, by which ranks find out whether they have one state.
#[derive(Clone)]
pub(super) struct SavedUpdates {
    /// A number for all of it, the same on all ranks.
    pub(super) digest: u64,
    /// To tell each other in what they differ.
    pub(super) history: Updates,
}

/// All that this rank has for a checkpoint.
pub(super) struct Contents {
    pub(super) slices: Vec<Slice>,
    pub(super) scalars: ParamScalars,
    /// Those of whose moments there are slices, by name.
    pub(super) optimizers: BTreeMap<String, HeldOptimizer>,
    pub(super) updates: SavedUpdates,
    /// How far the save is: told of the bytes that are written.
    pub(super) progress: Progress,
}

/// An optimizer, and what is known of it.
pub(super) struct HeldOptimizer {
    pub(super) state: ModuleOptimizer,
    pub(super) known: KnownState,
}

impl Snapshot {
    /// That of rank 0, the `first`, has the values of the program: the others' are not saved.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if it is not known who holds what; [`Error::Checkpoint`] if a name comes twice, or a value
    /// is nothing that JSON has.
    pub(super) fn of<P: ParallelModule>(
        step: u64,
        state: &TrainState<'_, P>,
        first: bool,
        (known, own_steps): (KnownStates, OwnSteps),
    ) -> Result<Self, Error> {
        names("optimizers", state.optimizers.iter().map(|(name, _)| name))?;
        names("schedulers", state.schedulers.iter().map(|(name, _)| name))?;
        names("values", state.values.iter().map(|(name, _)| name))?;
        let infos = params::infos(state.model.local())?;
        let slices = params::slices(state.model)?;
        let saved: HashSet<ParamId> = state.model.param_slices()?.into_keys().collect();
        let mut optimizers = Vec::new();
        for (name, optimizer) in &state.optimizers {
            let held = params::moment_slices(state.model, optimizer, state.model.held_slices()?)?;
            optimizers.push((name.clone(), (**optimizer).clone(), OfMoments { held, saved: saved.clone() }));
        }
        let mut schedulers = BTreeMap::new();
        for (name, scheduler) in &state.schedulers {
            schedulers.insert(name.clone(), of_scheduler(name, scheduler)?);
        }
        let mut values = BTreeMap::new();
        for (name, value) in state.values.iter().filter(|_| first) {
            let json = value
                .to_json()
                .map_err(|why| checkpoint_error(format!("value `{name}` cannot be saved as JSON: {why}")))?;
            values.insert(name.clone(), json);
        }
        let random = SavedRandom::of(state.model);
        let history = state.model.checked_optimizers().updates().copied();
        let updates = SavedUpdates { digest: history.digest(Compared::Parts), history };
        Ok(Self {
            step,
            random,
            slices,
            infos,
            optimizers,
            schedulers,
            values,
            known,
            own_steps,
            updates,
            progress: Progress::default(),
        })
    }

    /// Finds out what moments the optimizers have.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if they do not fit the parameters.
    pub(super) fn contents(&self) -> Result<Contents, Error> {
        let (mut slices, mut scalars) = (self.slices.clone(), ParamScalars::new());
        let mut optimizers = BTreeMap::new();
        let mut all_known = lock(&self.known);
        for (name, state, of) in &self.optimizers {
            let known = all_known.entry(name.clone()).or_default();
            let found = moments::of_optimizer(name, state, &self.infos, of, known)?;
            slices.extend(found.slices);
            scalars.insert(name.clone(), found.scalars);
            optimizers.insert(name.clone(), HeldOptimizer { state: state.clone(), known: known.clone() });
        }
        let (updates, progress) = (self.updates.clone(), self.progress.clone());
        Ok(Contents { slices, scalars, optimizers, updates, progress })
    }

    /// The optimizers are not what they were at the save before: they are looked at again.
    pub(super) fn forget(&self) {
        lock(&self.known).clear();
    }
}

fn names<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> Result<(), Error> {
    let mut seen = HashSet::new();
    for name in names {
        if name.is_empty() || name.contains('/') {
            return Err(checkpoint_error(format!(
                "`{name}` is no name for one of the {what}: it must not be empty or have a `/`"
            )));
        }
        if !seen.insert(name) {
            return Err(checkpoint_error(format!("two of the {what} are called `{name}`")));
        }
    }
    Ok(())
}
