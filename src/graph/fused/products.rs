//! Batches of products that are one product: a linear layer on `[batch, rows, in]`, and the gradient of its weight. And
//! products that are wanted with rows and columns swapped: the gradient of a weight that is used transposed.
//!
//! burn multiplies matrix by matrix: packs the weight again for each of a batch, and makes the gradient of the weight
//! for each before it adds them. With the rows of the whole batch below each other both are one product, of the same
//! numbers but for the order of additions. A product of the swapped factors, the other way round, lies as it is read.

use std::collections::{HashMap, HashSet};

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
    /// What is a factor of a product.
    factors: HashSet<TensorId>,
    next_id: &'a mut u64,
}

/// The program with batches of products as one product each, and products as they are wanted, where that is to be seen.
/// New tensors are numbered from `next_id`.
pub(super) fn merged(items: Vec<Item>, readers: &HashMap<TensorId, usize>, next_id: &mut u64) -> Vec<Item> {
    let products = items.iter().filter_map(|item| match item {
        Item::Run(op) => matmul(op),
        Item::Output(_) => None,
    });
    let factors = products.flat_map(|product| [product.lhs.id, product.rhs.id]).collect();
    let (done, makers) = (Vec::with_capacity(items.len()), HashMap::new());
    let mut merging = Merging { items: done, makers, readers, factors, next_id };
    for item in items {
        match item {
            Item::Run(op) => {
                let merged = merging.weight_gradient(&op).or_else(|| merging.linear(&op));
                if merged.or_else(|| merging.turned(&op)).is_none() {
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

    fn tensor(&mut self, dims: &[usize], dtype: DType) -> TensorIr {
        *self.next_id += 1;
        TensorIr::uninit(TensorId::new(*self.next_id - 1), Shape::from(dims.to_vec()), dtype)
    }

    /// A tensor with all rows below each other.
    fn flat(&mut self, tensor: &TensorIr, [batch, rows, columns]: [usize; 3]) -> TensorIr {
        let out = self.tensor(&[1, batch * rows, columns], tensor.dtype);
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
        let product = self.tensor(&[1, batch * rows, gives], out.dtype);
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
        let alone = self.is_read_once(&product.out) && sum.axis == 0 && batch == batches && batch > 1;
        if !(alone && swapped && self.is_plain(&swap.input) && self.is_plain(&product.rhs)) {
            return None;
        }
        let at = self.makers.remove(&product.out.id)?;
        let input = self.flat(&swap.input, [batch, rows, takes]);
        let rhs = self.flat(&product.rhs, [batch, rows, gives]);
        let lhs = self.tensor(&[1, takes, batch * rows], input.dtype);
        self.push(build::swap_dims(input, 1, 2, lhs.clone()));
        self.push(build::matmul(lhs, rhs, sum.out.clone()));
        // Nobody reads the products of the batch any more.
        self.items[at] = None;
        Some(())
    }

    /// A product with its rows and columns swapped, if nothing else reads it, and no product the swapped one, for which
    /// it may lie in any way.
    fn turned(&mut self, op: &OperationIr) -> Option<()> {
        let swap = swap_dims(op)?;
        let last = swap.input.shape.num_dims() - 1;
        let swapped = (swap.dim1.min(swap.dim2), swap.dim1.max(swap.dim2)) == (last.checked_sub(1)?, last);
        if !swapped || self.factors.contains(&swap.out.id) || !self.is_read_once(&swap.input) {
            return None;
        }
        // Perhaps under other dims, of which those of rows and columns stay.
        let (mut made, mut between) = (swap.input.clone(), None);
        if let Some(view) = self.maker(&made).and_then(reshape) {
            between = self.makers.get(&made.id).copied();
            made = view.input.clone();
        }
        let MatmulOpIr { lhs, rhs, out } = matmul(self.maker(&made)?)?.clone();
        let [batch @ .., rows, columns] = out.shape.as_slice() else { return None };
        let fits = batch.iter().all(|size| *size == 1) && swap.input.shape.as_slice().ends_with(&[*rows, *columns]);
        let floats = matches!(out.dtype, DType::F32 | DType::F64) && swap.input.shape.num_elements() == rows * columns;
        if !(fits && floats && self.is_read_once(&out)) {
            return None;
        }
        let at = self.makers.remove(&out.id)?;
        let [left, right] = [&rhs, &lhs].map(|factor| {
            let turned = self.tensor(&swapped_dims(factor), factor.dtype);
            let last = factor.shape.num_dims() - 1;
            self.push(build::swap_dims(factor.clone(), last - 1, last, turned.clone()));
            turned
        });
        let product = self.tensor(&swapped_dims(&out), out.dtype);
        self.push(build::matmul(left, right, product.clone()));
        self.push(build::reshape(product, swap.out.clone()));
        for place in [Some(at), between].into_iter().flatten() {
            self.items[place] = None;
        }
        Some(())
    }

    fn is_read_once(&self, tensor: &TensorIr) -> bool {
        self.readers.get(&tensor.id) == Some(&1)
    }
}

/// The dims of a matrix whose rows and columns are swapped.
fn swapped_dims(tensor: &TensorIr) -> Vec<usize> {
    let mut dims = tensor.shape.to_vec();
    let last = dims.len() - 1;
    dims.swap(last - 1, last);
    dims
}

/// The dims of a batch of matrices of floats that add up alike in any order of blocks.
fn dims(tensor: &TensorIr) -> Option<[usize; 3]> {
    let dims = tensor.shape.as_slice().try_into().ok()?;
    matches!(tensor.dtype, DType::F32 | DType::F64).then_some(dims)
}
