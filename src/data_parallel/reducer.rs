//! The reducer: averages the gradients of a step over the group while backward still computes them. What it knows of
//! the model, and what it has cost.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use burn::module::{Module, ParamId};
use burn::tensor::Device;

use super::config::DataParallelConfig;
use super::known_params::KnownParams;
use super::reduction_state::{ParamProgress, ReductionState};
use super::structure::Structure;
use crate::Error;
use crate::comm::{Communicator, Counters, GATHERED_PARAMETERS, StepPart, WANTED_PARAMETERS};
use crate::graph::Updates;
use crate::params::unknown_params;
use crate::sharding::{ShardComms, Sharding};
use crate::tensor::{PlainTensor, Pool};

pub(crate) struct Reducer {
    known: RwLock<KnownParams>,
    /// Carries the buckets.
    pub(super) data: Communicator,
    /// Carries head and tail.
    pub(super) control: Communicator,
    pub(super) config: DataParallelConfig,
    /// Among whom gradients and the state of optimizers are divided, if they are.
    pub(super) shards: Option<ShardComms>,
    /// The memory in which this rank's rows of large gradients are made, in every step again.
    pub(super) sums: Arc<Pool>,
    /// Where the model was when it was wrapped.
    device: Device,
    step: Mutex<ReductionState>,
    /// What `optimize` was given, once the model is there that it is called on.
    pub(super) updates: OnceLock<Updates>,
}

/// What errors call the group that carries parameters, if steps gather any: by it they know what to advise.
fn parameters_group(config: &DataParallelConfig) -> Option<&'static str> {
    match config.sharding {
        Sharding::Parameters if config.allow_unused_parameters => Some(WANTED_PARAMETERS),
        Sharding::Parameters => Some(GATHERED_PARAMETERS),
        _ => None,
    }
}

impl Reducer {
    /// # Errors
    /// Those of [`Communicator::split`].
    pub(super) fn new(
        structure: Structure,
        device: Device,
        group: &Communicator,
        config: DataParallelConfig,
    ) -> Result<Self, Error> {
        let of_its_own = |name| group.split_named(name, 0, group.rank() as i64);
        let (data, control) = (of_its_own("gradients")?, of_its_own("control")?);
        let shards = match config.sharding {
            Sharding::None => None,
            _ if group.size() == 1 => None,
            _ => Some(ShardComms::new(group, config.sharding_ranks, &control, parameters_group(&config))?),
        };
        let (known, step, updates) = (RwLock::default(), Mutex::default(), OnceLock::new());
        let sums = Arc::default();
        let reducer = Self { known, data, control, config, shards, sums, device, step, updates };
        reducer.learn(|known| *known = KnownParams::new(structure));
        Ok(reducer)
    }

    /// Has steps compare these updates, which are those of the model.
    pub(super) fn compare_updates(&self, updates: &Updates) {
        let _ = self.updates.set(updates.clone());
    }

    pub(super) fn known(&self) -> RwLockReadGuard<'_, KnownParams> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns of parameters, between two steps.
    pub(super) fn learn(&self, learn: impl FnOnce(&mut KnownParams)) {
        let count = {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            learn(&mut known);
            known.params.len()
        };
        let buckets = self.divide(&(0..count).rev().collect::<Vec<_>>());
        let unindexed = {
            let mut step = self.lock();
            step.params.resize_with(count, ParamProgress::default);
            (step.buckets, step.observed) = (buckets, false);
            std::mem::take(&mut step.unindexed)
        };
        for (id, gradient) in unindexed {
            if let Some(number) = self.index_of(id) {
                self.add(number, gradient);
            }
        }
    }

    /// The number of a parameter among those that are trained.
    pub fn index_of(&self, id: ParamId) -> Option<usize> {
        self.known().indices.get(&id).copied()
    }

    /// The numbers of all parameters that are trained.
    pub fn indices(&self) -> HashMap<ParamId, usize> {
        self.known().indices.clone()
    }

    /// The float parameters of the module that are not known, with their paths.
    pub fn unknown_params<M: Module>(&self, module: &M) -> Vec<(ParamId, String)> {
        let known = self.known();
        unknown_params(module, &|id| known.ids.contains(&id))
    }

    /// Learns the ids that a record of another run has brought into the module: its parameters are still those of these
    /// paths. Those that were not known `before` it was loaded are no part of this.
    pub fn recognise<M: Module>(&self, module: &M, before: &[(ParamId, String)]) {
        let mut unknown = self.unknown_params(module);
        unknown.retain(|(_, path)| before.iter().all(|(_, new)| new != path));
        if !unknown.is_empty() {
            self.known.write().unwrap_or_else(PoisonError::into_inner).recognise(unknown);
        }
    }

    /// Among whom gradients and the state of optimizers are divided, if they are.
    pub fn shards(&self) -> Option<&ShardComms> {
        self.shards.as_ref()
    }

    /// The bytes of this rank's rows of all gradients.
    pub fn gradient_rows(&self) -> usize {
        let bytes: usize = self.known().params.iter().map(|param| param.elements * param.dtype.size()).sum();
        bytes.div_ceil(self.shards.as_ref().map_or(1, ShardComms::ranks))
    }

    /// What the replicas divide among themselves.
    pub fn sharding(&self) -> Sharding {
        self.shards.as_ref().map_or(Sharding::None, |_| self.config.sharding)
    }

    /// Whether ranks may use different parameters, and say so before they gather any.
    pub fn says_what_is_gathered(&self) -> bool {
        self.sharding() == Sharding::Parameters && self.config.allow_unused_parameters
    }

    /// What gradients have cost in communication.
    pub fn gradient_counters(&self) -> Counters {
        let shards = self.shards.as_ref().map(ShardComms::gradient_counters).unwrap_or_default();
        self.data.counters() + shards
    }

    /// What the few numbers beside them have cost in communication.
    pub fn control_counters(&self) -> Counters {
        let shards = self.shards.as_ref().map(|shards| shards.control().counters()).unwrap_or_default();
        self.control.counters() + shards
    }

    /// How many bytes of parameters or gradients go into one collective.
    pub fn bucket_bytes(&self) -> usize {
        self.config.bucket_bytes
    }

    /// Has the calls that follow be those of a step, by its number.
    pub fn begin_step(&self, step: u64) {
        self.lock().agreed = StepPart::Step.of(step);
    }

    /// The number on which calls of this step agree.
    pub fn agreed(&self) -> u64 {
        self.lock().agreed
    }

    pub fn data(&self) -> &Communicator {
        &self.data
    }

    pub fn control(&self) -> &Communicator {
        &self.control
    }

    /// The path of the first parameter of which this rank brought a gradient to the last step that has an element that
    /// is NaN or infinite: the average does not show which rank it came from. Gradients that are not in host memory are
    /// not checked.
    pub fn non_finite(&self) -> Option<Arc<str>> {
        self.lock().last_non_finite.clone()
    }

    /// Says of whose gradient [`non_finite`](Self::non_finite) tells, where a step has several reductions.
    pub fn set_non_finite(&self, path: Option<Arc<str>>) {
        self.lock().last_non_finite = path;
    }

    /// Whether the replicas are to be compared after this many steps.
    pub fn compares(&self, steps: u64) -> bool {
        self.data.size() > 1 && self.config.compare_every > 0 && steps.is_multiple_of(self.config.compare_every)
    }

    /// Number of buckets, each one collective a step.
    pub fn buckets(&self) -> usize {
        self.lock().buckets.len()
    }

    pub(super) fn zeros(&self, param: usize, device: &Device) -> PlainTensor {
        let known = self.known();
        PlainTensor::zeros(known.params[param].shape.clone(), known.params[param].dtype, device)
    }

    /// Where gradients are: with those that have come last, or where the model was when it was wrapped.
    pub(super) fn device(&self, step: &ReductionState) -> Device {
        step.device.clone().unwrap_or_else(|| self.device.clone())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, ReductionState> {
        self.step.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
