//! A product and the collective around it as one operation.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn::tensor::Shape;
use burn_ir::{
    BaseOperationIr as Base, CustomOpIr, FloatOperationIr, ModuleOperationIr as Module, OperationIr, SwapDimsOpIr,
    TensorId, TensorIr,
};

use super::collectives::{CollectiveKind, CollectiveOp, dim};
use super::fold::ends;
use super::products::{FusedProduct, ProductKind};
use super::rules::{as_sum, only_moves};
use crate::graph::StepGraph;
use crate::graph::step::Uses;
use crate::matmul::multiply;

/// Makes one operation of each product, or sum of products, that nothing but an all-reduce or a reduce-scatter reads, and of
/// each all-gather with the products that read it. Returns what was made, in order.
///
/// These operations run the chunked products of [`tensor_parallel::matmul`](crate::tensor_parallel::matmul): as the explicit
/// layers do, in the forward of a layer that is split by rows, and in the backward of one that is split by columns, where the
/// gradients of several such layers on one input are added up in the product. Products that make gradients of parameters stay:
/// those are reduced [in buckets](super::fold_reductions). Run it after all partitions; [`overlap`](super::overlap) then has
/// sums travel beside what does not wait for them.
pub fn fuse_products(graph: &mut StepGraph) -> Vec<FusedProduct> {
    let found = Find::new(graph).all();
    let (mut fused, mut next) = (Vec::with_capacity(found.len()), graph.next_id);
    let mut fresh = || {
        next += 1;
        TensorId::new(next - 1)
    };
    let mut rewrite = Rewrite::default();
    for found in found {
        fused.push(found.report.clone());
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

/// A product as it stands in a graph.
struct Product {
    place: usize,
    left: TensorIr,
    right: TensorIr,
    /// Whether it is the transposed right factor that is multiplied.
    turned: bool,
    out: TensorIr,
}

impl Product {
    fn of(place: usize, op: &OperationIr) -> Option<Self> {
        let (left, right, turned, out) = match op {
            OperationIr::Float(_, FloatOperationIr::Matmul(op)) => (&op.lhs, &op.rhs, false, &op.out),
            OperationIr::Module(Module::Linear(op)) if op.bias.is_none() => (&op.x, &op.weight, false, &op.out),
            OperationIr::Module(Module::LinearXBackward(op)) => (&op.output_grad, &op.weight, true, &op.out),
            _ => return None,
        };
        let (rank, dims) = (left.shape.num_dims(), right.shape.as_slice());
        let fits = rank >= 2
            && out.shape.num_dims() == rank
            && left.shape.as_slice()[..rank - 1] == out.shape.as_slice()[..rank - 1]
            && dims.len() >= 2
            && dims[..dims.len() - 2].iter().all(|size| *size == 1)
            && left.dtype == right.dtype
            && multiply(left.dtype)
            && left.id != right.id;
        let (left, right, out) = (left.clone(), right.clone(), out.clone());
        fits.then_some(Self { place, left, right, turned, out })
    }
}

/// What becomes one operation.
struct Found {
    /// Where it runs: before what stands here now.
    at: usize,
    kind: ProductKind,
    axis: String,
    dim: Option<usize>,
    products: Vec<Product>,
    /// What is reduced or gathered, and what it becomes.
    from: TensorIr,
    to: TensorIr,
    /// Whether the gathered left factor is read by others.
    keeps_whole: bool,
    /// Views of the right factors that are made later, and so move up.
    hoisted: Vec<(usize, OperationIr)>,
    /// What is not needed any more.
    gone: Vec<usize>,
    report: FusedProduct,
}

struct Find<'a> {
    graph: &'a StepGraph,
    uses: Uses,
    results: HashSet<TensorId>,
    gradients: HashSet<TensorId>,
}

impl<'a> Find<'a> {
    fn new(graph: &'a StepGraph) -> Self {
        let gradients = graph.params.iter().filter_map(|param| param.gradient.as_ref()).map(|gradient| gradient.id);
        Self {
            graph,
            uses: Uses::of(&graph.operations),
            results: graph.results().map(|result| result.id).collect(),
            gradients: gradients.collect(),
        }
    }

    /// By the places where they are to run, so that a view that several read moves up to the first.
    fn all(&self) -> Vec<Found> {
        let mut found = Vec::new();
        let mut taken: HashSet<usize> = HashSet::new();
        for (place, op) in self.graph.operations.iter().enumerate() {
            let Some((collective, op)) = CollectiveOp::of(op) else { continue };
            let ([input], [output]) = (op.inputs.as_slice(), op.outputs.as_slice()) else { continue };
            let one = match collective.kind {
                CollectiveKind::AllReduce => self.sum(place, collective, None, input, output),
                CollectiveKind::ReduceScatter => {
                    dim(op, 0).ok().and_then(|dim| self.sum(place, collective, Some(dim), input, output))
                }
                CollectiveKind::AllGather => {
                    dim(op, 0).ok().and_then(|dim| self.gather(place, collective, dim, input, output))
                }
                _ => None,
            };
            // A product between two collectives goes with the first.
            if let Some(one) = one.filter(|one| one.products.iter().all(|product| !taken.contains(&product.place))) {
                taken.extend(one.products.iter().map(|product| product.place));
                found.push(one);
            }
        }
        found.sort_by_key(|found| found.at);
        found
    }

    fn op(&self, place: usize) -> &'a OperationIr {
        &self.graph.operations[place]
    }

    fn is_forward(&self, place: usize) -> bool {
        place < self.graph.forward_len
    }

    /// The operation that makes a tensor which one other reads and nobody else, in the pass of that.
    fn sole_maker(&self, tensor: TensorId, reader: usize) -> Option<usize> {
        let maker = self.uses.maker(tensor)?;
        let alone = self.uses.readers(tensor) == [reader] && !self.results.contains(&tensor);
        (alone && self.is_forward(maker) == self.is_forward(reader)).then_some(maker)
    }

    fn sum(
        &self,
        place: usize,
        CollectiveOp { axis, .. }: CollectiveOp<'_>,
        dim: Option<usize>,
        input: &TensorIr,
        output: &TensorIr,
    ) -> Option<Found> {
        if ends(self.graph, &self.uses, &self.gradients, axis, output.id) {
            return None;
        }
        let (mut products, mut gone) = (Vec::new(), vec![place]);
        // Rows may be counted in any way as long as all are summed; it is otherwise along a dim.
        let mut within = (input, place);
        while let (None, Some(maker)) = (dim, self.sole_maker(within.0.id, within.1))
            && let OperationIr::BaseFloat(Base::Reshape(view)) = self.op(maker)
        {
            gone.push(maker);
            within = (&view.input, maker);
        }
        self.terms(within.0, within.1, dim, &mut products, &mut gone)?;
        let (first, rank) = (products.first()?, input.shape.num_dims());
        let leading = |product: &Product| product.left.shape.as_slice()[..product.left.shape.num_dims() - 1].to_vec();
        if let Some(dim) = dim
            && !(dim + 1 < rank && products.iter().all(|product| leading(product) == leading(first)))
        {
            return None;
        }
        let lefts = products.iter().map(|product| &product.left);
        let ready = lefts.filter_map(|left| self.uses.maker(left.id)).map(|maker| maker + 1).max().unwrap_or(0);
        let kind = if dim.is_some() { ProductKind::ReduceScatter } else { ProductKind::AllReduce };
        self.found(place, kind, axis, dim, products, ready, (input, output), false, gone)
    }

    /// The products that a tensor is the sum of.
    fn terms(
        &self,
        tensor: &TensorIr,
        reader: usize,
        dim: Option<usize>,
        products: &mut Vec<Product>,
        gone: &mut Vec<usize>,
    ) -> Option<()> {
        let maker = self.sole_maker(tensor.id, reader)?;
        gone.push(maker);
        let op = self.op(maker);
        if let Some(product) = Product::of(maker, op) {
            products.push(product);
            return Some(());
        }
        if let Some((lhs, rhs, out)) = as_sum(op) {
            // One that is read twice has two readers in one.
            let plain = lhs.shape == out.shape && rhs.shape == out.shape && lhs.id != rhs.id;
            return plain.then_some(()).and_then(|()| {
                self.terms(lhs, maker, dim, products, gone)?;
                self.terms(rhs, maker, dim, products, gone)
            });
        }
        match op {
            // The same rows in the same order.
            OperationIr::BaseFloat(Base::Reshape(view))
                if dim.is_none() && view.input.shape.last() == view.out.shape.last() =>
            {
                self.terms(&view.input, maker, dim, products, gone)
            }
            _ => None,
        }
    }

    fn gather(
        &self,
        place: usize,
        CollectiveOp { axis, .. }: CollectiveOp<'_>,
        dim: usize,
        input: &TensorIr,
        output: &TensorIr,
    ) -> Option<Found> {
        if dim + 1 >= output.shape.num_dims() {
            return None;
        }
        let readers = self.uses.readers(output.id);
        let products: Vec<Product> = readers
            .iter()
            .filter(|reader| self.is_forward(**reader) == self.is_forward(place))
            .filter_map(|reader| Product::of(*reader, self.op(*reader)))
            .filter(|product| product.left.id == output.id && self.views(&product.right, place).is_some())
            .collect();
        if products.is_empty() {
            return None;
        }
        let keeps_whole = readers.len() > products.len() || self.results.contains(&output.id);
        let gone = products.iter().map(|product| product.place).chain([place]).collect();
        self.found(place, ProductKind::AllGather, axis, Some(dim), products, place, (input, output), keeps_whole, gone)
    }

    /// What is there before a place, or is a view of that which can be made there: these views, in order.
    fn views(&self, tensor: &TensorIr, place: usize) -> Option<Vec<(usize, OperationIr)>> {
        let Some(maker) = self.uses.maker(tensor.id).filter(|maker| *maker >= place) else { return Some(Vec::new()) };
        let op = self.op(maker);
        let input = op.inputs().next().filter(|_| only_moves(op))?;
        let mut views = self.views(input, place)?;
        views.push((maker, op.clone()));
        Some(views)
    }

    #[allow(clippy::too_many_arguments)]
    fn found(
        &self,
        place: usize,
        kind: ProductKind,
        axis: &str,
        dim: Option<usize>,
        products: Vec<Product>,
        ready: usize,
        (from, to): (&TensorIr, &TensorIr),
        keeps_whole: bool,
        gone: Vec<usize>,
    ) -> Option<Found> {
        let first = if self.is_forward(place) { 0 } else { self.graph.forward_len };
        // Right factors are weights, as a rule, or views of such.
        let early = ready.max(first);
        let rights_ready = |product: &&Product| self.views(&product.right, early).is_none();
        let at = match products.iter().filter(rights_ready).filter_map(|p| self.uses.maker(p.right.id)).max() {
            None => early,
            Some(maker) => early.max(maker + 1),
        };
        let mut hoisted = BTreeMap::new();
        for product in &products {
            hoisted.extend(self.views(&product.right, at)?);
        }
        let forward = self.is_forward(place);
        let dims = to.shape.to_vec();
        let report = FusedProduct { axis: axis.into(), kind, dims, products: products.len(), forward };
        let (from, to, axis) = (from.clone(), to.clone(), axis.to_string());
        let hoisted = hoisted.into_iter().collect();
        Some(Found { at, kind, axis, dim, products, from, to, keeps_whole, hoisted, gone, report })
    }
}

/// What is put where, and what is taken out.
#[derive(Default)]
struct Rewrite {
    before: HashMap<usize, Vec<OperationIr>>,
    gone: HashSet<usize>,
    hoisted: HashSet<usize>,
}

impl Rewrite {
    fn add(&mut self, found: Found, fresh: &mut dyn FnMut() -> TensorId) {
        self.gone.extend(&found.gone);
        let before = self.before.entry(found.at).or_default();
        for (place, view) in found.hoisted {
            if self.hoisted.insert(place) {
                before.push(view);
            }
        }
        let mut inputs = if found.kind.flies() { Vec::new() } else { vec![found.from] };
        let mut outputs = if found.kind.flies() { vec![found.to.clone()] } else { Vec::new() };
        for product in found.products {
            let right = if product.turned { turned(product.right, before, fresh) } else { product.right };
            match found.kind.flies() {
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
fn turned(right: TensorIr, before: &mut Vec<OperationIr>, fresh: &mut dyn FnMut() -> TensorId) -> TensorIr {
    let mut dims = right.shape.to_vec();
    let [dim1, dim2] = [dims.len() - 2, dims.len() - 1];
    dims.swap(dim1, dim2);
    let out = TensorIr::uninit(fresh(), Shape::from(dims), right.dtype);
    before.push(OperationIr::BaseFloat(Base::SwapDims(SwapDimsOpIr { input: right, out: out.clone(), dim1, dim2 })));
    out
}
