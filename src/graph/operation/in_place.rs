//! What operations take of memory on the host beside what they give, where it is known.

use burn_ir::{BaseOperationIr as Base, ModuleOperationIr as Module, OperationIr};

use super::class::{Class, is_elementwise};
use super::cost::bytes;

/// How many of an operation's inputs it may write its result over, from the first on: it takes the first that has the
/// dims and the dtype of the result, that lies in order and that nobody else has.
pub(crate) fn written_over(op: &OperationIr) -> usize {
    match op {
        OperationIr::BaseFloat(op) | OperationIr::BaseInt(op) | OperationIr::BaseBool(op)
            if matches!(op, Base::Scatter(_) | Base::SelectAssign(_) | Base::SliceAssign(_)) =>
        {
            1
        }
        _ if is_elementwise(op) && Class::of(op) != Class::Cast => op.inputs().count(),
        _ => 0,
    }
}

/// Bytes that an operation takes while it runs, beside inputs and outputs: zeros are copied once to where they are
/// aligned; what communicates has as much again on its way, in partial sums and chunks.
pub(crate) fn passing_bytes(op: &OperationIr) -> usize {
    let twice = match op {
        OperationIr::BaseFloat(op) | OperationIr::BaseInt(op) | OperationIr::BaseBool(op) => {
            matches!(op, Base::Zeros(_) | Base::Empty(_))
        }
        OperationIr::Module(op) => matches!(op, Module::EmbeddingBackward(_)),
        OperationIr::Custom(_) => true,
        _ => false,
    };
    if twice { op.outputs().map(bytes).sum::<u64>() as usize } else { 0 }
}
