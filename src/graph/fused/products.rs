//! Batches of products that are one product: a linear layer on `[batch, rows, in]`, and the gradient of its weight.
//!
//! burn multiplies matrix by matrix: packs the weight again for each of a batch, and makes the gradient of the weight
//! for each before it adds them. With the rows of the whole batch below each other both are one product, of the same
//! numbers but for the order of additions.

use std::collections::HashMap;

use burn::tensor::{DType, Shape};
use burn_ir::{MatmulOpIr, OperationIr, TensorId, TensorIr};

use super::super::instruction::Item;
use super::super::operation::{Class, build, matmul, reshape, sum_dim, swap_dims};

/// What a program has made so far.
struct Merging<'a> {
    /// None where nobody reads any more what was made.
    items: Vec<Option<Item>>,
    makers: HashMap<TensorId, usize>,
    readers: &'a HashMap<TensorId, usize>,
    next_id: &'a mut u64,
}

/// The program with batches of products as one product each, where that is to be seen. New tensors are numbered from
/// `next_id`.
pub(super) fn merged(items: Vec<Item>, readers: &HashMap<TensorId, usize>, next_id: &mut u64) -> Vec<Item> {
    let mut merging = Merging { items: Vec::with_capacity(items.len()), makers: HashMap::new(), readers, next_id };
    for item in items {
        match item {
            Item::Run(op) => {
                if merging.weight_gradient(&op).or_else(|| merging.linear(&op)).is_none() {
                    merging.push(*op);
                }
            }
            item => merging.items.push(Some(item)),
        }
    }
    merging.items.into_iter().flatten().collect()
}

impl Merging<'_> {
    fn push(&mut self, op: OperationIr) {
        self.makers.extend(op.outputs().map(|out| (out.id, self.items.len())));
        self.items.push(Some(Item::Run(Box::new(op))));
    }

    fn maker(&self, tensor: &TensorIr) -> Option<&OperationIr> {
        match self.items.get(*self.makers.get(&tensor.id)?)? {
            Some(Item::Run(op)) => Some(op),
            Some(Item::Output(_)) | None => None,
        }
    }

    /// Whether the elements of a tensor lie one after the other, so that it has other dims without a copy: unless it is
    /// a view.
    fn is_plain(&self, tensor: &TensorIr) -> bool {
        // Other dims need no copy but of a view, which then is none any more.
        let moved = |op: &OperationIr| {
            reshape(op).is_none() && matches!(Class::of(op), Class::View | Class::Slice | Class::Reorder)
        };
        !self.maker(tensor).is_some_and(moved)
    }

    fn tensor(&mut self, dims: [usize; 3], dtype: DType) -> TensorIr {
        *self.next_id += 1;
        TensorIr::uninit(TensorId::new(*self.next_id - 1), Shape::from(dims), dtype)
    }

    /// A tensor with all rows below each other.
    fn flat(&mut self, tensor: &TensorIr, [batch, rows, columns]: [usize; 3]) -> TensorIr {
        let out = self.tensor([1, batch * rows, columns], tensor.dtype);
        self.push(build::reshape(tensor.clone(), out.clone()));
        out
    }

    /// `[batch, rows, in] x [1, in, out]`.
    fn linear(&mut self, op: &OperationIr) -> Option<()> {
        let MatmulOpIr { lhs, rhs, out } = matmul(op)?;
        let ([batch, rows, takes], [1, _, gives]) = (dims(lhs)?, dims(rhs)?) else { return None };
        if batch == 1 || !self.is_plain(lhs) {
            return None;
        }
        let lhs = self.flat(lhs, [batch, rows, takes]);
        let product = self.tensor([1, batch * rows, gives], out.dtype);
        self.push(build::matmul(lhs, rhs.clone(), product.clone()));
        self.push(build::reshape(product, out.clone()));
        Some(())
    }

    /// The sum over the batch of `[batch, in, rows] x [batch, rows, out]`, of which the first is the second of a swap
    /// of dims.
    fn weight_gradient(&mut self, op: &OperationIr) -> Option<()> {
        let sum = sum_dim(op)?;
        let product = matmul(self.maker(&sum.input)?)?.clone();
        let [batch, rows, gives] = dims(&product.rhs)?;
        let swap = swap_dims(self.maker(&product.lhs)?)?.clone();
        let [batches, _, takes] = dims(&swap.input)?;
        let swapped = (swap.dim1.min(swap.dim2), swap.dim1.max(swap.dim2)) == (1, 2);
        let alone = self.readers.get(&product.out.id) == Some(&1) && sum.axis == 0 && batch == batches && batch > 1;
        if !(alone && swapped && self.is_plain(&swap.input) && self.is_plain(&product.rhs)) {
            return None;
        }
        let at = self.makers.remove(&product.out.id)?;
        let input = self.flat(&swap.input, [batch, rows, takes]);
        let rhs = self.flat(&product.rhs, [batch, rows, gives]);
        let lhs = self.tensor([1, takes, batch * rows], input.dtype);
        self.push(build::swap_dims(input, 1, 2, lhs.clone()));
        self.push(build::matmul(lhs, rhs, sum.out.clone()));
        // Nobody reads the products of the batch any more.
        self.items[at] = None;
        Some(())
    }
}

/// The dims of a batch of matrices of floats that add up alike in any order of blocks.
fn dims(tensor: &TensorIr) -> Option<[usize; 3]> {
    let dims = tensor.shape.as_slice().try_into().ok()?;
    matches!(tensor.dtype, DType::F32 | DType::F64).then_some(dims)
}
