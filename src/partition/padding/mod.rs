//! Pads parameters with a dim that the degree does not divide.
//!
//! A vocabulary of 50257 words is the common case: the rows of the embedding, and the classes of the output layer.
//! [`pad`] lets the parameters be larger and follows what was added through the step. Padded parameters are zeros
//! there, to begin with and, since their gradients are, for good. Wherever an operation would mix the padding into what
//! counts, it is overwritten first: with zeros for a sum or a product, with a number whose exponential is 0 for a
//! maximum and the softmax around it. [`content`] tells where that is needless, [`rules`] where the padded dim goes. An
//! operation that cannot go on with padding gets its input without; results come without.

mod content;
mod rules;
mod tensors;

use std::collections::{HashMap, HashSet};

use burn_ir::{OperationIr, TensorId, TensorIr};

use self::content::Content::{self, Lowest, Zero};
use self::rules::{Follow, Pad, follow};
use super::rules::take_all;
use crate::Error;
use crate::graph::operation::{build, only_moves, op_name, reads_at, replace_tensors, sum_of_mean, writes_at};
use crate::graph::step::Uses;
use crate::graph::{StepGraph, graph_error};

/// A parameter, by its place, a dim of it, and the size that this dim is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Larger {
    pub(crate) param: usize,
    pub(crate) dim: usize,
    pub(crate) size: usize,
}

/// The step with larger parameters, and gradients and updates of these. Everything else that it gives is as it was.
///
/// # Errors
/// [`Error::Graph`] if an operation needs all of a parameter as it was.
pub(crate) fn pad(graph: &StepGraph, larger: &[Larger]) -> Result<StepGraph, Error> {
    let mut walk = PaddingPass {
        source: graph,
        uses: Uses::of(&graph.operations),
        local: StepGraph { operations: Vec::new(), ..graph.clone() },
        padded: HashMap::new(),
        parameters: HashSet::new(),
        whole: HashMap::new(),
        indexed: HashMap::new(),
        masks: HashMap::new(),
    };
    for Larger { param, dim, size } in larger {
        if larger.iter().any(|other| other.param == *param && other.dim != *dim) {
            let path = &graph.params[*param].path;
            return Err(graph_error(format!(
                "parameter `{path}` is to be padded along two dims; split one of them only"
            )));
        }
        let tensor = &mut walk.local.params[*param].tensor;
        let real = std::mem::replace(&mut tensor.shape[*dim], *size);
        let padded = Padded { tensor: tensor.clone(), dim: *dim, real, content: Zero };
        walk.parameters.insert(padded.tensor.id);
        walk.note(padded.tensor.id, padded);
    }
    for (place, op) in graph.operations.iter().enumerate() {
        walk.step(op)?;
        if place + 1 == graph.forward_len {
            walk.local.forward_len = walk.local.operations.len();
        }
    }
    walk.results(larger)?;
    if graph.forward_len == graph.operations.len() {
        walk.local.forward_len = walk.local.operations.len();
    }
    Ok(walk.local)
}

/// What a tensor is with padding.
#[derive(Debug, Clone)]
struct Padded {
    tensor: TensorIr,
    dim: usize,
    /// The size of the dim without padding.
    real: usize,
    content: Content,
}

struct PaddingPass<'a> {
    source: &'a StepGraph,
    uses: Uses,
    local: StepGraph,
    /// Tensors of the source that are padded, as they are best known.
    padded: HashMap<TensorId, Padded>,
    /// Which of them are parameters, or such with their elements moved: not meant to be whole anywhere.
    parameters: HashSet<TensorId>,
    /// Padded tensors that had to be had without.
    whole: HashMap<TensorId, TensorIr>,
    /// By indices, dim and its size: the padded size of what is read there. What is written back there is as large.
    indexed: HashMap<(TensorId, usize, usize), usize>,
    /// By sizes without and with padding: a constant that is true for what is padding.
    masks: HashMap<(usize, usize), TensorIr>,
}

impl PaddingPass<'_> {
    fn step(&mut self, op: &OperationIr) -> Result<(), Error> {
        if let Some((base, indices, dim)) = writes_at(op)
            && let Some(size) = self.indexed.get(&(indices.id, dim, base.shape[dim])).copied()
        {
            self.enlarge(base, dim, size);
        }
        let inputs = self.inputs_of(op);
        if inputs.iter().all(|(_, pad)| pad.is_none()) {
            self.local.operations.push(op.clone());
            return Ok(());
        }
        let mut sizes = inputs.iter().filter_map(|(input, pad)| {
            pad.map(|pad| (input.shape[pad.dim], self.padded[&input.id].tensor.shape[pad.dim]))
        });
        let size = sizes.next();
        let same = sizes.all(|other| Some(other) == size);
        match (follow(op, &inputs), size) {
            (Some(follow), Some((_, size))) if same && self.can_bring(&inputs, &follow) => {
                self.run(op, &follow, size);
                Ok(())
            }
            _ => self.run_whole(op),
        }
    }

    /// What a tensor of the source is from here on.
    fn note(&mut self, id: TensorId, padded: Padded) {
        self.local.unpadded.insert(padded.tensor.id, (padded.dim, padded.real));
        self.padded.insert(id, padded);
    }

    fn inputs_of<'o>(&self, op: &'o OperationIr) -> Vec<(&'o TensorIr, Option<Pad>)> {
        let pad_of = |input: &TensorIr| self.padded.get(&input.id).map(|p| Pad { dim: p.dim, content: p.content });
        op.inputs().map(|input| (input, pad_of(input))).collect()
    }

    /// Whether inputs can be given the padding that is asked for.
    fn can_bring(&self, inputs: &[(&TensorIr, Option<Pad>)], follow: &Follow) -> bool {
        inputs
            .iter()
            .zip(&follow.inputs)
            .all(|((input, _), want)| !matches!(want, Some((_, Some(Lowest)))) || input.dtype.is_float())
    }

    fn run(&mut self, op: &OperationIr, follow: &Follow, size: usize) {
        let inputs: Vec<TensorIr> = op.inputs().cloned().collect();
        let mut now = HashMap::new();
        for (input, want) in inputs.iter().zip(&follow.inputs) {
            let Some((dim, _)) = want else { continue };
            self.enlarge(input, *dim, size);
        }
        // Of what was brought only now more is known.
        let output = self::rules::follow(op, &self.inputs_of(op)).map_or(follow.output, |known| known.output);
        for (input, want) in inputs.iter().zip(&follow.inputs) {
            let Some((_, content)) = want else { continue };
            if let Some(content) = content {
                self.overwrite(input.id, *content);
            }
            now.insert(input.id, self.padded[&input.id].tensor.clone());
        }
        if let Some((tensor, indices, dim)) = reads_at(op) {
            self.indexed.insert((indices.id, dim, tensor.shape[dim]), size);
        }
        let mut local = op.clone();
        if let Some(Pad { dim, content }) = output {
            for out in op.outputs() {
                let mut tensor = out.clone();
                tensor.shape[dim] = size;
                now.insert(out.id, tensor.clone());
                self.note(out.id, Padded { tensor, dim, real: out.shape[dim], content });
                if only_moves(op) && inputs.iter().all(|input| self.parameters.contains(&input.id)) {
                    self.parameters.insert(out.id);
                }
            }
        }
        replace_tensors(&mut local, &now);
        if let Some(pad) = output {
            take_all(&mut local, pad.dim);
        } else if self.mean_over_padding(&local, inputs[0].shape.num_elements()) {
            return;
        }
        self.local.operations.push(local);
    }

    /// A mean over padding is the sum over the rest, `count` elements of the whole input. Returns whether it is a mean.
    fn mean_over_padding(&mut self, mean: &OperationIr, count: usize) -> bool {
        let local = &mut self.local;
        let sum = sum_of_mean(mean, |out| TensorIr { id: local.fresh_id(), ..out.clone() });
        let Some((sum, out)) = sum.zip(mean.outputs().next().cloned()) else { return false };
        let Some(total) = sum.outputs().next().cloned() else { return false };
        let share = count / out.shape.num_elements().max(1);
        local.operations.extend([sum, build::divide(total, share as f64, out)]);
        true
    }

    /// Runs an operation on what its inputs are without padding, but for parameters, which stay as they are.
    fn run_whole(&mut self, op: &OperationIr) -> Result<(), Error> {
        let padded: Vec<TensorIr> = op.inputs().filter(|input| self.padded.contains_key(&input.id)).cloned().collect();
        let mut now = HashMap::new();
        for input in padded.iter().filter(|input| !self.parameters.contains(&input.id)).cloned().collect::<Vec<_>>() {
            now.insert(input.id, self.without(&input));
        }
        match padded.first() {
            Some(parameter) if now.is_empty() => Err(self.refusal(parameter, op)),
            _ => {
                let mut local = op.clone();
                replace_tensors(&mut local, &now);
                self.step(&local)
            }
        }
    }

    fn refusal(&self, tensor: &TensorIr, op: &OperationIr) -> Error {
        let origin = self.origin(tensor.id);
        let param = self.source.params.iter().find(|param| param.tensor.id == origin);
        let (path, dims) = param.map_or(("", &[][..]), |param| (&param.path, param.tensor.shape.as_slice()));
        graph_error(format!(
            "parameter `{path}` of dims {dims:?} is to be split along a dim which the degree does not divide, and cannot be \
             padded: {} needs all of it as it is; split another dim, choose another degree, or replicate it",
            op_name(op)
        ))
    }

    /// The parameter that a tensor is with its elements moved.
    fn origin(&self, mut id: TensorId) -> TensorId {
        while let Some(maker) = self.uses.maker(id)
            && let Some(input) = self.source.operations[maker].inputs().next()
        {
            id = input.id;
        }
        id
    }

    fn results(&mut self, larger: &[Larger]) -> Result<(), Error> {
        for (place, binding) in self.source.params.iter().enumerate() {
            let larger = larger.iter().find(|larger| larger.param == place);
            let mut of = |result: &Option<TensorIr>| {
                result.as_ref().map(|result| self.result(result, larger.map(|l| (l.dim, l.size)))).transpose()
            };
            let (gradient, update) = (of(&binding.gradient)?, of(&binding.update)?);
            (self.local.params[place].gradient, self.local.params[place].update) = (gradient, update);
        }
        let source = self.source;
        self.local.loss = source.loss.as_ref().map(|loss| self.result(loss, None)).transpose()?;
        self.local.weight = source.weight.as_ref().map(|weight| self.result(weight, None)).transpose()?;
        self.local.outputs = source.outputs.iter().map(|out| self.result(out, None)).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// A result: with zeros as padding if it belongs to a padded parameter, else without.
    fn result(&mut self, result: &TensorIr, larger: Option<(usize, usize)>) -> Result<TensorIr, Error> {
        let padded = self.padded.get(&result.id).map(|padded| padded.dim);
        match (padded, larger) {
            (None, None) => Ok(result.clone()),
            (Some(_), None) => Ok(self.without(result)),
            (Some(have), Some((dim, _))) if have != dim => Err(graph_error(format!(
                "the gradient of a parameter that is padded along dim {dim} is so along {have}"
            ))),
            (_, Some((dim, size))) => {
                self.enlarge(result, dim, size);
                self.overwrite(result.id, Zero);
                Ok(self.padded[&result.id].tensor.clone())
            }
        }
    }
}
