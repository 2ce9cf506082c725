//! A graph as text, a line for each operation.

use std::fmt;

use burn_ir::{OperationIr, ScalarIr, TensorIr};

use super::operation::op_name;
use super::step::StepGraph;

impl fmt::Display for StepGraph {
    /// One line for each operation: its outputs with their dims, its name, its inputs. Of a custom operation there are
    /// the scalars too, but for the last, which may differ from rank to rank.
    ///
    /// ```text
    /// %17 [4, 5, 24] = Module.Linear %12 %1 %2
    /// %18 [4, 10, 24] = tp.all_gather(1) %17
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
    write!(f, "{} = {}", outputs.join(", "), name(op))?;
    for input in op.inputs() {
        write!(f, " %{}", input.id.value())?;
    }
    writeln!(f)
}

fn name(op: &OperationIr) -> String {
    let OperationIr::Custom(op) = op else { return op_name(op).replace("operation ", "") };
    let scalar = |scalar: &ScalarIr| match scalar {
        ScalarIr::Float(value) => value.to_string(),
        ScalarIr::Int(value) => value.to_string(),
        ScalarIr::UInt(value) => value.to_string(),
        ScalarIr::Bool(value) => value.to_string(),
    };
    match op.scalars.split_last() {
        Some((_, said)) if !said.is_empty() => {
            format!("{}({})", op.id, said.iter().map(scalar).collect::<Vec<_>>().join(", "))
        }
        _ => op.id.clone(),
    }
}
