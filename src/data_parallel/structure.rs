//! Checks that all ranks wrap the same model, and broadcasts the values of rank 0.

use std::collections::HashMap;
use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Bool, DType, Int, Tensor};

use crate::Error;
use crate::comm::{Communicator, Payload};
use crate::params::{self, ParamRef, ShardedIds, visit_params};

/// What is said of a float parameter that is not trained, where ranks compare what they have.
pub(super) const NOT_TRAINED: &str = ", not trained";

/// A float parameter that is trained.
#[derive(Debug, Clone)]
pub(crate) struct TrainedParam {
    pub id: ParamId,
    pub path: Arc<str>,
    pub shape: Vec<usize>,
    pub elements: usize,
    pub dtype: DType,
}

/// What a module holds, in the order in which it is visited.
#[derive(Debug, Default)]
pub(super) struct Structure {
    pub trained: Vec<TrainedParam>,
    /// A line for each tensor: what must be equal on all ranks.
    pub lines: Vec<(String, String)>,
    /// The ids of these.
    pub ids: Vec<ParamId>,
}

impl Structure {
    pub fn of<M: Module>(module: &M) -> Self {
        // The dims that a lazy parameter says need not be those that it gets.
        Self::by(module, |param| param.base().shape().to_vec())
    }

    /// As [`of`](Self::of), where lazy parameters stay lazy: with the dims that they say.
    pub fn unmade<M: Module>(module: &M) -> Self {
        Self::by(module, |param| param.dims())
    }

    fn by<M: Module>(module: &M, dims: impl Fn(&ParamRef<'_>) -> Vec<usize>) -> Self {
        let stand_ins = ShardedIds::of(module).stand_ins;
        let (mut structure, mut whole) = (Self::default(), None);
        visit_params(module, &mut |param| {
            let dims = dims(&param);
            match stand_ins.contains(&param.id()) {
                // It has the dims of the whole parameter, whose rows come next.
                true => whole = Some(dims),
                false => structure.add(&param, whole.take().unwrap_or(dims)),
            }
        });
        structure
    }

    fn add(&mut self, param: &ParamRef<'_>, shape: Vec<usize>) {
        let (id, path, dtype) = (param.id(), param.path(), param.dtype());
        let trained = param.is_trained();
        let note = if param.is_float() && !trained { NOT_TRAINED } else { "" };
        self.ids.push(id);
        self.lines.push((path.clone(), format!("{dtype:?} {shape:?}{note}")));
        // A parameter that the module holds in two places is one parameter.
        if trained && !self.trained.iter().any(|known| known.id == id) {
            let elements = shape.iter().product();
            self.trained.push(TrainedParam { id, path: path.into(), shape, elements, dtype });
        }
    }

    /// Demands that all ranks hold the same structure.
    ///
    /// # Errors
    /// Those of [`params::agree`].
    pub fn agree(&self, group: &Communicator) -> Result<(), Error> {
        params::agree(&self.lines, group)
    }
}

/// Gives every parameter and buffer of the module the values of rank 0, as fresh leaves of this rank's own: replicas
/// that share autodiff leaves would wait for each other's locks in the middle of a collective.
///
/// # Errors
/// Those of [`Communicator::broadcast`].
pub(super) fn broadcast<M: Module>(module: M, group: &Communicator) -> Result<M, Error> {
    broadcast_some(module, group, &|_, _| true)
}

/// Gives what is not trained, running statistics above all, the values of rank 0; but for parameters that are `divided`
/// among the ranks.
///
/// # Errors
/// Those of [`Communicator::broadcast`].
pub(super) fn broadcast_buffers<M: Module>(
    module: M,
    group: &Communicator,
    divided: &dyn Fn(ParamId) -> bool,
) -> Result<M, Error> {
    // A frozen parameter of which each rank holds its rows is no buffer.
    let sharded = ShardedIds::of(&module);
    broadcast_some(module, group, &|id, trained| !trained && !divided(id) && !sharded.contains(id))
}

/// As [`broadcast`], of the parameters and buffers for which `wanted` says so, by their id and whether they are
/// trained.
///
/// # Errors
/// Those of [`Communicator::broadcast`].
pub(super) fn broadcast_some<M: Module>(
    module: M,
    group: &Communicator,
    wanted: &dyn Fn(ParamId, bool) -> bool,
) -> Result<M, Error> {
    let mut mapper = Broadcast { group, seen: HashMap::new(), wanted, outcome: Ok(()) };
    let module = module.map(&mut mapper);
    mapper.outcome.map(|()| module)
}

struct Broadcast<'a> {
    group: &'a Communicator,
    /// Leaves already made, so that a parameter held in two places stays one.
    seen: HashMap<ParamId, Box<dyn std::any::Any>>,
    wanted: &'a dyn Fn(ParamId, bool) -> bool,
    outcome: Result<(), Error>,
}

impl Broadcast<'_> {
    /// An int or a bool.
    fn other<P: Payload>(&mut self, id: ParamId, value: P) -> Option<P> {
        (self.wanted)(id, false).then(|| self.receive(value))?
    }

    fn receive<P: Payload>(&mut self, value: P) -> Option<P> {
        if self.outcome.is_err() {
            return None;
        }
        self.group.broadcast(value, 0).map_err(|error| self.outcome = Err(error)).ok()
    }
}

impl ModuleMapper for Broadcast<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        if let Some(leaf) = self.seen.get(&id).and_then(|leaf| leaf.downcast_ref::<Tensor<D>>()) {
            return Param::from_mapped_value(id, leaf.clone(), mapper);
        }
        let trained = value.is_require_grad();
        // Quantized weights are never trained and do not travel: each rank keeps those it loaded.
        if !(self.wanted)(id, trained) || self.outcome.is_err() || matches!(value.dtype(), DType::QFloat(_)) {
            return Param::from_mapped_value(id, value, mapper);
        }
        let fallback = value.clone();
        let value = self.receive(value);
        let leaf = value.map_or(fallback, |value| if trained { value.require_grad() } else { value });
        self.seen.insert(id, Box::new(leaf.clone()));
        Param::from_mapped_value(id, leaf, mapper)
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let (id, value, mapper) = param.consume();
        let value = self.other(id, value.clone()).unwrap_or(value);
        Param::from_mapped_value(id, value, mapper)
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        let (id, value, mapper) = param.consume();
        let value = self.other(id, value.clone()).unwrap_or(value);
        Param::from_mapped_value(id, value, mapper)
    }
}
