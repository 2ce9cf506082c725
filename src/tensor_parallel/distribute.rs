//! From whole parameters to local ones, and back.

use std::any::Any;
use std::collections::HashMap;

use burn::backend::GradientCheckpointingStrategy;
use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Bool, Int, Tensor};

use crate::Error;
use crate::comm::{Communicator, Payload};
use crate::graph::with_autodiff;
use crate::layout::{Layout, gather_from_group, scatter_from_root};
use crate::params;
use crate::plan::{PlanRow, PlanTable};

/// Demands that all ranks bring the same parameters in the same layouts.
///
/// # Errors
/// Those of [`params::agree`].
pub(super) fn agree(table: &PlanTable, group: &Communicator) -> Result<(), Error> {
    let line = |row: &PlanRow| (row.path.clone(), format!("{:?} {:?}, {}", row.dtype, row.dims, row.layout));
    params::agree(&table.rows().iter().map(line).collect::<Vec<_>>(), group)
}

/// Gives this rank its part of every parameter of rank 0's module, as fresh leaves.
pub(super) fn distribute<M: Module>(module: M, table: &PlanTable, group: &Communicator) -> Result<M, Error> {
    convert(module, table, group, Direction::Distribute)
}

/// Puts the parts of all ranks together, on every rank.
pub(super) fn assemble<M: Module>(module: M, table: &PlanTable, group: &Communicator) -> Result<M, Error> {
    convert(module, table, group, Direction::Assemble)
}

#[derive(Clone, Copy)]
enum Direction {
    Distribute,
    Assemble,
}

fn convert<M: Module>(module: M, table: &PlanTable, group: &Communicator, direction: Direction) -> Result<M, Error> {
    let mut mapper = Convert { table, group, direction, seen: HashMap::new(), outcome: Ok(()) };
    let module = module.map(&mut mapper);
    mapper.outcome.map(|()| module)
}

struct Convert<'a> {
    table: &'a PlanTable,
    group: &'a Communicator,
    direction: Direction,
    /// Leaves already made, so that a parameter held in two places stays one.
    seen: HashMap<ParamId, Box<dyn Any>>,
    outcome: Result<(), Error>,
}

impl Convert<'_> {
    fn float<const D: usize>(&self, value: Tensor<D>, layout: Layout) -> Result<Tensor<D>, Error> {
        match (self.direction, layout) {
            (Direction::Distribute, Layout::Sharded(dim)) => scatter_from_root(value, dim, 0, self.group),
            (Direction::Distribute, _) => self.group.broadcast(value, 0),
            (Direction::Assemble, Layout::Sharded(dim)) => gather_from_group(value, dim, self.group),
            (Direction::Assemble, _) => Ok(value),
        }
    }

    fn other<P: Payload>(&mut self, value: P) -> Option<P> {
        if self.outcome.is_err() {
            return None;
        }
        match self.direction {
            Direction::Distribute => self.group.broadcast(value, 0).map_err(|error| self.outcome = Err(error)).ok(),
            Direction::Assemble => Some(value),
        }
    }
}

impl ModuleMapper for Convert<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        if let Some(leaf) = self.seen.get(&id).and_then(|leaf| leaf.downcast_ref::<Tensor<D>>()) {
            return Param::from_mapped_value(id, leaf.clone(), mapper);
        }
        let layout = self.table.row(id).map_or(Layout::Replicated, |row| row.layout);
        let trained = value.is_require_grad();
        if self.outcome.is_err() {
            return Param::from_mapped_value(id, value, mapper);
        }
        let strategy = value.gradient_checkpointing_strategy();
        let leaf = match self.float(value.clone().inner(), layout) {
            Ok(local) => leaf(local, strategy, trained),
            Err(error) => {
                self.outcome = Err(error);
                value
            }
        };
        self.seen.insert(id, Box::new(leaf.clone()));
        Param::from_mapped_value(id, leaf, mapper)
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

/// A tensor without autodiff as a leaf of the kind that another one was.
fn leaf<const D: usize>(value: Tensor<D>, strategy: Option<GradientCheckpointingStrategy>, trained: bool) -> Tensor<D> {
    match strategy {
        Some(strategy) => with_autodiff(value, strategy).set_require_grad(trained),
        None => value,
    }
}

/// The module with the dims that it has as a whole and no memory behind them: what a capture looks at.
pub(super) fn outline<M: Module>(local: &M, table: &PlanTable) -> M {
    // A module's clones share its running statistics; after `train` this one has its own.
    local.clone().train().map(&mut Outline { table, seen: HashMap::new() })
}

struct Outline<'a> {
    table: &'a PlanTable,
    seen: HashMap<ParamId, Box<dyn Any>>,
}

impl ModuleMapper for Outline<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(row) = self.table.row(param.id).filter(|row| row.layout != Layout::Replicated) else { return param };
        let id = param.id;
        if let Some(leaf) = self.seen.get(&id).and_then(|leaf| leaf.downcast_ref::<Tensor<D>>()) {
            return Param::initialized(id, leaf.clone());
        }
        let value = param.val();
        let Ok(dims) = <[usize; D]>::try_from(row.dims.as_slice()) else { return param };
        // Stride 0: one element stands for all.
        let (strategy, trained) = (value.gradient_checkpointing_strategy(), value.is_require_grad());
        let value = value.inner();
        let whole = Tensor::<D>::zeros([1; D], (&value.device(), value.dtype())).expand(dims);
        let whole = leaf(whole, strategy, trained);
        self.seen.insert(id, Box::new(whole.clone()));
        Param::initialized(id, whole)
    }
}
