//! The eager engine: a whole model on every rank, run by its own forward.

mod backward;
mod engine;

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard};

use burn::module::Module;
use burn::tensor::Tensor;

use super::batch_norm::SyncBatchNorm;
use super::gathered::{Gatherer, is_of_two_devices, of_two_devices, shards_of};
use super::hook::HookGroup;
use super::reducer::Reducer;
use crate::Error;
use crate::comm::Communicator;
use crate::delegate::module_of_field;
use crate::error::{catch_quietly, is_thrown};
use crate::graph::{CheckedOptimizers, ClipRecord, StepEngine};
use crate::lock::lock;
use crate::params::FoundParams;
use crate::tensor::TensorTree;

/// A model that every rank of a group of replicas holds whole, or its rows of every parameter. Its own eager `forward`
/// computes, so shapes and decisions may change from step to step, and hooks at the parameters deliver gradients while
/// backward runs. Dereferences to the model.
#[derive(Clone)]
pub struct Eager<M> {
    module: M,
    /// What gathers the parameters, if each rank holds its rows of them.
    gatherer: Option<Arc<Gatherer>>,
    hooks: HookGroup,
    /// To tell the others of a loss that cannot be.
    control: Communicator,
    /// The captured steps with synchronised batch norm, once there are any.
    synchronized: Arc<Mutex<Option<SyncBatchNorm>>>,
    clipping: ClipRecord,
    checked_optimizers: CheckedOptimizers,
}

impl<M: Module> Eager<M> {
    pub(super) fn new(module: M, gatherer: Option<Arc<Gatherer>>, hooks: HookGroup, control: Communicator) -> Self {
        Self {
            module,
            gatherer,
            hooks,
            control,
            synchronized: Arc::default(),
            clipping: ClipRecord::default(),
            checked_optimizers: CheckedOptimizers::default(),
        }
    }

    /// Runs a forward of the model, whose parameters may have to be gathered: those that were found, if they were.
    ///
    /// # Errors
    /// What went wrong with that, for which a forward has no way out but to panic.
    fn forward_gathering<T>(&self, params: Option<&FoundParams>, forward: impl FnOnce() -> T) -> Result<T, Error> {
        let Some(gatherer) = &self.gatherer else { return Ok(forward()) };
        gatherer.set_shards(match params {
            Some(params) => shards_of(params, gatherer),
            None => shards_of(&self.find_params()?, gatherer),
        });
        let is_quiet = |said: &str| is_thrown(said) || is_of_two_devices(said);
        catch_quietly(is_quiet, forward).map_err(|panic| match (gatherer.failure(), of_two_devices(&*panic)) {
            (Some(error), _) => error,
            // The others wait for what the rest of this forward would gather.
            (None, Some(error)) => self.fail(error),
            (None, None) => resume_unwind(panic),
        })
    }

    /// What gathers the parameters, if each rank holds its rows of them.
    pub(super) fn gathers(&self) -> bool {
        self.gatherer.is_some()
    }

    fn fail(&self, error: Error) -> Error {
        self.control.fail(error.clone());
        error
    }

    /// Runs micro-batches with synchronised batch norm. Returns their losses, each with its factor.
    pub(super) fn run_sync_batch_norm<I: TensorTree + Clone>(
        &self,
        reducer: &Reducer,
        params: &FoundParams,
        micro_batches: Vec<(I, f64)>,
        forward: impl FnMut(&M, I) -> Tensor<1>,
    ) -> Result<Vec<(Tensor<1>, f64)>, Error> {
        let mut synchronized = self.synchronized();
        let steps = match &mut *synchronized {
            Some(steps) => steps,
            none => none.insert(SyncBatchNorm::new(reducer.data())?),
        };
        steps.run(&self.module, reducer, params, micro_batches, forward)
    }

    pub(super) fn synchronized(&self) -> MutexGuard<'_, Option<SyncBatchNorm>> {
        lock(&self.synchronized)
    }

    pub(super) fn change(self, change: impl FnOnce(M) -> Result<M, Error>) -> Result<Self, Error> {
        Ok(Self { module: change(self.module)?, ..self })
    }
}

impl<M> Deref for Eager<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.module
    }
}

impl<M> DerefMut for Eager<M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.module
    }
}

impl<M: fmt::Debug> fmt::Debug for Eager<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.module.fmt(f)
    }
}

module_of_field!(Eager<M: Module>, module);
