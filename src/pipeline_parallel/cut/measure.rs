//! Measures operations one by one.

use std::collections::HashMap;
use std::time::Instant;

use burn::tensor::{Device, TensorData};
use burn_ir::{IrVisitorMut, OperationIr, TensorId, TensorIr, TensorStatus};

use super::cost::operation_cost;
use crate::Error;
use crate::error::catch_quietly;
use crate::graph::interpret::Interpreter;
use crate::graph::operation::is_view;
use crate::graph::{CustomOps, StepGraph};

/// Seconds that each operation of a step takes on a device: what [`Cut::Measured`](super::Cut::Measured) takes.
///
/// Every operation runs alone, `runs` times after once for caches, on tensors of its shapes and dtypes; the fastest run
/// counts. Operations that are the same up to the names of their tensors are measured once. Neither parameters nor
/// inputs are needed, and no more memory than one operation takes: so a model can be measured that this rank could not
/// hold. Views take no time. Operations that cannot run alone, as those of [`CustomOps`](crate::graph::CustomOps),
/// above all collectives, are counted, at the pace of those that were measured.
///
/// # Errors
/// [`Error::Graph`] if no graph can run on the device.
pub fn measure_operations(graph: &StepGraph, device: &Device, runs: usize) -> Result<Vec<f64>, Error> {
    let mut known: HashMap<String, Option<f64>> = HashMap::new();
    let mut measured: Vec<Option<f64>> = Vec::with_capacity(graph.operations.len());
    for op in &graph.operations {
        let op = anonymous(op);
        let name = format!("{op:?}");
        let time = match known.get(&name) {
            Some(time) => *time,
            None => measure(&op, device, runs.max(1))?,
        };
        known.insert(name, time);
        measured.push(time);
    }
    let counted: Vec<f64> = graph.operations.iter().map(|op| operation_cost(op) as f64).collect();
    let (mut seconds, mut cost) = (0.0, 0.0);
    for (time, counted) in measured.iter().zip(&counted) {
        if let Some(time) = time.filter(|_| *counted > 0.0) {
            seconds += time;
            cost += counted;
        }
    }
    let pace = if cost > 0.0 { seconds / cost } else { 1.0 };
    Ok(measured.into_iter().zip(counted).map(|(time, counted)| time.unwrap_or(counted * pace)).collect())
}

/// The operation with tensors named in the order in which they occur, none of which it consumes.
fn anonymous(op: &OperationIr) -> OperationIr {
    let outputs: Vec<TensorId> = op.outputs().map(|out| out.id).collect();
    let mut op = op.clone();
    op.visit_mut(&mut Renumber { outputs, seen: Vec::new() });
    op
}

struct Renumber {
    outputs: Vec<TensorId>,
    seen: Vec<TensorId>,
}

impl IrVisitorMut for Renumber {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        let made = self.outputs.contains(&tensor.id);
        let place = self.seen.iter().position(|seen| *seen == tensor.id).unwrap_or_else(|| {
            self.seen.push(tensor.id);
            self.seen.len() - 1
        });
        tensor.id = TensorId::new(place as u64);
        tensor.status = if made { TensorStatus::NotInit } else { TensorStatus::ReadOnly };
    }
}

fn measure(op: &OperationIr, device: &Device, runs: usize) -> Result<Option<f64>, Error> {
    match op {
        OperationIr::Custom(_) => return Ok(None),
        _ if is_view(op) => return Ok(Some(0.0)),
        _ => {}
    }
    // Integers may be indices, of which 0 is always one, or divisors, of which it is none.
    for int in [0, 1] {
        let mut tensors = Interpreter::new(device, &CustomOps::new())?;
        if let Ok(time) = catch_quietly(|_| true, || fastest(op, &mut tensors, int, runs)) {
            return time.map(Some);
        }
    }
    Ok(None)
}

fn fastest(op: &OperationIr, tensors: &mut Interpreter, int: i64, runs: usize) -> Result<f64, Error> {
    for input in op.inputs() {
        tensors.bind_data(input.id, filled(input, int));
    }
    let device = tensors.device().clone();
    let mut best = f64::INFINITY;
    for run in 0..=runs {
        let began = Instant::now();
        tensors.run(op)?;
        // Other devices than the CPU run behind the host. One that cannot say when it is done is timed without.
        let _ = device.sync();
        let time = began.elapsed().as_secs_f64();
        for out in op.outputs() {
            tensors.free(out);
        }
        if run > 0 {
            best = best.min(time);
        }
    }
    Ok(best)
}

/// A tensor of halves, of one integer, or of what is false.
fn filled(tensor: &TensorIr, int: i64) -> TensorData {
    let shape = tensor.shape.to_vec();
    let elements = tensor.shape.num_elements();
    if tensor.dtype.is_bool() {
        TensorData::new(vec![false; elements], shape).convert_dtype(tensor.dtype)
    } else if tensor.dtype.is_float() {
        TensorData::new(vec![0.5f32; elements], shape).convert_dtype(tensor.dtype)
    } else {
        TensorData::new(vec![int; elements], shape).convert_dtype(tensor.dtype)
    }
}
