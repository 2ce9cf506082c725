//! A cache of captured graphs, one for each kind of step.

use std::any::Any;
use std::collections::hash_map::Entry;
use std::hash::{DefaultHasher, Hash, Hasher};

use burn::backend::{DispatchTensor, TensorMetadata};
use burn::module::Module;
use burn::tensor::{DType, Shape};

use super::capture::capture_step;
use super::custom::CustomOps;
use super::execute::Executor;
use super::forward::{Forward, capture_forward};
use super::graph_error;
use super::recent::{GRAPHS, Recent};
use super::signature::Signature;
use super::step::StepGraph;
use crate::Error;
use crate::params::FoundParams;
use crate::step::{ClosureIdentity, Loss, StepFn};
use crate::tensor::{TensorMapper, TensorTree, place};

type GraphPass = Box<dyn Fn(&mut StepGraph) -> Result<(), Error> + Send>;

/// Executors by what their graph was captured for: the closure, shapes and dtypes of inputs and parameters, training
/// flags, trainable parameters.
///
/// Closures are told apart by where they are written. One that captures nothing of what is around it is called only to
/// capture. One that captures something (a factor, a reference, a function pointer) may compute something else the next
/// time: it is captured anew at every step, 1 to 2 ms a layer, and the last graph runs if both are equal. What changes
/// from step to step is better an input. Changes of plain fields of the module (a dropout probability) and of statics
/// are not noticed: [`clear`](Self::clear) then. A graph holds operations and constants, no weights. Of steps and of
/// forwards so many are kept, 16 unless [said otherwise](Self::with_most): one that was thrown out is captured anew
/// when it comes again, so pad batches, at least the last, to few different shapes.
pub struct GraphCache {
    ops: CustomOps,
    pass: GraphPass,
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
    closure: ClosureIdentity,
    /// What a closure that captures something has made of it.
    graph: Option<u64>,
    inputs: Vec<(String, Shape, DType)>,
    /// The plain values among the inputs.
    values: Vec<u64>,
    module: Signature,
}

impl GraphCache {
    /// An empty cache whose graphs are rewritten by `pass` once captured, and run with `ops`.
    pub fn new(ops: CustomOps, pass: impl Fn(&mut StepGraph) -> Result<(), Error> + Send + 'static) -> Self {
        Self { ops, pass: Box::new(pass), executors: Recent::new(GRAPHS), forwards: Recent::new(GRAPHS) }
    }

    /// Sets how many graphs of steps, and as many of forwards, are kept: those used last, and at least one. Where
    /// graphs have collectives in them, all ranks must keep the same number. Forgets all graphs.
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
    pub fn executor<M, I, F, R>(&mut self, model: &M, inputs: &I, mut loss: F) -> Result<&mut Executor, Error>
    where
        M: Module,
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> R,
        R: Into<Loss>,
    {
        let mut call = |model: &M, inputs: I| loss(model, inputs).into();
        let signature = Signature::of_step(&FoundParams::of(model), &|_, _| None);
        self.executor_of(signature, inputs, StepFn::new::<F>(&mut call), || model.clone())
    }

    /// As [`executor`](Self::executor), of a closure that is known already, for a model of this signature that is made
    /// only if it is captured now.
    pub(crate) fn executor_of<M, I>(
        &mut self,
        signature: Signature,
        inputs: &I,
        mut step: StepFn<'_, M, I>,
        model: impl Fn() -> M,
    ) -> Result<&mut Executor, Error>
    where
        M: Module,
        I: TensorTree + Clone,
    {
        let mut key = StepKey::new(step.identity, signature, inputs)?;
        let mut capture = || capture_step(&model(), inputs.clone(), |model: &M, inputs| step.call(model, inputs));
        let anew = if key.closure.captures() { Some(capture()?) } else { None };
        key.graph = anew.as_ref().map(StepGraph::digest);
        match self.executors.entry(key) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let mut graph = anew.map_or_else(capture, Ok)?;
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
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> O,
        O: TensorTree + Clone + Send + 'static,
    {
        let signature = Signature::of_forward(&FoundParams::of(model), &|_, _| None);
        self.forward_of(signature, inputs, forward, || model.clone())
    }

    /// As [`forward`](Self::forward), for a model of this signature that is made only if it is captured now.
    pub(crate) fn forward_of<M, I, F, O>(
        &mut self,
        signature: Signature,
        inputs: &I,
        mut forward: F,
        model: impl Fn() -> M,
    ) -> Result<&mut Forward<O>, Error>
    where
        M: Module,
        I: TensorTree + Clone,
        F: FnMut(&M, I) -> O,
        O: TensorTree + Clone + Send + 'static,
    {
        let mut key = StepKey::new(ClosureIdentity::of::<F>(), signature, inputs)?;
        let mut capture = || capture_forward(&model(), inputs.clone(), &mut forward);
        let anew = if key.closure.captures() { Some(capture()?) } else { None };
        key.graph = anew.as_ref().map(|captured| captured.graph.digest());
        let made = match self.forwards.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut captured = anew.map_or_else(capture, Ok)?;
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
    /// The key of a closure on such inputs and a module of this signature.
    ///
    /// # Errors
    /// Those of the inputs' [`TensorTree`].
    pub(crate) fn new<I: TensorTree + Clone>(
        closure: ClosureIdentity,
        module: Signature,
        inputs: &I,
    ) -> Result<Self, Error> {
        let mut seen = Inputs { path: Vec::new(), seen: Vec::new(), values: Vec::new() };
        drop(inputs.clone().map_tensors(&mut seen)?);
        Ok(Self { closure, graph: None, inputs: seen.seen, values: seen.values, module })
    }

    /// The key of the graphs that a closure which captures something has given now.
    pub(crate) fn with_graphs(self, digests: impl Iterator<Item = u64>) -> Self {
        let mut hasher = DefaultHasher::new();
        digests.for_each(|digest| digest.hash(&mut hasher));
        Self { graph: Some(hasher.finish()), ..self }
    }
}

struct Inputs {
    path: Vec<usize>,
    seen: Vec<(String, Shape, DType)>,
    values: Vec<u64>,
}

impl TensorMapper for Inputs {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        self.seen.push((place(&self.path), tensor.shape(), tensor.dtype()));
        Ok(tensor)
    }

    fn enter(&mut self, index: usize) {
        self.path.push(index);
    }

    fn exit(&mut self) {
        self.path.pop();
    }

    fn value(&mut self, value: u64) {
        self.values.push(value);
    }
}
