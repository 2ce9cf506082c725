//! What runs a model through its captured step.

use burn::module::Module;

use super::Replicas;
use crate::Error;
use crate::comm::Communicator;
use crate::data_parallel::DataParallelConfig;
use crate::graph::{GraphInputs, StepLoss, StepObserver, StepOutputs};
use crate::tensor_parallel::Sharded;

/// The golden ratio in 64 bits: replicas of neighbouring seeds have no seed in common.
const SEED_STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

/// A model of which each rank holds a part and which trains through its captured step.
pub trait GraphEngine: Module {
    /// The model that step closures see.
    type Model: Module;

    /// Runs forward and backward of one micro-batch, telling `observer` of the weight of the loss and of every gradient of
    /// this rank's parts. Gradients are those of the loss as the closure gives it: of a sum, if it is a
    /// [`TokenLoss`](crate::graph::TokenLoss).
    ///
    /// # Errors
    /// Those of the engine and of the observer.
    fn step_observed<I, F, R>(
        &mut self,
        inputs: I,
        loss: F,
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutputs, Error>
    where
        I: GraphInputs + Clone,
        F: FnOnce(&Self::Model, I) -> R,
        R: StepLoss;
}

impl<M: Module> GraphEngine for Sharded<M> {
    type Model = M;

    fn step_observed<I, F, R>(
        &mut self,
        inputs: I,
        loss: F,
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutputs, Error>
    where
        I: GraphInputs + Clone,
        F: FnOnce(&M, I) -> R,
        R: StepLoss,
    {
        Sharded::step_observed(self, inputs, loss, observer)
    }
}

impl<M: Module> Sharded<M> {
    /// Joins this split model with its replicas along another axis: each trains on inputs of its own, and gradients are
    /// averaged over `group` while the backward pass still runs. Collective over `group`, in which every rank holds the same
    /// parts: the axis of a [`Mesh`](crate::mesh::Mesh) that is not the one of the split.
    ///
    /// All replicas take the values of the first. Lazy parameters are made now. Replicas draw different random numbers, from
    /// seeds that follow from [`seed`](Sharded::seed).
    ///
    /// # Errors
    /// [`Error::ModelMismatch`] if the ranks of `group` hold different parts; those of [`Communicator`].
    pub fn data_parallel(self, group: &Communicator, config: DataParallelConfig) -> Result<Replicas<Self>, Error> {
        let seed = self.seed().wrapping_add(group.rank() as u64 * SEED_STRIDE);
        Replicas::new(self.with_seed(seed), group, config)
    }
}
