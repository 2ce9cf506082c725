//! A captured step as data: operations, and what the tensors at its edges mean.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use burn::module::ParamId;
use burn::tensor::TensorData;
use burn_ir::{CustomOpIr, IrVisitorMut, OperationIr, TensorId, TensorIr, TensorStatus};

/// A parameter or running statistic of the module, as the graph sees it.
#[derive(Clone, Debug)]
pub struct ParamBinding {
    /// Path of the parameter in the module, as in `encoder.layers.0.mha.query.weight`. Of several places that share
    /// one id (tied weights), the first.
    pub path: String,
    /// burn's id of the parameter.
    pub id: ParamId,
    /// The tensor that must be given the parameter's value before the first operation.
    pub tensor: TensorIr,
    /// Whether the parameter requires a gradient.
    pub trainable: bool,
    /// Its gradient: a result of the step, of the parameter's shape and dtype. `None` if it is frozen or the loss does
    /// not depend on it.
    pub gradient: Option<TensorIr>,
    /// Its next value, if it is a running statistic that the step updates: a result of the step.
    pub update: Option<TensorIr>,
}

/// An input of the step, in the order of [`TensorTree`](super::TensorTree).
#[derive(Clone, Debug)]
pub struct InputBinding {
    /// Place in the structure of the inputs: empty for a lone tensor, `1.0` for the first tensor of the second element.
    pub path: String,
    /// The tensor that must be given the input's value.
    pub tensor: TensorIr,
}

/// A burn `BatchNorm` of the module.
#[derive(Clone, Debug)]
pub struct BatchNormBinding {
    /// Path of the `BatchNorm`.
    pub path: String,
    /// The tensor of its `gamma`.
    pub gamma: TensorId,
    /// The tensor of its running mean before the step.
    pub running_mean: TensorId,
    /// The tensor of its running variance before the step.
    pub running_var: TensorId,
    /// Whether it was in training mode.
    pub training: bool,
}

/// One step as data: forward, loss and backward in execution order, or a forward alone.
///
/// Tensor ids are canonical (parameters, inputs, constants, then operation outputs, counted from 0), so two captures of
/// the same step are equal. Tensor statuses mean nothing here: the executor works them out after all passes have run.
#[derive(Clone, Debug)]
pub struct StepGraph {
    /// The operations, forward first.
    pub operations: Vec<OperationIr>,
    /// How many of the operations belong to the forward pass.
    pub forward_len: usize,
    /// Parameters and running statistics, in the order in which a visitor meets them.
    pub params: Vec<ParamBinding>,
    /// Run-time inputs.
    pub inputs: Vec<InputBinding>,
    /// Values of the tensors that were made on the host during the capture, or are held by the module outside a
    /// parameter.
    pub constants: BTreeMap<TensorId, TensorData>,
    /// The loss, of which the gradients are: one element. `None` in a forward alone
    /// ([`capture_forward`](super::capture_forward)).
    pub loss: Option<TensorIr>,
    /// The number of items that the loss is the sum over ([`Loss`](crate::step::Loss)): one element. `None` if the loss
    /// is a plain mean, which counts for 1.
    pub weight: Option<TensorIr>,
    /// Extra outputs of the step closure, in order; of a forward alone, its outputs.
    pub outputs: Vec<TensorIr>,
    /// The module's batch norms.
    pub batch_norms: Vec<BatchNormBinding>,
    /// Of tensors that are padded: the dim, and its size without padding.
    pub(crate) unpadded: HashMap<TensorId, (usize, usize)>,
    pub(crate) next_id: u64,
}

impl StepGraph {
    /// An id that no tensor of the graph has yet.
    pub fn fresh_id(&mut self) -> TensorId {
        self.next_id += 1;
        TensorId::new(self.next_id - 1)
    }

    /// The tensors that the step gives: loss, its weight, gradients, updates and extra outputs. A tensor may appear
    /// several times.
    pub fn results(&self) -> impl Iterator<Item = &TensorIr> {
        let params = self.params.iter().flat_map(|p| p.gradient.iter().chain(&p.update));
        self.loss.iter().chain(&self.weight).chain(params).chain(&self.outputs)
    }

    /// A hash of the operations, constants and results: two captures of one step have the same.
    pub(crate) fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.operations, self.forward_len).hash(&mut hasher);
        for (id, value) in &self.constants {
            (id, value.as_bytes()).hash(&mut hasher);
        }
        let inputs = self.inputs.iter().map(|input| &input.tensor);
        let params = self.params.iter().map(|param| &param.tensor);
        inputs.chain(params).chain(self.results()).for_each(|tensor| tensor.id.hash(&mut hasher));
        hasher.finish()
    }

    /// A hash of the custom operations in order: ids, scalars but the last, and output shapes.
    ///
    /// Ranks whose graphs run the same collectives have the same fingerprint, also with batches of different sizes, so
    /// comparing it once before the first step tells early that collectives would not match. (By convention the last
    /// scalar of a custom operation is the part that may differ between ranks, as a sample count does.)
    pub fn collective_fingerprint(&self) -> u64 {
        self.fingerprint(|_| true)
    }

    /// As [`collective_fingerprint`](Self::collective_fingerprint), of some custom operations only.
    pub(crate) fn fingerprint(&self, counts: impl Fn(&CustomOpIr) -> bool) -> u64 {
        let mut hasher = DefaultHasher::new();
        for op in &self.operations {
            if let OperationIr::Custom(op) = op
                && counts(op)
            {
                op.id.hash(&mut hasher);
                op.scalars.split_last().map(|(_, scalars)| scalars).hash(&mut hasher);
                for out in &op.outputs {
                    out.shape.hash(&mut hasher);
                }
            }
        }
        hasher.finish()
    }
}

/// Who makes and who reads each tensor, by operation index.
pub(crate) struct Uses {
    makers: HashMap<TensorId, usize>,
    readers: HashMap<TensorId, Vec<usize>>,
}

impl Uses {
    pub(crate) fn of(operations: &[OperationIr]) -> Self {
        let mut uses = Self { makers: HashMap::new(), readers: HashMap::new() };
        for (index, op) in operations.iter().enumerate() {
            for out in op.outputs() {
                uses.makers.insert(out.id, index);
            }
            for input in op.inputs() {
                let readers = uses.readers.entry(input.id).or_default();
                if readers.last() != Some(&index) {
                    readers.push(index);
                }
            }
        }
        uses
    }

    pub(crate) fn maker(&self, tensor: TensorId) -> Option<usize> {
        self.makers.get(&tensor).copied()
    }

    pub(crate) fn readers(&self, tensor: TensorId) -> &[usize] {
        self.readers.get(&tensor).map_or(&[], Vec::as_slice)
    }
}

/// Renames tensors, and forgets their recorded statuses.
pub(crate) struct Rename<F>(pub(crate) F);

impl<F: FnMut(TensorId) -> TensorId> IrVisitorMut for Rename<F> {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        tensor.id = (self.0)(tensor.id);
        tensor.status = TensorStatus::NotInit;
    }
}
