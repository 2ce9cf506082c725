//! From whole parameters to local ones, and back.
//!
//! Rank 0's values count. A parameter that is lazy on rank 0 stays lazy everywhere: whoever needs its value first makes all
//! ranks meet, rank 0 makes the whole value, the others get their parts. No other rank ever holds the whole of a split
//! parameter, and rank 0 holds one at a time.

use std::any::Any;
use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Int, Shape, Tensor};

use super::leaf::{Kind, Lazy, leaf};
use super::own_buffers;
use super::pad::{padded, without_padding};
use crate::Error;
use crate::comm::{Communicator, Payload};
use crate::layout::{Layout, gather_from_group, scatter_from_root};
use crate::plan::{PlanRow, PlanTable};

/// Demands that all ranks bring the same parameters in the same layouts.
///
/// # Errors
/// Those of [`agree`](super::agree).
pub(crate) fn agree_on_layouts(table: &PlanTable, group: &Communicator) -> Result<(), Error> {
    let layouts = |row: &PlanRow| row.layouts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    let line = |row: &PlanRow| (row.path.clone(), format!("{:?} {:?}, {}", row.dtype, row.dims, layouts(row)));
    super::agree(&table.rows().iter().map(line).collect::<Vec<_>>(), group)
}

/// Gives this rank its part along axis number `axis` of the table, of every parameter of rank 0's module, which the axes
/// before it have taken their parts of; as fresh leaves.
///
/// # Errors
/// Those of [`Communicator`].
pub(crate) fn distribute<M: Module>(
    module: M,
    table: &PlanTable,
    axis: usize,
    group: &Communicator,
) -> Result<M, Error> {
    let mut lazies = Lazies::default();
    module.visit(&mut lazies);
    let lazy = group.broadcast(lazies.0, 0)?;
    let mut mapper = Distribute { table, axis, group, lazy: lazy.into_iter(), seen: HashMap::new(), outcome: Ok(()) };
    let module = own_buffers(module).map(&mut mapper);
    mapper.outcome.map(|()| module)
}

/// Puts the parts of all ranks along axis number `axis` of the table together, on every rank of its group.
///
/// # Errors
/// Those of [`Communicator`].
pub(crate) fn assemble<M: Module>(module: M, table: &PlanTable, axis: usize, group: &Communicator) -> Result<M, Error> {
    let mut mapper = Assemble { table, axis, group, seen: HashMap::new(), outcome: Ok(()) };
    let module = own_buffers(module).map(&mut mapper);
    mapper.outcome.map(|()| module)
}

/// Whether each float parameter is lazy, in the order of the module.
#[derive(Default)]
struct Lazies(Vec<u8>);

impl ModuleVisitor for Lazies {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(u8::from(!param.is_initialized()));
    }
}

struct Distribute<'a, L> {
    table: &'a PlanTable,
    axis: usize,
    group: &'a Communicator,
    /// Whether the parameters to come are lazy on rank 0.
    lazy: L,
    /// Parameters already made, so that one held in two places stays one.
    seen: HashMap<ParamId, Box<dyn Any>>,
    outcome: Result<(), Error>,
}

/// What of a parameter is spread over the ranks of an axis.
#[derive(Clone)]
struct Share {
    layout: Layout,
    dtype: DType,
    /// Before and after.
    dims: Vec<usize>,
    local_dims: Vec<usize>,
}

/// This rank's share of rank 0's value. Of the `value` of the other ranks only rank and dtype count, and its dims if it is
/// not split.
fn receive<const D: usize>(value: Tensor<D>, layout: Layout, group: &Communicator) -> Result<Tensor<D>, Error> {
    match layout {
        Layout::Sharded(dim) => scatter_from_root(value, dim, 0, group),
        _ => group.broadcast(value, 0),
    }
}

/// What a rank that is not the first brings to [`receive`].
fn nothing<const D: usize>(share: &Share, like: &Tensor<D>) -> Tensor<D> {
    let dims = match (share.layout, <[usize; D]>::try_from(share.dims.as_slice())) {
        (Layout::Replicated, Ok(dims)) => dims,
        _ => [0; D],
    };
    Tensor::zeros(dims, (&like.device(), share.dtype))
}

impl<L: Iterator<Item = u8>> Distribute<'_, L> {
    fn share(&self, id: ParamId) -> Option<Share> {
        let row = self.table.row(id)?;
        let dims = |axes| row.dims_after(axes, self.table.axes());
        let (dims, local_dims) = (dims(self.axis), dims(self.axis + 1));
        Some(Share { layout: row.layouts[self.axis], dtype: row.dtype, dims, local_dims })
    }

    fn now<const D: usize>(&mut self, param: Param<Tensor<D>>, share: &Share) -> Param<Tensor<D>> {
        let first = self.group.rank() == 0;
        let (kind, value, id, mapper) = match param.is_initialized() || first {
            true => {
                let (id, value, mapper) = param.consume();
                let kind = Kind::of(&value);
                let value = value.inner();
                (kind, if first { padded(value, &share.dims) } else { nothing(share, &value) }, id, mapper)
            }
            false => {
                let Lazy { stand_in, device, trained } = Lazy::of(&param);
                let (id, one, mapper) = stand_in.consume();
                (Kind::on(&device, trained), nothing(share, &one.inner()), id, mapper)
            }
        };
        let local = receive(value.clone(), share.layout, self.group).unwrap_or_else(|error| {
            self.outcome = Err(error);
            value
        });
        Param::from_mapped_value(id, leaf(local, kind), mapper)
    }

    fn later<const D: usize>(&self, param: Param<Tensor<D>>, share: &Share) -> Param<Tensor<D>> {
        let Lazy { stand_in, device, trained } = Lazy::of(&param);
        let (id, one, mapper) = stand_in.consume();
        let (group, whole) = (self.group.clone(), share.clone());
        let first = group.rank() == 0;
        // Only rank 0 makes the value as the model says.
        let source = first.then_some(param);
        let one = one.inner();
        let init = move |device: &burn::tensor::Device, trained: bool| {
            let value =
                source.map_or_else(|| nothing(&whole, &one), |param| padded(param.into_value().inner(), &whole.dims));
            let local = receive(value, whole.layout, &group).unwrap_or_else(|error| {
                // Here no error can be returned: what comes next to communicate returns it.
                group.fail(error);
                let dims = <[usize; D]>::try_from(whole.local_dims.as_slice()).unwrap_or([0; D]);
                Tensor::zeros(dims, (&one.device(), whole.dtype))
            });
            leaf(local.to_device(&device.clone().inner()), Kind::on(device, trained))
        };
        let (load, save) = (mapper.clone(), mapper);
        Param::uninitialized(id, init, device, trained, Shape::from(share.local_dims.clone()))
            .load_mapper(move |value| load.on_load(value))
            .save_mapper(move |value| save.on_save(value))
    }

    fn other<P: Payload>(&mut self, value: P) -> Option<P> {
        if self.outcome.is_err() {
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
        let Some(share) = self.share(param.id).filter(|_| self.outcome.is_ok()) else { return param };
        let made = if lazy { self.later(param, &share) } else { self.now(param, &share) };
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
        let kind = Kind::of(&value);
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
