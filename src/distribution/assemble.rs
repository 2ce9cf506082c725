//! From local parameters to whole ones.

use std::any::Any;
use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::Tensor;

use crate::Error;
use crate::comm::Communicator;
use crate::layout::{Layout, gather_from_group};
use crate::params::{LeafKind, leaf, own_buffers, without_padding};
use crate::plan::PlanTable;

/// Puts the parts of all ranks along axis number `axis` of the table together, on every rank of its group.
///
/// # Errors
/// Those of [`Communicator`].
pub(super) fn assemble<M: Module>(module: M, table: &PlanTable, axis: usize, group: &Communicator) -> Result<M, Error> {
    let mut mapper = Assemble { table, axis, group, seen: HashMap::new(), outcome: Ok(()) };
    let module = own_buffers(module).map(&mut mapper);
    mapper.outcome.map(|()| module)
}

struct Assemble<'a> {
    table: &'a PlanTable,
    axis: usize,
    group: &'a Communicator,
    /// Leaves already made, so that a parameter held in two places stays one.
    seen: HashMap<ParamId, Box<dyn Any>>,
    outcome: Result<(), Error>,
}

impl ModuleMapper for Assemble<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(row) = self.table.row(param.id) else { return param };
        let Layout::Sharded(dim) = row.layouts[self.axis] else { return param };
        let (id, value, mapper) = param.consume();
        if let Some(whole) = self.seen.get(&id).and_then(|whole| whole.downcast_ref::<Tensor<D>>()) {
            return Param::from_mapped_value(id, whole.clone(), mapper);
        }
        if self.outcome.is_err() {
            return Param::from_mapped_value(id, value, mapper);
        }
        let kind = LeafKind::of(&value);
        // What no other axis has divided is whole now, and needs no padding.
        let last = row.dims_after(self.axis, self.table.axes()) == row.padded_dims;
        let whole = gather_from_group(value.clone().inner(), dim, self.group)
            .map(|whole| leaf(if last { without_padding(whole, &row.dims) } else { whole }, kind));
        let whole = whole.unwrap_or_else(|error| {
            self.outcome = Err(error);
            value
        });
        self.seen.insert(id, Box::new(whole.clone()));
        Param::from_mapped_value(id, whole, mapper)
    }
}
