//! Joins the outputs of the micro-batches of a forward pass into those of the batch.
//!
//! The pass is captured for the whole batch too, and nothing is run of that: its dims tell what has rows. A value that
//! has none is the batch's if it is a mean or a sum over what has, and nothing but a linear step behind.

use std::collections::HashSet;

use burn_ir::TensorId;

use super::stage_error;
use crate::Error;
use crate::graph::StepGraph;
use crate::graph::operation::{SumOrMean, linear_step, sum_or_mean};
use crate::tensor::PlainTensor;

/// How one output is put together.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum OutputJoin {
    /// One behind the other along the first dim.
    Rows,
    /// It depends on no input: any will do.
    Same,
    /// Added up.
    Sum,
    /// Added up, that of each size of micro-batch times its share.
    Mean(Vec<f64>),
}

impl OutputJoin {
    /// How output number `place` is put together; `parts` are the graphs of the micro-batches of each size, and `sizes`
    /// says of which size each micro-batch is.
    ///
    /// # Errors
    /// [`Error::Pipeline`] if it has no rows, and is no mean or sum over such as have.
    pub(super) fn of(whole: &StepGraph, parts: &[StepGraph], sizes: &[usize], place: usize) -> Result<Self, Error> {
        let out = &whole.outputs[place];
        let dims = |graph: &StepGraph| graph.outputs[place].shape.to_vec();
        let mut together = dims(&parts[0]);
        if let Some(first) = together.first_mut() {
            *first = sizes.iter().map(|size| dims(&parts[*size]).first().copied().unwrap_or(0)).sum();
        }
        if sizes.len() == 1 || together == out.shape.to_vec() {
            return Ok(Self::Rows);
        }
        let found = OutputValue::of(whole, out.id);
        let each: Option<Vec<OutputValue>> =
            parts.iter().map(|part| OutputValue::of(part, part.outputs[place].id)).collect();
        if let (Some(value), Some(each)) = (found, each)
            && each.iter().all(|part| part.behind == value.behind)
            && let Some(joined) = value.joined(&each, sizes)
        {
            return Ok(joined);
        }
        Err(stage_error(format!(
            "output {place} of the forward pass has dims {:?} for the whole batch, and so it has for each of {} micro-batches, from \
             which it cannot be told: give what has a row for each row of the batch, or a mean or a sum over such, with \
             nothing behind that but a factor",
            out.shape.as_slice(),
            sizes.len()
        )))
    }

    /// The output of the batch, from those of the micro-batches.
    ///
    /// # Errors
    /// Those of [`PlainTensor::cat`].
    pub(super) fn join(&self, parts: Vec<PlainTensor>, sizes: &[usize]) -> Result<PlainTensor, Error> {
        let add = |a: PlainTensor, b: PlainTensor| match a.dtype().is_float() {
            true => a.add(b),
            false => a.add_ints(b),
        };
        let added = |parts: Vec<PlainTensor>| {
            parts.into_iter().reduce(add).ok_or_else(|| stage_error("a forward pass of no micro-batches gives nothing"))
        };
        match self {
            Self::Rows => PlainTensor::cat(parts, 0),
            Self::Same => added(parts.into_iter().take(1).collect()),
            Self::Sum => added(parts),
            Self::Mean(shares) => {
                added(parts.into_iter().zip(sizes).map(|(part, size)| part.scale(shares[*size])).collect())
            }
        }
    }
}

/// What an output without rows is.
struct OutputValue {
    kind: OutputKind,
    /// The linear steps behind it.
    behind: Vec<String>,
}

#[derive(PartialEq)]
enum OutputKind {
    Same,
    /// Of so many elements.
    Sum(usize),
    Mean(usize),
}

impl OutputValue {
    fn of(graph: &StepGraph, out: TensorId) -> Option<Self> {
        let (mut id, mut behind) = (out, Vec::new());
        let maker = |id: TensorId| graph.operations.iter().find(|op| op.outputs().any(|out| out.id == id));
        loop {
            if !depends_on_inputs(graph, id) {
                return Some(Self { kind: OutputKind::Same, behind });
            }
            let op = maker(id)?;
            match sum_or_mean(op) {
                Some(SumOrMean::Sum(input)) => {
                    return Some(Self { kind: OutputKind::Sum(input.shape.num_elements()), behind });
                }
                Some(SumOrMean::Mean(input)) => {
                    return Some(Self { kind: OutputKind::Mean(input.shape.num_elements()), behind });
                }
                None => {}
            }
            let (input, name) = linear_step(op)?;
            behind.push(name);
            id = input;
        }
    }

    /// How such values of the micro-batches of each size become this one, that of the batch.
    fn joined(&self, each: &[Self], sizes: &[usize]) -> Option<OutputJoin> {
        let counts = |count: fn(&OutputKind) -> Option<usize>| {
            each.iter().map(|part| count(&part.kind)).collect::<Option<Vec<_>>>()
        };
        let all = |counts: &[usize]| sizes.iter().map(|size| counts[*size]).sum::<usize>();
        match &self.kind {
            OutputKind::Same => each.iter().all(|part| part.kind == OutputKind::Same).then_some(OutputJoin::Same),
            OutputKind::Sum(whole) => {
                let counts = counts(|kind| if let OutputKind::Sum(count) = kind { Some(*count) } else { None })?;
                (all(&counts) == *whole).then_some(OutputJoin::Sum)
            }
            OutputKind::Mean(whole) => {
                let counts = counts(|kind| if let OutputKind::Mean(count) = kind { Some(*count) } else { None })?;
                let shares = counts.iter().map(|count| *count as f64 / *whole as f64).collect();
                (all(&counts) == *whole).then_some(OutputJoin::Mean(shares))
            }
        }
    }
}

fn depends_on_inputs(graph: &StepGraph, id: TensorId) -> bool {
    let mut from: HashSet<TensorId> = graph.inputs.iter().map(|input| input.tensor.id).collect();
    for op in &graph.operations {
        if op.inputs().any(|input| from.contains(&input.id)) {
            from.extend(op.outputs().map(|out| out.id));
        }
    }
    from.contains(&id)
}
