//! A graph as text, a line for each operation.

use std::fmt;

use burn_ir::{OperationIr, TensorIr};

use super::step::{StepGraph, op_name};

impl fmt::Display for StepGraph {
    /// One line for each operation: its outputs with their dims, its name, its inputs.
    ///
    /// ```text
    /// %17 [4, 5, 24] = Module.Linear %12 %1 %2
    /// ```
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, op) in self.operations.iter().enumerate() {
            if index == self.forward_len {
                writeln!(f, "backward:")?;
            }
            line(f, op)?;
        }
        Ok(())
    }
}

fn line(f: &mut fmt::Formatter<'_>, op: &OperationIr) -> fmt::Result {
    let made = |t: &TensorIr| format!("%{} {:?}", t.id.value(), t.shape.as_slice());
    let outputs: Vec<String> = op.outputs().map(made).collect();
    write!(f, "{} = {}", outputs.join(", "), op_name(op))?;
    for input in op.inputs() {
        write!(f, " %{}", input.id.value())?;
    }
    writeln!(f)
}
