//! Restores the dims of linear layers that burn computes on flattened rows.
//!
//! Forward where the leading dims of the input are small, and backward always, burn makes one dim of them for a product
//! and takes it apart behind it. A split of any but the first cannot follow through that. As one operation, which burn
//! flattens again on what each rank has, it can.

use std::collections::{HashMap, HashSet};

use burn::tensor::Shape;
use burn_ir::{BinaryOpIr, MatmulOpIr, OperationIr, ShapeOpIr, TensorId, TensorIr};

use crate::graph::StepGraph;
use crate::graph::operation::{build, matmul, reshape, sum, sum_dim, swap_dims};
use crate::graph::step::Uses;

/// The step with linear layers and their gradients on dims as they were.
pub(super) fn unflattened(graph: &StepGraph) -> StepGraph {
    let results = graph.results().map(|result| result.id).collect();
    let find = FindFlat { operations: &graph.operations, uses: Uses::of(&graph.operations), results };
    let found = (0..graph.operations.len()).filter_map(|place| find.flat(place).map(|flat| (place, flat)));
    let found: Vec<(usize, Flat)> = found.collect();
    let gone: HashSet<usize> = found.iter().flat_map(|(last, flat)| flat.instead_of(*last)).collect();
    let found: HashMap<usize, Flat> = found.into_iter().map(|(last, flat)| (flat.place(last), flat)).collect();

    let mut local = graph.clone();
    local.operations.clear();
    local.forward_len = 0;
    for (place, op) in graph.operations.iter().enumerate() {
        match found.get(&place) {
            Some(flat) => flat.run(&mut local),
            None if gone.contains(&place) => {}
            None => local.operations.push(op.clone()),
        }
        if place < graph.forward_len {
            local.forward_len = local.operations.len();
        }
    }
    local
}

/// What is computed on flattened rows, and the tensors, none of them flat, that it is computed from.
#[derive(Clone)]
enum Flat {
    /// A product, and what is added to each of its rows.
    Linear {
        x: TensorIr,
        weight: TensorIr,
        row: Option<TensorIr>,
        out: TensorIr,
        /// The flat product and the flat sum among the operations.
        within: Vec<usize>,
    },
    WeightGradient {
        x: TensorIr,
        output_grad: TensorIr,
        out: TensorIr,
    },
    BiasGradient {
        output_grad: TensorIr,
        out: TensorIr,
    },
}

impl Flat {
    /// The places of the operations that it takes the place of, given the last of them.
    fn instead_of(&self, last: usize) -> Vec<usize> {
        match self {
            Self::Linear { within, .. } => [within.as_slice(), &[last]].concat(),
            _ => vec![last],
        }
    }

    /// Where it is to stand: a product with nothing added, as early as before.
    fn place(&self, last: usize) -> usize {
        match self {
            Self::Linear { row: None, within, .. } => within.first().copied().unwrap_or(last),
            _ => last,
        }
    }

    fn run(&self, graph: &mut StepGraph) {
        match self.clone() {
            Self::Linear { x, weight, row: None, out, .. } => {
                graph.operations.push(build::linear(x, weight, out));
            }
            Self::Linear { x, weight, row: Some(row), out, .. } => {
                let product = TensorIr::uninit(graph.fresh_id(), out.shape.clone(), out.dtype);
                let mut dims = vec![1; out.shape.num_dims()];
                dims[out.shape.num_dims() - 1] = row.shape[1];
                let rhs = reshaped(graph, row, dims);
                graph.operations.extend([build::linear(x, weight, product.clone()), build::add(product, rhs, out)]);
            }
            Self::WeightGradient { x, output_grad, out } => {
                graph.operations.push(build::linear_weight_gradient(x, output_grad, out));
            }
            Self::BiasGradient { output_grad, out } => {
                let bias = TensorIr::uninit(graph.fresh_id(), Shape::from([out.shape[1]]), out.dtype);
                graph
                    .operations
                    .extend([build::linear_bias_gradient(output_grad, bias.clone()), build::reshape(bias, out)]);
            }
        }
    }
}

struct FindFlat<'a> {
    operations: &'a [OperationIr],
    uses: Uses,
    results: HashSet<TensorId>,
}

impl FindFlat<'_> {
    /// What the operation at `place` ends.
    fn flat(&self, place: usize) -> Option<Flat> {
        let op = &self.operations[place];
        if let Some(op) = float_reshape(op) {
            return self.linear(place, op);
        }
        if let Some(MatmulOpIr { lhs, rhs, out }) = matmul(op) {
            let swap = swap_dims(self.maker(lhs)?)?;
            let (x, output_grad) = (self.unflat(&swap.input)?, self.unflat(rhs)?);
            let alike = leading(x) == leading(output_grad) && swap.dim1 != swap.dim2;
            return alike.then(|| Flat::WeightGradient {
                x: x.clone(),
                output_grad: output_grad.clone(),
                out: out.clone(),
            });
        }
        let op = sum_dim(op).filter(|op| op.axis == 0)?;
        let output_grad = self.unflat(&op.input)?.clone();
        Some(Flat::BiasGradient { output_grad, out: op.out.clone() })
    }

    /// A linear layer that ends in this reshape.
    fn linear(&self, place: usize, ShapeOpIr { input: flat, out }: &ShapeOpIr) -> Option<Flat> {
        let maker = self.only_for(flat, place)?;
        let (product, row, mut within) = match sum(&self.operations[maker]) {
            Some(BinaryOpIr { lhs, rhs, .. }) if rhs.shape.num_dims() == 2 && rhs.shape[0] == 1 => {
                (self.only_for(lhs, maker)?, Some(rhs.clone()), vec![maker])
            }
            _ => (maker, None, Vec::new()),
        };
        let op = matmul(&self.operations[product])?;
        let x = self.unflat(&op.lhs)?.clone();
        within.push(product);
        (leading(&x) == leading(out)).then(|| Flat::Linear { x, weight: op.rhs.clone(), row, out: out.clone(), within })
    }

    /// What a tensor of two dims is with the first of them as it was before it was flattened.
    fn unflat(&self, flat: &TensorIr) -> Option<&TensorIr> {
        let ShapeOpIr { input, out } = float_reshape(self.maker(flat)?)?;
        let (from, to) = (input.shape.as_slice(), out.shape.as_slice());
        (from.len() > 2 && to.len() == 2 && from.last() == to.last()).then_some(input)
    }

    fn maker(&self, tensor: &TensorIr) -> Option<&OperationIr> {
        self.uses.maker(tensor.id).map(|place| &self.operations[place])
    }

    /// Where a tensor is made that nothing reads but the operation at `reader`.
    fn only_for(&self, tensor: &TensorIr, reader: usize) -> Option<usize> {
        let alone = *self.uses.readers(tensor.id) == [reader] && !self.results.contains(&tensor.id);
        alone.then(|| self.uses.maker(tensor.id))?
    }
}

fn float_reshape(op: &OperationIr) -> Option<&ShapeOpIr> {
    reshape(op).filter(|op| op.out.dtype.is_float())
}

/// All dims but the last.
fn leading(tensor: &TensorIr) -> &[usize] {
    let dims = tensor.shape.as_slice();
    &dims[..dims.len().saturating_sub(1)]
}

fn reshaped(graph: &mut StepGraph, input: TensorIr, dims: Vec<usize>) -> TensorIr {
    let out = TensorIr::uninit(graph.fresh_id(), Shape::from(dims), input.dtype);
    graph.operations.push(build::reshape(input, out.clone()));
    out
}
