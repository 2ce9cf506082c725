//! Reading and writing the parameters of an ordinary module by their ids.

use std::collections::{HashMap, HashSet};

use burn::backend::{DispatchTensor, GradientCheckpointingStrategy};
use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn::tensor::{Bool, DType, Int, Shape};

use super::graph_error;
use crate::error::Error;
use crate::params::{one_device, with_autodiff};
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
    path: ModulePath,
}

#[derive(Default)]
pub(crate) struct ModulePath(Vec<(String, String)>);

impl ModulePath {
    pub(crate) fn enter(&mut self, name: &str, container: &str) {
        self.0.push((name.into(), container.into()));
    }

    pub(crate) fn exit(&mut self) {
        self.0.pop();
    }

    pub(crate) fn text(&self) -> String {
        self.0.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(".")
    }
}

impl Inventory {
    pub(crate) fn of<M: Module>(module: &M) -> Self {
        let mut inventory = Self::default();
        module.visit(&mut inventory);
        inventory
    }

    /// The ids of all parameters that require a gradient.
    pub(crate) fn trainable(&self) -> HashSet<ParamId> {
        self.tensors.iter().filter(|t| t.trainable).map(|t| t.id).collect()
    }

    fn add(&mut self, id: ParamId, shape: Shape, dtype: DType, trainable: bool) {
        let holder = self.path.0.last().map(|(_, container)| container.clone()).unwrap_or_default();
        self.tensors.push(InventoryEntry { path: self.path.text(), holder, id, shape, dtype, trainable });
    }
}

impl ModuleVisitor for Inventory {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        if self.strategy.is_none() {
            self.strategy = tensor.gradient_checkpointing_strategy();
        }
        self.add(param.id, tensor.shape(), tensor.dtype(), tensor.is_require_grad());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.add(param.id, param.val().shape(), param.val().dtype(), false);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.add(param.id, param.val().shape(), param.val().dtype(), false);
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        self.flags.push((self.path.text(), flag.id, flag.is_enabled()));
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
}

/// The current values of the wanted parameters, sharing their buffers.
pub(crate) fn read_params<M: Module>(
    module: &M,
    wanted: &HashSet<ParamId>,
) -> Result<HashMap<ParamId, PlainTensor>, Error> {
    let read = ReadParams::of(module, wanted);
    read.failed.map_or(Ok(read.values), Err)
}

/// As [`read_params`], with the one device, without autodiff, of all parameters of the module; `None` if there are none.
///
/// # Errors
/// Those of [`read_params`] and of [`one_device`].
pub(crate) fn read_for_step<M: Module>(
    module: &M,
    wanted: &HashSet<ParamId>,
) -> Result<(HashMap<ParamId, PlainTensor>, Option<Device>), Error> {
    let read = ReadParams::of(module, wanted);
    if read.several {
        one_device(module, "a step")?;
    }
    read.failed.map_or(Ok((read.values, read.device)), Err)
}

struct ReadParams<'a> {
    wanted: &'a HashSet<ParamId>,
    values: HashMap<ParamId, PlainTensor>,
    path: ModulePath,
    /// The device of the first parameter, and whether another one is elsewhere.
    device: Option<Device>,
    several: bool,
    failed: Option<Error>,
}

impl<'a> ReadParams<'a> {
    fn of<M: Module>(module: &M, wanted: &'a HashSet<ParamId>) -> Self {
        let (values, path) = (HashMap::new(), ModulePath::default());
        let mut read = Self { wanted, values, path, device: None, several: false, failed: None };
        module.visit(&mut read);
        read
    }

    fn on(&mut self, device: Device) {
        let device = device.inner();
        match &self.device {
            None => self.device = Some(device),
            Some(first) => self.several |= *first != device,
        }
    }

    fn add(&mut self, id: ParamId, tensor: impl FnOnce() -> DispatchTensor) {
        if self.failed.is_some() || !self.wanted.contains(&id) {
            return;
        }
        let path = self.path.text();
        match PlainTensor::of(tensor(), &format!("parameter `{path}`")) {
            Err(error) => self.failed = Some(error),
            Ok(value) => match self.values.get(&id) {
                // Tied weights are one value in several places. burn's optimizers update only the first place they
                // meet, which silently unties them.
                Some(first) if !same_buffer(first, &value) => {
                    self.failed = Some(graph_error(format!(
                        "parameter `{path}` shares its id with another parameter but no longer its value: burn's \
                         optimizers update only the first of several parameters with one id. Keep one `Param` and use \
                         it twice in `forward`"
                    )));
                }
                Some(_) => {}
                None => drop(self.values.insert(id, value)),
            },
        }
    }
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

impl ModuleVisitor for ReadParams<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.on(param.lazy_device());
        self.add(param.id, || param.val().into_dispatch());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.on(param.lazy_device());
        self.add(param.id, || param.val().into_dispatch());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.on(param.lazy_device());
        self.add(param.id, || param.val().into_dispatch());
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
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
    let mut register = RegisterGradients { gradients, params: GradientsParams::new() };
    module.visit(&mut register);
    register.params
}

struct RegisterGradients {
    gradients: HashMap<ParamId, PlainTensor>,
    params: GradientsParams,
}

impl ModuleVisitor for RegisterGradients {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove(&param.id).and_then(|gradient| gradient.float::<D>().ok()) {
            self.params.register::<D>(param.id, gradient);
        }
    }
}
