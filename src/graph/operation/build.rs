//! Makes the operations that passes put into a graph.

use burn_ir::{BinaryOpIr, NumericOperationIr, OperationIr, TensorIr};

/// `out = lhs + rhs` of float tensors.
pub(crate) fn add(lhs: TensorIr, rhs: TensorIr, out: TensorIr) -> OperationIr {
    OperationIr::NumericFloat(out.dtype, NumericOperationIr::Add(BinaryOpIr { lhs, rhs, out }))
}
