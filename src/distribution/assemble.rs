//! Gathers the parts of split parameters into whole ones.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::Error;
use crate::comm::Communicator;
use crate::layout::{Layout, gather_from_group};
use crate::params::{LeafKind, MapParams, MappedParam, ModulePath, leaf, map_params, own_buffers, without_padding};
use crate::plan::PlanTable;

/// Puts the parts of all ranks along axis number `axis` of the table together, on every rank of its group.
///
/// # Errors
/// Those of [`Communicator`].
pub(super) fn assemble<M: Module>(module: M, table: &PlanTable, axis: usize, group: &Communicator) -> Result<M, Error> {
    let mut mapper = Assemble { table, axis, group, outcome: Ok(()) };
    let module = map_params(own_buffers(module), &mut mapper);
    mapper.outcome.map(|()| module)
}

struct Assemble<'a> {
    table: &'a PlanTable,
    axis: usize,
    group: &'a Communicator,
    outcome: Result<(), Error>,
}

impl MapParams for Assemble<'_> {
    fn float<const D: usize>(&mut self, param: Param<Tensor<D>>, _: &ModulePath) -> MappedParam<D> {
        let Some(row) = self.table.row(param.id) else { return MappedParam::Same(param) };
        let Layout::Sharded(dim) = row.layouts[self.axis] else { return MappedParam::Same(param) };
        if self.outcome.is_err() {
            return MappedParam::Same(param);
        }
        let (id, value, mapper) = param.consume();
        let kind = LeafKind::of(&value);
        // What no other axis has divided is whole now, and needs no padding.
        let last = row.dims_after(self.axis, self.table.axes()) == row.padded_dims;
        let whole = gather_from_group(value.clone().inner(), dim, self.group)
            .map(|whole| leaf(if last { without_padding(whole, &row.dims) } else { whole }, kind));
        let whole = whole.unwrap_or_else(|error| {
            self.outcome = Err(error);
            value
        });
        MappedParam::New(Param::from_mapped_value(id, whole, mapper))
    }
}
