//! What operations cost, counted from their shapes.

use burn_ir::{FloatOperationIr, IntOperationIr, ModuleOperationIr, OperationIr, TensorIr};

use crate::graph::step::op_name;
use crate::partition::ProductOp;

/// Floating-point operations that a core does in the time in which it reads or writes one element of a tensor.
const PER_ELEMENT: u64 = 16;

/// The cost of moving a tensor in the units of [`operation_cost`].
pub(super) fn transfer_cost(tensor: &TensorIr) -> u64 {
    PER_ELEMENT * elements(tensor)
}

/// The cost of an operation: two for each multiplication of a matrix product, a convolution or an attention, and 16 for
/// each element that an operation reads and writes. Views cost nothing.
pub fn operation_cost(op: &OperationIr) -> u64 {
    let inputs: Vec<&TensorIr> = op.inputs().collect();
    let outputs: u64 = op.outputs().map(elements).sum();
    let moved = PER_ELEMENT * (inputs.iter().copied().map(elements).sum::<u64>() + outputs);
    let product = match op {
        _ if is_view(op) => return 0,
        OperationIr::Float(_, FloatOperationIr::Matmul(op)) | OperationIr::Int(IntOperationIr::Matmul(op)) => {
            outputs * op.lhs.shape.last().copied().unwrap_or(1) as u64
        }
        OperationIr::Module(ModuleOperationIr::Attention(op)) => {
            let keys = op.key.shape.iter().rev().nth(1).copied().unwrap_or(1) as u64;
            2 * keys * elements(&op.query)
        }
        OperationIr::Module(module) => products(module, op, &inputs),
        OperationIr::Custom(_) => ProductOp::multiplications(op).unwrap_or(0),
        _ => 0,
    };
    2 * product + moved
}

/// The multiplications of a convolution or linear layer, forward or backward: for each element of the output (of a
/// transposed convolution: of the input) all weights that belong to one channel.
fn products(module: &ModuleOperationIr, op: &OperationIr, inputs: &[&TensorIr]) -> u64 {
    let name = op_name(&OperationIr::Module(module.clone()));
    let tensor = |place: usize| inputs.get(place).copied();
    let gradient = name.contains("Backward");
    let per_channel = |weight: &TensorIr| elements(weight) / weight.shape.first().copied().unwrap_or(1).max(1) as u64;
    match () {
        () if name.contains("BiasBackward") => 0,
        () if name.contains("ConvTranspose") => match (tensor(0), tensor(1)) {
            (Some(x), Some(weight)) => elements(x) * per_channel(weight),
            _ => 0,
        },
        () if name.contains("Conv") => {
            let output = if gradient { tensor(2) } else { op.outputs().next() };
            output.zip(tensor(1)).map_or(0, |(output, weight)| elements(output) * per_channel(weight))
        }
        () if name.contains("LinearWeightBackward") => match (op.outputs().next(), tensor(0)) {
            (Some(weight), Some(x)) => {
                elements(weight) * elements(x) / x.shape.last().copied().unwrap_or(1).max(1) as u64
            }
            _ => 0,
        },
        () if name.contains("Linear") => {
            let (x, weight) = if gradient { (tensor(1), tensor(0)) } else { (tensor(0), tensor(1)) };
            x.zip(weight).map_or(0, |(x, weight)| {
                elements(weight) * elements(x) / x.shape.last().copied().unwrap_or(1).max(1) as u64
            })
        }
        () => 0,
    }
}

/// Whether an operation only looks at a tensor in another way.
pub(super) fn is_view(op: &OperationIr) -> bool {
    use burn_ir::BaseOperationIr::{Expand, Permute, Reshape, Slice, SwapDims};
    let (OperationIr::BaseFloat(op) | OperationIr::BaseInt(op) | OperationIr::BaseBool(op)) = op else { return false };
    matches!(op, Reshape(_) | SwapDims(_) | Permute(_) | Expand(_) | Slice(_))
}

fn elements(tensor: &TensorIr) -> u64 {
    tensor.shape.num_elements() as u64
}

/// Bytes of a tensor.
pub(super) fn bytes(tensor: &TensorIr) -> u64 {
    elements(tensor) * tensor.dtype.size() as u64
}
