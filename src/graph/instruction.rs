//! What a program is made of.

use burn_ir::{OperationIr, TensorIr};

/// One action of a program.
#[derive(Clone, Debug)]
pub(crate) enum Instruction {
    Run(Box<OperationIr>),
    /// The tensor has had its last reader, which could not consume it itself.
    Free(TensorIr),
    /// A result is ready. If nothing reads it later it is moved out, else shared.
    Output(TensorIr),
}

/// One step of a program whose lifetimes are still to be worked out.
pub(crate) enum Item {
    Run(Box<OperationIr>),
    /// A result is wanted here.
    Output(TensorIr),
}
