//! The inventory of a module, and reading and writing its parameters by their ids.

use std::collections::{HashMap, HashSet};

use burn::backend::{GradientCheckpointingStrategy, TensorMetadata};
use burn::module::{Flag, Module, ModuleMapper, Param, ParamId};
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn::tensor::{DType, Shape};

use super::graph_error;
use crate::Error;
use crate::params::{FoundParams, ModulePath, ParamRef, visit_params_and_flags, with_autodiff};
use crate::tensor::PlainTensor;

/// One float, int or bool parameter or running statistic.
pub(crate) struct InventoryEntry {
    pub(crate) path: String,
    /// The type that holds it, as in `Struct:BatchNorm`.
    pub(crate) holder: String,
    pub(crate) id: ParamId,
    pub(crate) shape: Shape,
    pub(crate) dtype: DType,
    pub(crate) trainable: bool,
}

/// What a module is made of, in the order in which a visitor meets it.
#[derive(Default)]
pub(crate) struct Inventory {
    pub(crate) tensors: Vec<InventoryEntry>,
    /// Path, id and value of every training flag.
    pub(crate) flags: Vec<(String, ParamId, bool)>,
    pub(crate) strategy: Option<GradientCheckpointingStrategy>,
}

impl Inventory {
    pub(crate) fn of<M: Module>(module: &M) -> Self {
        let mut inventory = Self::default();
        let Self { tensors, flags, strategy } = &mut inventory;
        let mut tensor = |param: ParamRef<'_>| {
            *strategy = strategy.or_else(|| param.checkpointing());
            let value = param.value();
            tensors.push(InventoryEntry {
                path: param.path(),
                holder: param.module_path().holder().to_owned(),
                id: param.id(),
                shape: value.shape(),
                dtype: value.dtype(),
                trainable: param.is_trained(),
            });
        };
        let mut flag = |flag: &Param<Flag>, path: &ModulePath| flags.push((path.text(), flag.id, flag.is_enabled()));
        visit_params_and_flags(module, &mut tensor, &mut flag);
        inventory
    }

    /// The ids of all parameters that require a gradient.
    pub(crate) fn trainable(&self) -> HashSet<ParamId> {
        self.tensors.iter().filter(|t| t.trainable).map(|t| t.id).collect()
    }
}

/// The current values of the wanted parameters, sharing their buffers.
///
/// # Errors
/// [`Error::Graph`] for one that is quantized, or that has lost its ties.
pub(crate) fn read_params<M: Module>(
    module: &M,
    wanted: &HashSet<ParamId>,
) -> Result<HashMap<ParamId, PlainTensor>, Error> {
    read_found(&FoundParams::of(module), module, wanted)
}

/// As [`read_params`], of what was found in a module.
///
/// # Errors
/// Those of [`read_params`].
pub(crate) fn read_found<M: Module>(
    params: &FoundParams,
    module: &M,
    wanted: &HashSet<ParamId>,
) -> Result<HashMap<ParamId, PlainTensor>, Error> {
    let mut values = HashMap::new();
    for param in params.all().filter(|param| wanted.contains(&param.id())) {
        let id = param.id();
        // Nothing but an error needs the path.
        let value = PlainTensor::of(param.value(), "")
            .or_else(|_| PlainTensor::of(param.value(), &format!("parameter `{}`", param.path_in(module))))?;
        match values.get(&id) {
            // Tied weights are one value in several places. burn's optimizers update only the first place they meet,
            // which silently unties them.
            Some(first) if !same_buffer(first, &value) => {
                return Err(graph_error(format!(
                    "parameter `{}` shares its id with another parameter but no longer its value: burn's optimizers \
                     update only the first of several parameters with one id. Keep one `Param` and use it twice in \
                     `forward`",
                    param.path_in(module)
                )));
            }
            Some(_) => {}
            None => drop(values.insert(id, value)),
        }
    }
    Ok(values)
}

/// What is known of the parameters of a module before a step reads them; by default nothing.
#[derive(Clone, Copy, Default)]
pub(crate) struct StepParams<'a> {
    /// What was found in the module.
    pub(crate) found: Option<&'a FoundParams>,
    /// Values that take the place of those that the module has.
    pub(crate) whole: Option<&'a HashMap<ParamId, PlainTensor>>,
}

/// The values that a step takes of the wanted parameters, and the one device, without autodiff, of all parameters of
/// the module; `None` if there are none. Of what was found in the module before, unless running statistics may have
/// moved since: a step that `moves` them brings them up to date first.
///
/// # Errors
/// Those of [`read_params`] and of [`one_device`](crate::params::one_device).
pub(crate) fn read_for_step<M: Module>(
    module: &M,
    StepParams { found, whole }: StepParams<'_>,
    moves: bool,
    wanted: &HashSet<ParamId>,
) -> Result<(HashMap<ParamId, PlainTensor>, Option<Device>), Error> {
    if moves {
        // An eager forward before this step may have left updates pending in the running statistics, which only
        // `valid` applies.
        let _ = module.valid();
    }
    let params = match found.filter(|found| !moves && !found.statistics_moved()) {
        Some(found) => found,
        None => &FoundParams::of(module),
    };
    let device = params.one_device(module, "a step")?;
    let mut values = read_found(params, module, wanted)?;
    for (id, value) in whole.into_iter().flatten() {
        values.entry(*id).and_modify(|part| *part = value.clone());
    }
    Ok((values, device))
}

pub(crate) fn same_buffer(a: &PlainTensor, b: &PlainTensor) -> bool {
    if a.shape() != b.shape() || a.device() != b.device() {
        return false;
    }
    #[cfg(feature = "cubecl")]
    if !a.on_flex() {
        return crate::comm::same_buffer(a, b);
    }
    match (a.clone().into_flex(), b.clone().into_flex()) {
        (Ok(a), Ok(b)) => a.bytes().as_ptr() == b.bytes().as_ptr(),
        _ => false,
    }
}

/// Gives running statistics new values, seen by every clone of the module, as after an eager forward.
pub(crate) fn write_running_states<M: Module>(module: &M, values: HashMap<ParamId, PlainTensor>) {
    if !values.is_empty() {
        // A `RunningState` writes what the mapper returns through to the state that its clones share.
        let _ = module.clone().map(&mut WriteRunningStates(values));
    }
}

struct WriteRunningStates(HashMap<ParamId, PlainTensor>);

impl ModuleMapper for WriteRunningStates {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.get(&param.id).and_then(|value| value.clone().float::<D>().ok()) {
            None => param,
            Some(value) => {
                let value = match param.val().gradient_checkpointing_strategy() {
                    Some(strategy) => with_autodiff(value, strategy),
                    None => value,
                };
                Param::initialized(param.id, value)
            }
        }
    }
}

/// Gradients by parameter id as burn's optimizers take them.
///
/// `module` gives the rank of each parameter; an id that is not in it is ignored. Nothing is copied.
pub fn gradients_params<M: Module>(module: &M, gradients: HashMap<ParamId, PlainTensor>) -> GradientsParams {
    found_gradients(&FoundParams::of(module), gradients)
}

/// As [`gradients_params`], of what was found in a module.
pub(crate) fn found_gradients(params: &FoundParams, mut gradients: HashMap<ParamId, PlainTensor>) -> GradientsParams {
    params.put_gradients(&mut |param| gradients.remove(&param.id())).0
}
