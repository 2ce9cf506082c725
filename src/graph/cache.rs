//! One captured graph per kind of step.

use std::any::{Any, TypeId};
use std::collections::hash_map::Entry;

use burn::backend::{DispatchTensor, TensorMetadata};
use burn::module::Module;
use burn::tensor::{DType, Shape};

use super::capture::capture_step;
use super::custom::CustomOps;
use super::edges::join;
use super::execute::Executor;
use super::forward::{Forward, capture_forward};
use super::graph_error;
use super::inputs::{GraphInputs, TensorMapper};
use super::loss::StepLoss;
use super::recent::{GRAPHS, Recent};
use super::signature::Signature;
use super::step::StepGraph;
use crate::error::Error;

type Pass = Box<dyn Fn(&mut StepGraph) -> Result<(), Error> + Send>;

/// Executors by what their graph was captured for: the closure, shapes and dtypes of inputs and parameters, training flags,
/// trainable parameters.
///
/// Closures are told apart by where they are written, not by what they capture (and function pointers, as opposed to
/// functions, not at all): one that is to compute something else the next time needs to be another closure, or get what
/// changes as an input. It is called only to capture. Changes of plain fields of the module (a dropout probability) are not noticed: [`clear`](Self::clear) then. A
/// graph holds operations and constants, no weights. Of steps and of forwards so many are kept, 16 unless
/// [said otherwise](Self::with_most): one that was thrown out is captured anew when it comes again, so pad batches, at least the
/// last, to few different shapes.
pub struct GraphCache {
    ops: CustomOps,
    pass: Pass,
    executors: Recent<StepKey, Executor>,
    /// A [`Forward`] of the outputs that its closure gives.
    forwards: Recent<StepKey, Box<dyn Any + Send>>,
}

impl core::fmt::Debug for GraphCache {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("GraphCache").field("graphs", &self.len()).finish()
    }
}

/// What a captured step is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StepKey {
    /// Closures written in different places are of different types.
    closure: TypeId,
    inputs: Vec<(String, Shape, DType)>,
    module: Signature,
}

impl GraphCache {
    /// An empty cache whose graphs are rewritten by `pass` once captured, and run with `ops`.
    pub fn new(ops: CustomOps, pass: impl Fn(&mut StepGraph) -> Result<(), Error> + Send + 'static) -> Self {
        Self { ops, pass: Box::new(pass), executors: Recent::new(GRAPHS), forwards: Recent::new(GRAPHS) }
    }

    /// Sets how many graphs of steps, and as many of forwards, are kept: those used last, and at least one. Where graphs have
    /// collectives in them, all ranks must keep the same number. Forgets all graphs.
    pub fn with_most(self, graphs: usize) -> Self {
        Self { executors: Recent::new(graphs), forwards: Recent::new(graphs), ..self }
    }

    /// How many graphs of steps, and of forwards, are kept at most.
    pub fn most(&self) -> usize {
        self.executors.most()
    }

    /// The executor for this model and these inputs, captured now if it is not there yet.
    ///
    /// # Errors
    /// Those of [`capture_step`], of the pass and of [`Executor::new`].
    pub fn executor<M, I, F, R>(&mut self, model: &M, inputs: &I, loss: F) -> Result<&mut Executor, Error>
    where
        M: Module,
        I: GraphInputs + Clone,
        F: FnOnce(&M, I) -> R,
        R: StepLoss,
    {
        self.executor_of(Signature::of_step(model, &|_, _| None), inputs, loss, || model.clone())
    }

    /// As [`executor`](Self::executor), for a model of this signature that is made only if it is captured now.
    pub(crate) fn executor_of<M, I, F, R>(
        &mut self,
        signature: Signature,
        inputs: &I,
        loss: F,
        model: impl FnOnce() -> M,
    ) -> Result<&mut Executor, Error>
    where
        M: Module,
        I: GraphInputs + Clone,
        F: FnOnce(&M, I) -> R,
        R: StepLoss,
    {
        let key = StepKey::new::<I, F>(signature, inputs)?;
        match self.executors.entry(key) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let mut graph = capture_step(&model(), inputs.clone(), loss)?;
                (self.pass)(&mut graph)?;
                Ok(entry.insert(Executor::new(graph, self.ops.clone())?))
            }
        }
    }

    /// The executor of a forward alone ([`capture_forward`]) for this model and these inputs, captured now if it is not
    /// there yet.
    ///
    /// # Errors
    /// Those of [`capture_forward`], of the pass and of [`Executor::new`].
    pub fn forward<M, I, F, O>(&mut self, model: &M, inputs: &I, forward: F) -> Result<&mut Forward<O>, Error>
    where
        M: Module,
        I: GraphInputs + Clone,
        F: FnOnce(&M, I) -> O,
        O: GraphInputs + Clone + Send + 'static,
    {
        self.forward_of(Signature::of_forward(model, &|_, _| None), inputs, forward, || model.clone())
    }

    /// As [`forward`](Self::forward), for a model of this signature that is made only if it is captured now.
    pub(crate) fn forward_of<M, I, F, O>(
        &mut self,
        signature: Signature,
        inputs: &I,
        forward: F,
        model: impl FnOnce() -> M,
    ) -> Result<&mut Forward<O>, Error>
    where
        M: Module,
        I: GraphInputs + Clone,
        F: FnOnce(&M, I) -> O,
        O: GraphInputs + Clone + Send + 'static,
    {
        let key = StepKey::new::<I, F>(signature, inputs)?;
        let made = match self.forwards.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut captured = capture_forward(&model(), inputs.clone(), forward)?;
                (self.pass)(&mut captured.graph)?;
                entry.insert(Box::new(Forward::new(captured, self.ops.clone())?))
            }
        };
        made.downcast_mut().ok_or_else(|| graph_error("a closure of one type gave outputs of two types"))
    }

    /// How many graphs there are.
    pub fn len(&self) -> usize {
        self.executors.len() + self.forwards.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all graphs.
    pub fn clear(&mut self) {
        self.executors.clear();
        self.forwards.clear();
    }
}

impl StepKey {
    /// The key of a closure of type `F` on such inputs and a module of this signature.
    pub(crate) fn new<I: GraphInputs + Clone, F>(module: Signature, inputs: &I) -> Result<Self, Error> {
        let mut seen = Inputs { path: Vec::new(), seen: Vec::new() };
        drop(inputs.clone().map_tensors(&mut seen)?);
        Ok(Self { closure: typeid::of::<F>(), inputs: seen.seen, module })
    }
}

struct Inputs {
    path: Vec<usize>,
    seen: Vec<(String, Shape, DType)>,
}

impl TensorMapper for Inputs {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        self.seen.push((join(&self.path), tensor.shape(), tensor.dtype()));
        Ok(tensor)
    }

    fn enter(&mut self, index: usize) {
        self.path.push(index);
    }

    fn exit(&mut self) {
        self.path.pop();
    }
}
