//! What an operation costs a stage, counted from its shapes.

use burn_ir::{OperationIr, TensorIr};

use crate::graph::operation::{elements, is_view};
use crate::partition::multiplications;

/// Floating-point operations that a core does in the time in which it reads or writes one element of a tensor.
const PER_ELEMENT: u64 = 16;

/// The cost of moving a tensor in the units of [`operation_cost`].
pub(super) fn transfer_cost(tensor: &TensorIr) -> u64 {
    PER_ELEMENT * elements(tensor)
}

/// The cost of an operation: two for each multiplication of a matrix product, a convolution or an attention, and 16 for
/// each element that an operation reads and writes. Views cost nothing.
pub fn operation_cost(op: &OperationIr) -> u64 {
    if is_view(op) {
        return 0;
    }
    2 * multiplications(op) + op.inputs().chain(op.outputs()).map(transfer_cost).sum::<u64>()
}
