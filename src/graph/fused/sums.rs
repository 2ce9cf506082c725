//! Gradients of rows that are added to another gradient in place: an embedding whose weight the output layer has too.
//!
//! burn makes a gradient of the whole weight, of which all rows but a few are zeros, and adds the other to it. The rows
//! are added to the other one here, which nothing else reads.

use std::collections::HashMap;

use burn::tensor::{DType, Shape};
use burn_ir::{OperationIr, TensorId, TensorIr};

use super::super::instruction::Item;
use super::super::operation::{build, embedding_gradient, sum};

/// The program with the gradients of embeddings added in place. New tensors are numbered from `next_id`.
pub(super) fn rows_added(items: Vec<Item>, readers: &HashMap<TensorId, usize>, next_id: &mut u64) -> Vec<Item> {
    let mut gradients: HashMap<TensorId, usize> = HashMap::new();
    let mut done: Vec<Option<Item>> = Vec::with_capacity(items.len());
    for item in items {
        let Item::Run(op) = item else {
            done.push(Some(item));
            continue;
        };
        let added = rows_of(&op, readers, &gradients, &done);
        if let Some((at, added)) = added {
            done[at] = None;
            let operations = added.operations(next_id);
            done.extend(operations.map(|op| Some(Item::Run(Box::new(op)))));
            continue;
        }
        if embedding_gradient(&op).is_some() {
            gradients.extend(op.outputs().map(|out| (out.id, done.len())));
        }
        done.push(Some(Item::Run(op)));
    }
    done.into_iter().flatten().collect()
}

/// The rows of a gradient, for what they are added to.
struct GradientRows {
    to: TensorIr,
    indices: TensorIr,
    rows: TensorIr,
    out: TensorIr,
}

/// What a sum adds, if that is the gradient of an embedding, and the place of that.
fn rows_of(
    op: &OperationIr,
    readers: &HashMap<TensorId, usize>,
    gradients: &HashMap<TensorId, usize>,
    done: &[Option<Item>],
) -> Option<(usize, GradientRows)> {
    let sum = sum(op)?;
    let once = |tensor: &TensorIr| readers.get(&tensor.id) == Some(&1);
    let exact = matches!(sum.out.dtype, DType::F32 | DType::F64) && sum.lhs.shape == sum.rhs.shape;
    if !(exact && once(&sum.lhs) && once(&sum.rhs)) {
        return None;
    }
    let (gradient, to) = match gradients.contains_key(&sum.lhs.id) {
        true => (&sum.lhs, &sum.rhs),
        false => (&sum.rhs, &sum.lhs),
    };
    let at = *gradients.get(&gradient.id)?;
    let Some(Item::Run(made)) = &done[at] else { return None };
    let made = embedding_gradient(made)?;
    let (indices, rows) = (made.indices.clone(), made.out_grad.clone());
    Some((at, GradientRows { to: to.clone(), indices, rows, out: sum.out.clone() }))
}

impl GradientRows {
    fn operations(self, next_id: &mut u64) -> impl Iterator<Item = OperationIr> {
        let Self { to, indices, rows, out } = self;
        let mut flat = |of: &TensorIr, dims: &[usize]| {
            *next_id += 1;
            TensorIr::uninit(TensorId::new(*next_id - 1), Shape::from(dims.to_vec()), of.dtype)
        };
        let number = indices.shape.num_elements();
        let (list, matrix) = (flat(&indices, &[number]), flat(&rows, &[number, to.shape[1]]));
        let views = [build::reshape(indices, list.clone()), build::reshape(rows, matrix.clone())];
        views.into_iter().chain([build::add_rows(to, list, matrix, out)])
    }
}
