//! Finds products and collectives that can be one operation.

use std::collections::{BTreeMap, HashSet};

use burn_ir::{BinaryOpIr, OperationIr, TensorId, TensorIr};

use crate::collective_matmul::multiply;
use crate::graph::StepGraph;
use crate::graph::operation::{only_moves, plain_product, reshape, sum};
use crate::graph::step::Uses;
use crate::partition::buckets::ends;
use crate::partition::collectives::{CollectiveKind, CollectiveOp, dim};
use crate::partition::products::{FusedProduct, ProductKind};

/// A product as it stands in a graph.
pub(super) struct GraphProduct {
    pub(super) place: usize,
    pub(super) left: TensorIr,
    pub(super) right: TensorIr,
    /// Whether it is the transposed right factor that is multiplied.
    pub(super) transposed: bool,
    pub(super) out: TensorIr,
}

impl GraphProduct {
    fn of(place: usize, op: &OperationIr) -> Option<Self> {
        let (left, right, transposed, out) = plain_product(op)?;
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
        fits.then_some(Self { place, left, right, transposed, out })
    }
}

/// What becomes one operation.
pub(super) struct FusableProducts {
    /// Where it runs: before what stands here now.
    pub(super) at: usize,
    pub(super) kind: ProductKind,
    pub(super) axis: String,
    pub(super) dim: Option<usize>,
    pub(super) products: Vec<GraphProduct>,
    /// What is reduced or gathered, and what it becomes.
    pub(super) from: TensorIr,
    pub(super) to: TensorIr,
    /// Whether the gathered left factor is read by others.
    pub(super) keeps_whole: bool,
    pub(super) forward: bool,
    /// Views of the right factors that are made later, and so move up.
    pub(super) hoisted: Vec<(usize, OperationIr)>,
    /// What is not needed any more.
    pub(super) gone: Vec<usize>,
}

impl FusableProducts {
    pub(super) fn report(&self) -> FusedProduct {
        let Self { axis, kind, to, products, forward, .. } = self;
        let (axis, dims) = (axis.clone(), to.shape.to_vec());
        FusedProduct { axis, kind: *kind, dims, products: products.len(), forward: *forward }
    }
}

pub(super) struct FindProducts<'a> {
    graph: &'a StepGraph,
    uses: Uses,
    results: HashSet<TensorId>,
    gradients: HashSet<TensorId>,
}

impl<'a> FindProducts<'a> {
    pub(super) fn new(graph: &'a StepGraph) -> Self {
        let gradients = graph.params.iter().filter_map(|param| param.gradient.as_ref()).map(|gradient| gradient.id);
        Self {
            graph,
            uses: Uses::of(&graph.operations),
            results: graph.results().map(|result| result.id).collect(),
            gradients: gradients.collect(),
        }
    }

    /// By the places where they are to run, so that a view that several read moves up to the first.
    pub(super) fn all(&self) -> Vec<FusableProducts> {
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

    /// The operation that makes a tensor with a single reader in the same pass.
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
    ) -> Option<FusableProducts> {
        if ends(self.graph, &self.uses, &self.gradients, axis, output.id) {
            return None;
        }
        let (mut products, mut gone) = (Vec::new(), vec![place]);
        // Rows may be counted in any way as long as all are summed; it is otherwise along a dim.
        let mut within = (input, place);
        while let (None, Some(maker)) = (dim, self.sole_maker(within.0.id, within.1))
            && let Some(view) = reshape(self.op(maker))
        {
            gone.push(maker);
            within = (&view.input, maker);
        }
        self.terms(within.0, within.1, dim, &mut products, &mut gone)?;
        let (first, rank) = (products.first()?, input.shape.num_dims());
        let leading =
            |product: &GraphProduct| product.left.shape.as_slice()[..product.left.shape.num_dims() - 1].to_vec();
        if let Some(dim) = dim
            && !(dim + 1 < rank && products.iter().all(|product| leading(product) == leading(first)))
        {
            return None;
        }
        let lefts = products.iter().map(|product| &product.left);
        let ready = lefts.filter_map(|left| self.uses.maker(left.id)).map(|maker| maker + 1).max().unwrap_or(0);
        let kind = if dim.is_some() { ProductKind::ReduceScatter } else { ProductKind::AllReduce };
        let (from, to, axis) = (input.clone(), output.clone(), axis.into());
        let (keeps_whole, forward, hoisted) = (false, false, Vec::new());
        let found =
            FusableProducts { at: ready, kind, axis, dim, products, from, to, keeps_whole, forward, hoisted, gone };
        self.placed(found, place)
    }

    /// The products that a tensor is the sum of.
    fn terms(
        &self,
        tensor: &TensorIr,
        reader: usize,
        dim: Option<usize>,
        products: &mut Vec<GraphProduct>,
        gone: &mut Vec<usize>,
    ) -> Option<()> {
        let maker = self.sole_maker(tensor.id, reader)?;
        gone.push(maker);
        let op = self.op(maker);
        if let Some(product) = GraphProduct::of(maker, op) {
            products.push(product);
            return Some(());
        }
        if let Some(BinaryOpIr { lhs, rhs, out }) = sum(op) {
            // One that is read twice has two readers in one.
            let plain = lhs.shape == out.shape && rhs.shape == out.shape && lhs.id != rhs.id;
            return plain.then_some(()).and_then(|()| {
                self.terms(lhs, maker, dim, products, gone)?;
                self.terms(rhs, maker, dim, products, gone)
            });
        }
        // The same rows in the same order.
        let view = reshape(op).filter(|view| dim.is_none() && view.input.shape.last() == view.out.shape.last())?;
        self.terms(&view.input, maker, dim, products, gone)
    }

    fn gather(
        &self,
        place: usize,
        CollectiveOp { axis, .. }: CollectiveOp<'_>,
        dim: usize,
        input: &TensorIr,
        output: &TensorIr,
    ) -> Option<FusableProducts> {
        if dim + 1 >= output.shape.num_dims() {
            return None;
        }
        let readers = self.uses.readers(output.id);
        let products: Vec<GraphProduct> = readers
            .iter()
            .filter(|reader| self.is_forward(**reader) == self.is_forward(place))
            .filter_map(|reader| GraphProduct::of(*reader, self.op(*reader)))
            .filter(|product| product.left.id == output.id && self.views(&product.right, place).is_some())
            .collect();
        if products.is_empty() {
            return None;
        }
        let keeps_whole = readers.len() > products.len() || self.results.contains(&output.id);
        let gone = products.iter().map(|product| product.place).chain([place]).collect();
        let (from, to, axis, dim) = (input.clone(), output.clone(), axis.into(), Some(dim));
        let (kind, forward, hoisted) = (ProductKind::AllGather, false, Vec::new());
        let found =
            FusableProducts { at: place, kind, axis, dim, products, from, to, keeps_whole, forward, hoisted, gone };
        self.placed(found, place)
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

    /// As early as its inputs allow, in the pass of its collective. Right factors are weights, as a rule, or views of
    /// such, which move up with it.
    fn placed(&self, found: FusableProducts, collective: usize) -> Option<FusableProducts> {
        let forward = self.is_forward(collective);
        let early = found.at.max(if forward { 0 } else { self.graph.forward_len });
        let rights = || found.products.iter().map(|product| &product.right);
        let made_later = rights().filter(|right| self.views(right, early).is_none());
        let at = match made_later.filter_map(|right| self.uses.maker(right.id)).max() {
            None => early,
            Some(maker) => early.max(maker + 1),
        };
        let mut hoisted = BTreeMap::new();
        for right in rights() {
            hoisted.extend(self.views(right, at)?);
        }
        let hoisted = hoisted.into_iter().collect();
        Some(FusableProducts { at, forward, hoisted, ..found })
    }
}
