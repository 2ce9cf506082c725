//! Batches of products that are one product: a linear layer on `[batch, rows, in]`, and the gradient of its weight.
//!
//! burn multiplies matrix by matrix: packs the weight again for each of a batch, and makes the gradient of the weight
//! for each before it adds them. With the rows of the whole batch below each other both are one product, of the same
//! numbers but for the order of additions.

use std::collections::HashMap;

use burn::tensor::{DType, Shape};
use burn_ir::{
    BaseOperationIr as Base, FloatOperationIr as Float, MatmulOpIr, NumericOperationIr as Numeric, OperationIr,
    ShapeOpIr, SwapDimsOpIr, TensorId, TensorIr,
};

use super::super::liveness::Item;
use super::super::operation::matmul;

/// What a program has made so far.
struct Merging<'a> {
    items: Vec<Item>,
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
            item => merging.items.push(item),
        }
    }
    merging.items
}

impl Merging<'_> {
    fn push(&mut self, op: OperationIr) {
        self.makers.extend(op.outputs().map(|out| (out.id, self.items.len())));
        self.items.push(Item::Run(Box::new(op)));
    }

    fn maker(&self, tensor: &TensorIr) -> Option<&OperationIr> {
        match self.items.get(*self.makers.get(&tensor.id)?)? {
            Item::Run(op) => Some(op),
            Item::Output(_) => None,
        }
    }

    /// Whether the elements of a tensor lie one after the other, so that it has other dims without a copy: unless it is
    /// a view.
    fn is_plain(&self, tensor: &TensorIr) -> bool {
        let moved = |op: &OperationIr| match op {
            OperationIr::BaseFloat(Base::Reshape(op)) => !self.is_plain(&op.input),
            OperationIr::BaseFloat(
                Base::SwapDims(_)
                | Base::Permute(_)
                | Base::Expand(_)
                | Base::Slice(_)
                | Base::Unfold(_)
                | Base::Flip(_),
            ) => true,
            _ => false,
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
        self.push(OperationIr::BaseFloat(Base::Reshape(ShapeOpIr { input: tensor.clone(), out: out.clone() })));
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
        let flat = MatmulOpIr { lhs, rhs: rhs.clone(), out: product.clone() };
        self.push(OperationIr::Float(out.dtype, Float::Matmul(flat)));
        self.push(OperationIr::BaseFloat(Base::Reshape(ShapeOpIr { input: product, out: out.clone() })));
        Some(())
    }

    /// The sum over the batch of `[batch, in, rows] x [batch, rows, out]`, of which the first is the second of a swap
    /// of dims.
    fn weight_gradient(&mut self, op: &OperationIr) -> Option<()> {
        let OperationIr::NumericFloat(_, Numeric::SumDim(sum)) = op else { return None };
        let dtype = sum.out.dtype;
        let product = matmul(self.maker(&sum.input)?)?.clone();
        let [batch, rows, gives] = dims(&product.rhs)?;
        let OperationIr::BaseFloat(Base::SwapDims(swap)) = self.maker(&product.lhs)? else { return None };
        let swap = swap.clone();
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
        let swap = SwapDimsOpIr { input, out: lhs.clone(), dim1: 1, dim2: 2 };
        self.push(OperationIr::BaseFloat(Base::SwapDims(swap)));
        let whole = MatmulOpIr { lhs, rhs, out: sum.out.clone() };
        self.push(OperationIr::Float(dtype, Float::Matmul(whole)));
        // Nobody reads the products of the batch any more.
        self.items.remove(at);
        self.makers.values_mut().filter(|place| **place > at).for_each(|place| *place -= 1);
        Some(())
    }
}

/// The dims of a batch of matrices of floats that add up alike in any order of blocks.
fn dims(tensor: &TensorIr) -> Option<[usize; 3]> {
    let dims = tensor.shape.as_slice().try_into().ok()?;
    matches!(tensor.dtype, DType::F32 | DType::F64).then_some(dims)
}
