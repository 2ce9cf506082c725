//! Fused products as custom operations, over [`collective_matmul`](crate::collective_matmul).

use std::fmt;

use burn_ir::{CustomOpIr, OperationIr, ScalarIr, TensorIr};

use super::collectives::dim;
use crate::Error;
use crate::collective_matmul::{self, Overlap, PendingProduct, ProductCall};
use crate::comm::Communicator;
use crate::graph::{CustomOps, graph_error};
use crate::tensor::PlainTensor;

/// What a product is fused with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ProductKind {
    /// The sum over the ranks of one or more products, on every rank.
    AllReduce,
    /// The same, of which each rank gets its part along a dim.
    ReduceScatter,
    /// One or more products of a left factor that is gathered along a dim.
    AllGather,
}

impl ProductKind {
    pub(super) const ALL: [Self; 3] = [Self::AllReduce, Self::ReduceScatter, Self::AllGather];

    /// What the id of its custom operation ends in, behind the name of the axis: `tp.matmul_all_reduce`.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "matmul_all_reduce",
            Self::ReduceScatter => "matmul_reduce_scatter",
            Self::AllGather => "all_gather_matmul",
        }
    }

    /// Whether it can be started, and waited for later.
    pub(super) fn runs_async(self) -> bool {
        self != Self::AllGather
    }

    /// The custom operation over an axis, along a dim if it has one.
    ///
    /// Inputs: pairs of factors; or the left factor, then the right ones. Outputs: the sum; or the products, then the
    /// gathered left factor, if anything else reads it.
    pub(super) fn operation(
        self,
        axis: &str,
        dim: Option<usize>,
        inputs: Vec<TensorIr>,
        outputs: Vec<TensorIr>,
    ) -> CustomOpIr {
        // By convention the last scalar does not count in the fingerprint; the dim shall.
        let scalars = dim.into_iter().chain([0]).map(|dim| ScalarIr::UInt(dim as u64)).collect();
        CustomOpIr { id: format!("{axis}.{}", self.name()), inputs, outputs, scalars }
    }

    fn call(self, op: &CustomOpIr, comm: &Communicator) -> Result<ProductCall, Error> {
        let dim = if self == Self::AllReduce { 0 } else { dim(op, 0)? };
        // The partition has divided evenly.
        Ok(ProductCall { name: self.name(), dim, even: true, overlap: Overlap::auto(), comm: comm.clone() })
    }

    /// Starts the sum; `beside` says that other operations run before it is waited for.
    pub(super) fn start(
        self,
        op: &CustomOpIr,
        inputs: Vec<PlainTensor>,
        comm: &Communicator,
        beside: bool,
    ) -> Result<PendingProduct<Vec<PlainTensor>>, Error> {
        let [out] = op.outputs.as_slice() else {
            return Err(graph_error(format!("custom operation `{}` makes one tensor", op.id)));
        };
        let (call, shape) = (self.call(op, comm)?, out.shape.clone());
        let terms = pairs(op, inputs)?;
        let sum = match self {
            Self::AllReduce => collective_matmul::sum(terms, &call, beside)?,
            _ => collective_matmul::scatter(terms, &call, beside)?,
        };
        Ok(sum.map(move |sum| vec![if sum.shape() == shape { sum } else { sum.reshape(shape) }]))
    }

    fn run(self, op: &CustomOpIr, inputs: Vec<PlainTensor>, comm: &Communicator) -> Result<Vec<PlainTensor>, Error> {
        if self.runs_async() {
            return self.start(op, inputs, comm, false)?.wait();
        }
        let mut inputs = inputs.into_iter();
        let left = inputs.next().ok_or_else(|| graph_error(format!("custom operation `{}` lacks an input", op.id)))?;
        let (mut made, whole) = collective_matmul::gather(left, inputs.collect(), &self.call(op, comm)?)?;
        if made.len() < op.outputs.len() {
            made.push(whole);
        }
        Ok(made)
    }
}

fn pairs(op: &CustomOpIr, inputs: Vec<PlainTensor>) -> Result<Vec<[PlainTensor; 2]>, Error> {
    let (mut pairs, mut inputs) = (Vec::with_capacity(inputs.len() / 2), inputs.into_iter());
    while let Some(left) = inputs.next() {
        let right = inputs.next();
        let right = right.ok_or_else(|| graph_error(format!("custom operation `{}` lacks a right factor", op.id)))?;
        pairs.push([left, right]);
    }
    Ok(pairs)
}

/// A fused product of a graph, told by its custom operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProductOp<'a> {
    pub(super) axis: &'a str,
    pub(super) kind: ProductKind,
}

impl<'a> ProductOp<'a> {
    pub(super) fn of(op: &'a OperationIr) -> Option<(Self, &'a CustomOpIr)> {
        let OperationIr::Custom(op) = op else { return None };
        let (axis, name) = op.id.rsplit_once('.')?;
        let kind = ProductKind::ALL.into_iter().find(|kind| kind.name() == name)?;
        Some((Self { axis, kind }, op))
    }

    /// The multiplications that an operation takes on each rank, if it is a fused product.
    pub(super) fn multiplications(op: &'a OperationIr) -> Option<u64> {
        let (Self { kind, .. }, op) = Self::of(op)?;
        let elements = |tensor: &TensorIr| tensor.shape.num_elements() as u64;
        let columns = |right: &TensorIr| right.shape.last().copied().unwrap_or(1) as u64;
        let work = match kind {
            ProductKind::AllGather => {
                let (left, rights) = op.inputs.split_first()?;
                let rows = op.outputs.first().map_or(0, |out| elements(out) / columns(out).max(1));
                let features = left.shape.last().copied().unwrap_or(1) as u64;
                rows * features * rights.iter().map(columns).sum::<u64>()
            }
            _ => op.inputs.chunks_exact(2).map(|pair| elements(&pair[0]) * columns(&pair[1])).sum(),
        };
        Some(work)
    }
}

/// A product of a captured step that runs together with its collective.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FusedProduct {
    /// Name of the axis.
    pub axis: String,
    /// The collective, and on which side of the product.
    pub kind: ProductKind,
    /// Dims of what one rank gets: of the sum, or of the gathered left factor.
    pub dims: Vec<usize>,
    /// How many products: summands, or right factors of one left factor.
    pub products: usize,
    /// Whether it belongs to the forward pass.
    pub forward: bool,
}

impl fmt::Display for FusedProduct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { axis, kind, dims, products, forward } = self;
        let pass = if *forward { "forward" } else { "backward" };
        write!(f, "{pass:8} {axis}.{} {dims:?} of {products}", kind.name())
    }
}

/// Registers the operations that [`fuse_products`](super::fuse_products) puts in.
pub(super) fn register(ops: &mut CustomOps, axis: &str, group: &Communicator) {
    for kind in ProductKind::ALL {
        let comm = group.clone();
        ops.register(&format!("{axis}.{}", kind.name()), move |op, inputs| kind.run(op, inputs, &comm));
    }
}
