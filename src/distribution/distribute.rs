//! Scatters and broadcasts the parameters of rank 0 over the ranks of an axis.

use std::any::Any;
use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Bool, Int, Tensor};

use super::lazy::lazy_part;
use super::param_part::{ParamPart, nothing, receive};
use crate::Error;
use crate::comm::{Communicator, Payload};
use crate::layout::Layout;
use crate::params::{self, LazyParam, LeafKind, leaf, own_buffers, padded, visit_floats};
use crate::plan::{PlanRow, PlanTable};

/// Demands that all ranks bring the same parameters in the same layouts.
///
/// # Errors
/// Those of [`params::agree`].
pub(super) fn agree_on_layouts(table: &PlanTable, group: &Communicator) -> Result<(), Error> {
    let layouts = |row: &PlanRow| row.layouts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    let line = |row: &PlanRow| (row.path.clone(), format!("{:?} {:?}, {}", row.dtype, row.dims, layouts(row)));
    params::agree(&table.rows().iter().map(line).collect::<Vec<_>>(), group)
}

/// What of a model is distributed along an axis. All axes come to the first round before the second: so what is split
/// is already when it is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Round {
    /// The parameters that are split along the axis.
    Split,
    /// Everything else.
    Copy,
}

/// Gives this rank its part along axis number `axis` of the table, of the parameters of rank 0's module that this round
/// is about, which the axes before it have taken their parts of; as fresh leaves.
///
/// # Errors
/// Those of [`Communicator`].
pub(super) fn distribute<M: Module>(
    module: M,
    table: &PlanTable,
    (axis, round): (usize, Round),
    group: &Communicator,
) -> Result<M, Error> {
    let mut lazy = Vec::new();
    visit_floats(&module, &mut |param| lazy.push(u8::from(param.is_lazy())));
    let lazy = group.broadcast(lazy, 0)?;
    let (lazy, seen) = (lazy.into_iter(), HashMap::new());
    let mut mapper = Distribute { table, axis, round, group, lazy, seen, outcome: Ok(()) };
    let module = own_buffers(module).map(&mut mapper);
    mapper.outcome.map(|()| module)
}

struct Distribute<'a, L> {
    table: &'a PlanTable,
    axis: usize,
    round: Round,
    group: &'a Communicator,
    /// Whether the parameters to come are lazy on rank 0.
    lazy: L,
    /// Parameters already made, so that one held in two places stays one.
    seen: HashMap<ParamId, Box<dyn Any>>,
    outcome: Result<(), Error>,
}

impl<L: Iterator<Item = u8>> Distribute<'_, L> {
    /// None if the parameter is not of this round.
    fn part(&self, id: ParamId) -> Option<ParamPart> {
        let row = self.table.row(id)?;
        let (layout, axes) = (row.layouts[self.axis], self.table.axes());
        let is_split = |layout: &Layout| matches!(layout, Layout::Sharded(_));
        let (before, after) = match (is_split(&layout), self.round) {
            (true, Round::Split) => (self.axis, self.axis + 1),
            (false, Round::Copy) => (axes.len(), axes.len()),
            _ => return None,
        };
        let (dims, local_dims) = (row.dims_after(before, axes), row.dims_after(after, axes));
        let fresh = (!row.layouts[..before].iter().any(is_split)).then(|| row.dims.clone());
        Some(ParamPart { layout, dtype: row.dtype, dims, local_dims, fresh })
    }

    fn now<const D: usize>(&mut self, param: Param<Tensor<D>>, part: &ParamPart) -> Param<Tensor<D>> {
        let first = self.group.rank() == 0;
        let (kind, value, id, mapper) = match param.is_initialized() || first {
            true => {
                let (id, value, mapper) = param.consume();
                let kind = LeafKind::of(&value);
                let value = value.inner();
                (kind, if first { padded(value, &part.dims) } else { nothing(part, &value) }, id, mapper)
            }
            false => {
                let LazyParam { placeholder, device, trained } = LazyParam::of(&param);
                let (id, one, mapper) = placeholder.consume();
                (LeafKind::on(&device, trained), nothing(part, &one.inner()), id, mapper)
            }
        };
        let local = receive(value.clone(), part.layout, self.group).unwrap_or_else(|error| {
            self.outcome = Err(error);
            value
        });
        Param::from_mapped_value(id, leaf(local, kind), mapper)
    }

    fn other<P: Payload>(&mut self, value: P) -> Option<P> {
        if self.outcome.is_err() || self.round == Round::Split {
            return None;
        }
        self.group.broadcast(value, 0).map_err(|error| self.outcome = Err(error)).ok()
    }
}

impl<L: Iterator<Item = u8>> ModuleMapper for Distribute<'_, L> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let lazy = self.lazy.next() == Some(1);
        if let Some(made) = self.seen.get(&param.id).and_then(|made| made.downcast_ref::<Param<Tensor<D>>>()) {
            return made.clone();
        }
        let Some(part) = self.part(param.id).filter(|_| self.outcome.is_ok()) else { return param };
        let made = if lazy { lazy_part(param, part, self.group) } else { self.now(param, &part) };
        self.seen.insert(made.id, Box::new(made.clone()));
        made
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let (id, value, mapper) = param.consume();
        let value = self.other(value.clone()).unwrap_or(value);
        Param::from_mapped_value(id, value, mapper)
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        let (id, value, mapper) = param.consume();
        let value = self.other(value.clone()).unwrap_or(value);
        Param::from_mapped_value(id, value, mapper)
    }
}
