//! The collectives of a partitioned graph as custom operations, and what each of them does.

use burn_ir::{CustomOpIr, OperationIr, ScalarIr, TensorIr};

use crate::Error;
use crate::comm::{Communicator, ReduceOp};
use crate::graph::{StepGraph, graph_error};
use crate::layout::MoveOp;
use crate::tensor::PlainTensor;

/// The kinds of collectives that a partition puts in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CollectiveKind {
    /// Partial to replicated: the sum over the ranks.
    AllReduce,
    /// The largest over the ranks of what each reduced from its part.
    AllReduceMax,
    /// The smallest over the ranks.
    AllReduceMin,
    /// The product over the ranks.
    AllReduceProduct,
    /// Sharded to replicated.
    AllGather,
    /// Partial to sharded.
    ReduceScatter,
    /// Sharded along one dim to sharded along another.
    AllToAll,
}

impl CollectiveKind {
    pub(crate) const ALL: [Self; 7] = [
        Self::AllReduce,
        Self::AllReduceMax,
        Self::AllReduceMin,
        Self::AllReduceProduct,
        Self::AllGather,
        Self::ReduceScatter,
        Self::AllToAll,
    ];

    /// What the id of its custom operation ends in, behind the name of the axis: `tp.all_reduce`.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllReduceMax => "all_reduce_max",
            Self::AllReduceMin => "all_reduce_min",
            Self::AllReduceProduct => "all_reduce_product",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
        }
    }

    /// The custom operation over an axis. `dims` are the dim along which it gathers or scatters, or the dims that an
    /// all-to-all splits and joins.
    pub(crate) fn operation(self, axis: &str, dims: &[usize], from: TensorIr, to: TensorIr) -> OperationIr {
        // By convention the last scalar does not count in the fingerprint; the dims shall.
        let scalars = dims.iter().copied().chain([0]).map(|dim| ScalarIr::UInt(dim as u64)).collect();
        let id = format!("{axis}.{}", self.name());
        OperationIr::Custom(CustomOpIr { id, inputs: vec![from], outputs: vec![to], scalars })
    }

    /// What it does with the tensors of this rank.
    pub(crate) fn run(
        self,
        op: &CustomOpIr,
        inputs: Vec<PlainTensor>,
        comm: &Communicator,
    ) -> Result<Vec<PlainTensor>, Error> {
        if self == Self::AllReduce && inputs.len() != 1 {
            return comm.all_reduce_coalesced(inputs, ReduceOp::Sum);
        }
        let [input] = <[PlainTensor; 1]>::try_from(inputs).map_err(|inputs| {
            graph_error(format!("custom operation `{}` takes one input, not {}", op.id, inputs.len()))
        })?;
        let step = |step: MoveOp| step.take(self.name(), input.clone(), comm);
        let output = match self {
            Self::AllReduce => comm.all_reduce(input, ReduceOp::Sum)?,
            Self::AllReduceMax => comm.all_reduce(input, ReduceOp::Max)?,
            Self::AllReduceMin => comm.all_reduce(input, ReduceOp::Min)?,
            Self::AllReduceProduct => comm.all_reduce(input, ReduceOp::Product)?,
            Self::AllGather => step(MoveOp::Gather { dim: dim(op, 0)? })?,
            Self::ReduceScatter => step(MoveOp::SumSlice { dim: dim(op, 0)? })?,
            Self::AllToAll => step(MoveOp::Exchange { split: dim(op, 0)?, join: dim(op, 1)? })?,
        };
        Ok(vec![output])
    }
}

/// A collective of a graph, told by its custom operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CollectiveOp<'a> {
    pub(crate) axis: &'a str,
    pub(crate) kind: CollectiveKind,
}

impl<'a> CollectiveOp<'a> {
    pub(crate) fn of(op: &'a OperationIr) -> Option<(Self, &'a CustomOpIr)> {
        let OperationIr::Custom(op) = op else { return None };
        let (axis, name) = op.id.rsplit_once('.')?;
        let kind = CollectiveKind::ALL.into_iter().find(|kind| kind.name() == name)?;
        Some((Self { axis, kind }, op))
    }
}

impl StepGraph {
    /// A hash of the collectives over one axis in order: kinds, dims and shapes.
    ///
    /// The ranks along the axis must have the same fingerprint, also where those along another axis have not.
    pub fn axis_fingerprint(&self, axis: &str) -> u64 {
        self.fingerprint(|op| op.id.rsplit_once('.').is_some_and(|(of, _)| of == axis))
    }
}

pub(crate) fn dim(op: &CustomOpIr, place: usize) -> Result<usize, Error> {
    let dim = op.scalars.get(place).map(|dim| dim.elem::<u64>() as usize);
    dim.ok_or_else(|| graph_error(format!("custom operation `{}` needs a dim as scalar {place}", op.id)))
}
