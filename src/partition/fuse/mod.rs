//! Fuses products with the collectives around them.

mod find;

use std::collections::{HashMap, HashSet};

use burn::tensor::Shape;
use burn_ir::{CustomOpIr, OperationIr, TensorId, TensorIr};

use super::products::FusedProduct;
use crate::graph::StepGraph;
use crate::graph::operation::build;
use find::{FindProducts, FusableProducts};

/// Makes one operation of each product, or sum of products, that nothing but an all-reduce or a reduce-scatter reads,
/// and of each all-gather with the products that read it. Returns what was made, in order.
///
/// These operations run the chunked products of [`tensor_parallel::functional`](crate::tensor_parallel::functional): as
/// the explicit layers do, in the forward of a layer that is split by rows, and in the backward of one that is split by
/// columns, where the gradients of several such layers on one input are added up in the product. Products that make
/// gradients of parameters stay: those are reduced [in buckets](super::bucket_reductions). Run it after all partitions;
/// [`overlap`](super::overlap) then has sums travel beside what does not wait for them.
pub fn fuse_products(graph: &mut StepGraph) -> Vec<FusedProduct> {
    let found = FindProducts::new(graph).all();
    let (mut fused, mut next) = (Vec::with_capacity(found.len()), graph.next_id);
    let mut fresh = || {
        next += 1;
        TensorId::new(next - 1)
    };
    let mut rewrite = GraphEdits::default();
    for found in found {
        fused.push(found.report());
        rewrite.add(found, &mut fresh);
    }
    graph.next_id = next;
    let (mut operations, mut forward_len) = (Vec::with_capacity(graph.operations.len()), 0);
    for (place, op) in std::mem::take(&mut graph.operations).into_iter().enumerate() {
        operations.extend(rewrite.before.remove(&place).unwrap_or_default());
        if !rewrite.gone.contains(&place) && !rewrite.hoisted.contains(&place) {
            operations.push(op);
        }
        if place < graph.forward_len {
            forward_len = operations.len();
        }
    }
    (graph.operations, graph.forward_len) = (operations, forward_len);
    fused
}

/// What is put where, and what is taken out.
#[derive(Default)]
struct GraphEdits {
    before: HashMap<usize, Vec<OperationIr>>,
    gone: HashSet<usize>,
    hoisted: HashSet<usize>,
}

impl GraphEdits {
    fn add(&mut self, found: FusableProducts, fresh: &mut dyn FnMut() -> TensorId) {
        self.gone.extend(&found.gone);
        let before = self.before.entry(found.at).or_default();
        for (place, view) in found.hoisted {
            if self.hoisted.insert(place) {
                before.push(view);
            }
        }
        let mut inputs = if found.kind.runs_async() { Vec::new() } else { vec![found.from] };
        let mut outputs = if found.kind.runs_async() { vec![found.to.clone()] } else { Vec::new() };
        for product in found.products {
            let right = if product.transposed { transposed(product.right, before, fresh) } else { product.right };
            match found.kind.runs_async() {
                true => inputs.extend([product.left, right]),
                false => {
                    inputs.push(right);
                    outputs.push(product.out);
                }
            }
        }
        if found.keeps_whole {
            outputs.push(found.to);
        }
        let op: CustomOpIr = found.kind.operation(&found.axis, found.dim, inputs, outputs);
        before.push(OperationIr::Custom(op));
    }
}

/// The transposed factor.
fn transposed(right: TensorIr, before: &mut Vec<OperationIr>, fresh: &mut dyn FnMut() -> TensorId) -> TensorIr {
    let mut dims = right.shape.to_vec();
    let [dim1, dim2] = [dims.len() - 2, dims.len() - 1];
    dims.swap(dim1, dim2);
    let out = TensorIr::uninit(fresh(), Shape::from(dims), right.dtype);
    before.push(build::swap_dims(right, dim1, dim2, out.clone()));
    out
}
