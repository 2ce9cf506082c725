//! How much the operations of a step compute, fused products of a partition included.

use burn_ir::OperationIr;

use super::products::ProductOp;
use crate::graph::operation;

/// The multiplications that an operation takes on each rank.
pub(crate) fn multiplications(op: &OperationIr) -> u64 {
    ProductOp::multiplications(op).unwrap_or_else(|| operation::multiplications(op))
}

/// The floating-point operations of an operation: two for each multiplication of a product, and one for each element
/// that any other operation makes.
pub(crate) fn flops(op: &OperationIr) -> u64 {
    match multiplications(op) {
        0 => op.outputs().map(operation::elements).sum(),
        multiplications => 2 * multiplications,
    }
}
