//! The engines of steps: what runs the micro-batches of a model, whatever the model is spread over.
//!
//! A [`StepEngine`] runs forward and backward of one micro-batch and gives gradients away as they come: to a sum, or to
//! the reduction over replicas.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ParamId};
use burn::tensor::Tensor;

use super::checked_optimizers::CheckedOptimizers;
use super::gradient_layout::{ClipRecord, GradientLayout};
use super::random::RandomSource;
use super::results::{StepObserver, StepOutputs};
use crate::Error;
use crate::comm::Communicator;
use crate::params::{FoundParams, ParamSlice, SliceSource};
use crate::sharding::Rows;
use crate::step::{RunReport, StepCounters, StepFn};
use crate::tensor::{PlainTensor, TensorTree};

/// Takes what a micro-batch gives as soon as it is there.
pub trait GradientSink {
    /// Before anything runs: the parameters whose gradients will come, if that is known.
    fn expect(&mut self, gradients: &[ParamId]) -> Result<(), Error>;

    /// How many items the loss of the micro-batch counts for; gradients are those of the sum over them, divided by
    /// `unit`.
    fn weight(&mut self, weight: f64, unit: f64) -> Result<(), Error>;

    /// A gradient, or a part of one.
    fn gradient(&mut self, id: ParamId, gradient: PlainTensor) -> Result<(), Error>;
}

/// What a micro-batch gave beside its gradients.
pub struct MicroBatchResult {
    /// A tensor of one element, and what it is to be multiplied by to be the sum of losses. None if it counts for
    /// nothing.
    pub loss: Option<(Tensor<1>, f64)>,
    /// The further outputs of the closure.
    pub outputs: Vec<Vec<PlainTensor>>,
    /// What the pipeline took.
    pub run: Option<RunReport>,
}

/// Runs a model, or this rank's part of it.
pub trait StepEngine: Module {
    /// The model that closures see.
    type Model: Module;

    /// What wrapping an engine as a replica wraps.
    type Wrapped;

    /// This rank's part of the model.
    fn local(&self) -> &Self::Model;

    /// What was wrapped.
    fn into_wrapped(self) -> Self::Wrapped;

    /// Gives the parameters the ids that they have on the first rank of a group along another axis.
    fn share_ids(self, group: &Communicator) -> Result<Self, Error>;

    /// Whether it is known which parameters this rank holds.
    fn is_settled(&self) -> bool {
        true
    }

    /// Finds out which parameters this rank holds: as the first rank of a group along another axis does.
    fn settle<I: TensorTree + Clone>(
        &mut self,
        _inputs: I,
        _step: StepFn<'_, Self::Model, I>,
        _group: &Communicator,
    ) -> Result<(), Error> {
        Ok(())
    }

    /// Finds out which parameters this rank holds, of a model without replicas.
    fn settle_alone<I: TensorTree + Clone>(
        &mut self,
        _inputs: I,
        _step: StepFn<'_, Self::Model, I>,
    ) -> Result<(), Error> {
        Ok(())
    }

    /// Runs forward and backward of a micro-batch. Gradients are those of the sum over its items, divided by `unit`; by
    /// one that suits the engine if there is none. `params` are those of the step, and found anew where the model
    /// changes in it.
    fn run<I: TensorTree + Clone>(
        &mut self,
        params: &mut FoundParams,
        inputs: I,
        step: StepFn<'_, Self::Model, I>,
        unit: Option<f64>,
        sink: &mut dyn GradientSink,
    ) -> Result<MicroBatchResult, Error>;

    /// The most bytes that a step of such inputs has alive on this rank beside parameters and inputs, as far as that is
    /// known without running it. Without `keeps` gradients leave as they come. Collective.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn step_memory<I: TensorTree + Clone>(
        &mut self,
        inputs: I,
        step: StepFn<'_, Self::Model, I>,
        keeps: bool,
    ) -> Result<usize, Error>;

    /// Completes the gradients of a micro-batch that only other replicas have: those of this rank's rows, as the
    /// replicas have summed them up.
    fn complete(&mut self, _gradients: &mut HashMap<ParamId, PlainTensor>) -> Result<(), Error> {
        Ok(())
    }

    /// Whether it is known which parameters this rank shares with others that run other layers.
    fn is_prepared(&self) -> bool {
        true
    }

    /// The dims that this rank's part of a parameter will have, if the rank does not hold it, but may once the model is
    /// cut.
    fn later_dims(&self, _id: ParamId) -> Option<Vec<usize>> {
        None
    }

    /// Runs a forward pass for evaluation.
    fn forward<I, F, O>(&self, inputs: I, forward: F) -> Result<O, Error>
    where
        I: TensorTree + Clone,
        F: FnMut(&Self::Model, I) -> O,
        O: TensorTree + Clone + Send + 'static;

    /// Finds the parameters of the model for a step, in one walk. Makes sure that they are still what this engine has
    /// made of them: the model may have been changed since the last step. All ranks get the error.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with the parameter.
    fn find_params(&self) -> Result<FoundParams, Error> {
        Ok(FoundParams::of(self.local()))
    }

    /// Gives this rank's parameters the values that a source has.
    fn load(self, source: &mut dyn SliceSource) -> Result<Self, Error>;

    /// The whole model, on every rank.
    fn assemble(&self) -> Result<Self::Model, Error>;

    /// What this rank holds of each parameter whose value counts here.
    fn param_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error>;

    /// What this rank holds of each parameter, also of those whose value counts elsewhere.
    fn held_slices(&self) -> Result<HashMap<ParamId, ParamSlice>, Error> {
        self.param_slices()
    }

    /// Optimizers were given moments of these parameters, on each rank of what it held.
    fn moments_restored(&self, _params: &HashSet<ParamId>) {}

    /// The number of the step whose random numbers are drawn next; 0 if it draws from burn's generator.
    fn random_step(&self) -> u64 {
        0
    }

    /// Has the next step draw the random numbers of step number `step`.
    fn set_random_step(&self, _step: u64) {}

    /// What random numbers follow from; none if they are drawn from burn's generator.
    fn random(&self) -> Option<RandomSource> {
        None
    }

    /// What it has communicated so far.
    fn counters(&self) -> StepCounters;

    /// The parameters of which this rank holds a part.
    fn split_params(&self) -> Vec<SplitParam>;

    /// The groups over which the parts of the model lie, one along each axis.
    fn groups(&self) -> Vec<Communicator>;

    /// How the parameters lie over the ranks that share the model.
    fn gradient_layout(&self) -> GradientLayout;

    /// What clipping has done to it.
    fn clipping(&self) -> &ClipRecord;

    /// Whether several stages share a parameter that is trained.
    fn shares_between_stages(&self) -> bool {
        false
    }

    /// Whether its steps give gradients.
    fn trains(&self) -> bool {
        true
    }

    /// The optimizers that were looked at.
    fn checked_optimizers(&self) -> &CheckedOptimizers;

    /// How the rows of a parameter are divided of which the engine itself holds this replica's rows only.
    fn shard_rows(&self, _id: ParamId) -> Option<Rows> {
        None
    }

    /// What stands for parameters of which the engine holds rows.
    fn stand_ins(&self) -> Option<&HashSet<ParamId>> {
        None
    }

    /// Notes the rows that it holds now: a forward that is called directly gathers them in groups then, as a step does.
    fn rows_changed(&self) {}

    /// Notes that the rows of these parameters are somewhere else. A clone that is used meanwhile, or if they do not
    /// come back, gathers each of them by itself.
    fn rows_are_out(&self, _params: &[ParamId]) {}

    /// Notes the rows that it has in their place.
    fn rows_are_back(&self, _rows: &HashMap<ParamId, PlainTensor>) {}

    /// Before a micro-batch that some of the replicas that divide parameters among themselves do not have: the first
    /// that has it.
    fn begin_uneven(&self, _leader: usize) {}

    /// After it, on a replica that had it.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    fn end_uneven(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Takes part in what others of the replicas that divide parameters gather, until none of them needs anything:
    /// before this one waits for them in another way.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    fn end_gathers(&self, _params: &FoundParams) -> Result<(), Error> {
        Ok(())
    }

    /// Takes part in the micro-batch of the others.
    ///
    /// # Errors
    /// Those of [`Communicator`].
    fn follow(&self, _params: &FoundParams, _leader: usize) -> Result<(), Error> {
        Ok(())
    }
}

/// A parameter of which a rank holds a part.
#[derive(Debug, Clone)]
pub struct SplitParam {
    pub id: ParamId,
    pub path: String,
    pub dims: Vec<usize>,
    /// The dims along which it is split.
    pub split: Vec<usize>,
    /// Who has the other parts, where it is split over the ranks of groups.
    pub over: Option<SplitOver>,
}

/// What a part of a parameter is a part of, and who has the others.
#[derive(Debug, Clone)]
pub struct SplitOver {
    /// The dims of the whole.
    pub dims: Vec<usize>,
    /// Those with the zeros behind that let the ranks divide it.
    pub padded_dims: Vec<usize>,
    /// The dim that is divided over the ranks of a group, for one axis after the other.
    pub axes: Vec<(usize, Communicator)>,
}

/// Gradients of a captured step in units.
pub(crate) struct ScaledGradients<'a> {
    sink: &'a mut dyn GradientSink,
    /// The items of a plain mean, of which the gradients are; else they are those of a sum.
    rows: Option<f64>,
    unit: f64,
    factor: f64,
}

impl<'a> ScaledGradients<'a> {
    pub(crate) fn new(rows: Option<f64>, unit: Option<f64>, sink: &'a mut dyn GradientSink) -> Self {
        let items = rows.unwrap_or(1.0);
        let unit = unit.unwrap_or(items);
        Self { sink, rows, unit, factor: items / unit }
    }

    /// What gradients are multiplied by, which then is done already when they come here.
    pub(crate) fn take_factor(&mut self) -> f64 {
        std::mem::replace(&mut self.factor, 1.0)
    }

    /// The items of a step that was given to this observer.
    pub(crate) fn items(&self, outputs: &StepOutputs) -> f64 {
        self.rows.unwrap_or(outputs.weight)
    }

    /// The loss of a step that was given to this observer.
    pub(crate) fn loss(&self, outputs: &StepOutputs) -> (Tensor<1>, f64) {
        (outputs.loss.clone(), self.rows.unwrap_or(1.0))
    }
}

impl StepObserver for ScaledGradients<'_> {
    fn expect(&mut self, gradients: &[ParamId]) -> Result<(), Error> {
        self.sink.expect(gradients)
    }

    fn weight(&mut self, weight: f64) -> Result<(), Error> {
        self.sink.weight(self.rows.unwrap_or(weight), self.unit)
    }

    fn gradient(&mut self, id: ParamId, gradient: PlainTensor) -> Result<(), Error> {
        self.sink.gradient(id, gradient.scale(self.factor))
    }
}
