//! The custom operations of a partitioned graph, over a communicator.

use burn::backend::flex::FlexTensor;
use burn_ir::CustomOpIr;

use crate::comm::Communicator;
use crate::error::Error;
use crate::graph::{CustomOps, graph_error};
use crate::layout::Step;

/// Id of the custom operation that sums over the ranks. No scalars.
pub const ALL_REDUCE: &str = "all_reduce";
/// Id of the custom operation that puts the parts of all ranks together along a dim, its first scalar.
pub const ALL_GATHER: &str = "all_gather";
/// Id of the custom operation that sums over the ranks and keeps this rank's part along a dim, its first scalar.
pub const REDUCE_SCATTER: &str = "reduce_scatter";

/// Registers what a [partitioned](super::partition) graph needs, over `group`.
pub fn register_collectives(ops: &mut CustomOps, group: &Communicator) {
    let comm = group.clone();
    ops.register(ALL_REDUCE, move |_, inputs| run(ALL_REDUCE, Step::Sum, inputs, &comm));
    let comm = group.clone();
    ops.register(ALL_GATHER, move |op, inputs| run(ALL_GATHER, Step::Gather { dim: dim(op)? }, inputs, &comm));
    let comm = group.clone();
    ops.register(REDUCE_SCATTER, move |op, inputs| {
        run(REDUCE_SCATTER, Step::SumSlice { dim: dim(op)? }, inputs, &comm)
    });
}

fn run(name: &'static str, step: Step, inputs: Vec<FlexTensor>, comm: &Communicator) -> Result<Vec<FlexTensor>, Error> {
    let [input] = <[FlexTensor; 1]>::try_from(inputs)
        .map_err(|inputs| graph_error(format!("custom operation `{name}` takes one input, not {}", inputs.len())))?;
    Ok(vec![step.take(name, input, comm)?])
}

fn dim(op: &CustomOpIr) -> Result<usize, Error> {
    let dim = op.scalars.first().map(|dim| dim.elem::<u64>() as usize);
    dim.ok_or_else(|| graph_error(format!("custom operation `{}` needs a dim as its first scalar", op.id)))
}
