//! One captured graph per kind of step.

use std::collections::{BTreeSet, HashMap};

use burn::backend::{DispatchTensor, TensorMetadata};
use burn::module::{Module, ParamId};
use burn::tensor::{DType, Shape};

use super::capture::capture_step;
use super::custom::CustomOps;
use super::execute::Executor;
use super::inputs::{GraphInputs, TensorMapper};
use super::leaves::join;
use super::loss::StepLoss;
use super::module::Survey;
use super::step::StepGraph;
use crate::error::Error;

type Pass = Box<dyn Fn(&mut StepGraph) -> Result<(), Error> + Send>;

/// Executors by what their graph was captured for: shapes and dtypes of inputs and parameters, training flags, trainable
/// parameters.
///
/// The loss closure must be the same computation whenever the key is the same; it is called only to capture. Changes of
/// plain fields of the module (a dropout probability) are not noticed: [`clear`](Self::clear) then. Nothing is ever thrown
/// out by itself: pad batches, at least the last, to few different shapes. A graph holds operations and constants, no
/// weights.
pub struct GraphCache {
    ops: CustomOps,
    pass: Pass,
    executors: HashMap<StepKey, Executor>,
}

impl core::fmt::Debug for GraphCache {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("GraphCache").field("graphs", &self.executors.len()).finish()
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct StepKey {
    inputs: Vec<(String, Shape, DType)>,
    params: Vec<(ParamId, Shape, DType)>,
    flags: Vec<(ParamId, bool)>,
    trainable: BTreeSet<String>,
}

impl GraphCache {
    /// An empty cache whose graphs are rewritten by `pass` once captured, and run with `ops`.
    pub fn new(ops: CustomOps, pass: impl Fn(&mut StepGraph) -> Result<(), Error> + Send + 'static) -> Self {
        Self { ops, pass: Box::new(pass), executors: HashMap::new() }
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
        let key = StepKey::of(model, inputs)?;
        match self.executors.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => Ok(entry.into_mut()),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let mut graph = capture_step(model, inputs.clone(), loss)?;
                (self.pass)(&mut graph)?;
                Ok(entry.insert(Executor::new(graph, self.ops.clone())?))
            }
        }
    }

    /// How many graphs were captured since the last [`clear`](Self::clear).
    pub fn len(&self) -> usize {
        self.executors.len()
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.executors.is_empty()
    }

    /// Forgets all graphs.
    pub fn clear(&mut self) {
        self.executors.clear();
    }
}

impl StepKey {
    fn of<M: Module, I: GraphInputs + Clone>(model: &M, inputs: &I) -> Result<Self, Error> {
        let mut seen = Inputs { path: Vec::new(), seen: Vec::new() };
        drop(inputs.clone().map_tensors(&mut seen)?);
        // A module on a plain device has its training settings switched on by the capture.
        let survey = Survey::of(&model.clone().train());
        let trainable = survey.trainable();
        Ok(Self {
            inputs: seen.seen,
            trainable: trainable.iter().map(ParamId::to_string).collect(),
            params: survey.tensors.into_iter().map(|t| (t.id, t.shape, t.dtype)).collect(),
            flags: survey.flags.into_iter().map(|(_, id, on)| (id, on)).collect(),
        })
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
