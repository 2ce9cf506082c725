//! What runs a model through its captured step.

use burn::module::Module;

use super::Replicas;
use crate::Error;
use crate::comm::Communicator;
use crate::data_parallel::DataParallelConfig;
use crate::graph::{GraphInputs, StepLoss, StepObserver, StepOutputs};
use crate::pipeline_parallel::{PipelineConfig, Pipelined};
use crate::tensor_parallel::Sharded;

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
        F: FnMut(&Self::Model, I) -> R,
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
        F: FnMut(&M, I) -> R,
        R: StepLoss,
    {
        Sharded::step_observed(self, inputs, loss, observer)
    }
}

impl<M: Module> GraphEngine for Pipelined<M> {
    type Model = M;

    fn step_observed<I, F, R>(
        &mut self,
        inputs: I,
        loss: F,
        observer: &mut dyn StepObserver,
    ) -> Result<StepOutputs, Error>
    where
        I: GraphInputs + Clone,
        F: FnMut(&M, I) -> R,
        R: StepLoss,
    {
        Pipelined::step_observed(self, inputs, loss, observer)
    }
}

impl<M: Module> Pipelined<M> {
    /// Joins this pipeline with its replicas along another axis: each trains on a batch of its own, and gradients are averaged
    /// over `group` once the pipeline has drained. Collective over `group`, in which every rank holds the same stages: the
    /// axis of a [`Mesh`](crate::mesh::Mesh) that is not that of the pipeline.
    ///
    /// The model must be cut: by paths, or after [`prepare`](Self::prepare). All replicas take the values of the first, and
    /// draw different random numbers. Lazy parameters of this rank's stages are made now.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if the model is not cut yet; [`Error::ModelMismatch`] if the ranks of `group` hold different
    /// stages; those of [`Communicator`].
    pub fn data_parallel(self, group: &Communicator, config: DataParallelConfig) -> Result<Replicas<Self>, Error> {
        if !self.is_cut() {
            let problem =
                "who holds what is not known before the model is cut: `prepare` it with a batch, or cut it by paths";
            return Err(Error::Pipeline { problem: problem.into() });
        }
        self.same_parts(group)?;
        self.draw_as(group.rank());
        Replicas::new(self, group, config)
    }
}

impl<M: Module> Sharded<M> {
    /// Cuts this split model into the stages of a pipeline along another axis: every rank holds its parts of the parameters
    /// of its stages. Collective over `group`, in which every rank holds the same parts: the axis of a
    /// [`Mesh`](crate::mesh::Mesh) that is not that of the split.
    ///
    /// # Errors
    /// Those of [`PipelineParallel::pipeline_parallel`](crate::pipeline_parallel::PipelineParallel::pipeline_parallel);
    /// [`Error::ModelMismatch`] if the ranks of `group` hold different parts.
    pub fn pipeline_parallel(self, group: &Communicator, config: PipelineConfig) -> Result<Pipelined<M>, Error> {
        self.split().same_parts(group)?;
        let (local, split) = self.into_parts();
        Pipelined::new(local, Some(split), group, config)
    }

    /// Joins this split model with its replicas along another axis: each trains on inputs of its own, and gradients are
    /// averaged over `group` while the backward pass still runs. Collective over `group`, in which every rank holds the same
    /// parts: the axis of a [`Mesh`](crate::mesh::Mesh) that is not the one of the split.
    ///
    /// All replicas take the values of the first. Lazy parameters are made now. Replicas draw different random numbers, all of
    /// the same [seed](Sharded::seed), from the [step](Sharded::random_step) on that this model has reached.
    ///
    /// # Errors
    /// [`Error::ModelMismatch`] if the ranks of `group` hold different parts; those of [`Communicator`].
    pub fn data_parallel(self, group: &Communicator, config: DataParallelConfig) -> Result<Replicas<Self>, Error> {
        self.split().same_parts(group)?;
        self.draw_as(group.rank());
        Replicas::new(self, group, config)
    }
}
