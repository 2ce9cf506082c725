//! Puts a module on the capture device, its parameters as leaves of `Autodiff<CaptureBackend>`.

use std::collections::{HashMap, HashSet};

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{AutodiffBackend, BackendTensor, GradientCheckpointingStrategy, TensorMetadata};
use burn::module::{Flag, Module, ModuleMapper, Param, ParamId};
use burn::prelude::*;
use burn::tensor::{Bool, DType, Int, Shape};
use burn_capture::{CaptureBackend, CaptureDevice};

use super::device::{AutodiffCapture, CaptureTensor, placeholder, with_strategy};
use super::graph_error;
use crate::Error;
use crate::params::visit_floats;

pub(super) type Leaf = FloatTensor<AutodiffCapture>;

/// First pass over the module: every parameter becomes a plain capture tensor without data.
pub(super) struct ToCapture {
    device: CaptureDevice,
    tensors: HashMap<ParamId, CaptureTensor>,
    failed: Option<Error>,
}

impl ToCapture {
    pub(super) fn new(device: CaptureDevice) -> Self {
        Self { device, tensors: HashMap::new(), failed: None }
    }

    /// The tensor of every parameter and running statistic.
    pub(super) fn finish(self) -> Result<HashMap<ParamId, CaptureTensor>, Error> {
        self.failed.map_or(Ok(self.tensors), Err)
    }

    fn empty(&mut self, id: ParamId, shape: Shape, dtype: DType) -> Option<CaptureTensor> {
        if let Some(tied) = self.tensors.get(&id) {
            if tied.shape() == shape {
                return Some(tied.clone());
            }
            let (a, b) = (tied.shape(), shape);
            self.failed = Some(graph_error(format!("two parameters of shapes {a:?} and {b:?} have the id {id}")));
            return None;
        }
        match placeholder(self.device, shape, dtype, "a parameter") {
            Ok(tensor) => Some(self.tensors.entry(id).or_insert(tensor).clone()),
            Err(error) => {
                self.failed = Some(error);
                None
            }
        }
    }
}

macro_rules! map_to_capture {
    ($($name:ident $kind:ty),*) => {$(
        fn $name<const D: usize>(&mut self, param: Param<Tensor<D, $kind>>) -> Param<Tensor<D, $kind>> {
            let value = param.val();
            match self.empty(param.id, value.shape(), value.dtype()) {
                Some(tensor) => Param::initialized(param.id, Tensor::from_primitive::<CaptureBackend>(tensor)),
                None => param,
            }
        }
    )*};
}

impl ModuleMapper for ToCapture {
    map_to_capture!(map_float Float, map_int Int, map_bool Bool);
}

/// The ids of the running statistics: a clone from before the first pass shares them, but no parameter.
pub(super) fn running_states<M: Module>(before: &M, device: &Device) -> HashSet<ParamId> {
    let mut ids = HashSet::new();
    visit_floats(before, &mut |param| {
        if param.device() == *device {
            ids.insert(param.id());
        }
    });
    ids
}

/// Second pass: parameters become leaves of the autodiff graph, flags get back what `valid` turned off.
///
/// Running statistics stay without autodiff, because `BatchNorm` moves them with `to_device`, which burn refuses for an
/// autodiff tensor of the capture device.
pub(super) struct ToLeaves {
    strategy: GradientCheckpointingStrategy,
    pub(super) trainable: HashSet<ParamId>,
    flags: HashMap<ParamId, bool>,
    pub(super) running: HashSet<ParamId>,
    pub(super) leaves: HashMap<ParamId, Leaf>,
    failed: Option<Error>,
}

impl ToLeaves {
    pub(super) fn new(
        strategy: GradientCheckpointingStrategy,
        trainable: HashSet<ParamId>,
        flags: HashMap<ParamId, bool>,
        running: HashSet<ParamId>,
    ) -> Self {
        Self { strategy, trainable, flags, running, leaves: HashMap::new(), failed: None }
    }

    pub(super) fn check(&mut self) -> Result<(), Error> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn recorded<T, E: core::fmt::Debug>(&mut self, primitive: Result<T, E>) -> Option<T> {
        primitive
            .map_err(|e| self.failed = Some(graph_error(format!("a parameter left the capture device: {e:?}"))))
            .ok()
    }
}

impl ModuleMapper for ToLeaves {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let id = param.id;
        if self.running.contains(&id) {
            return param;
        }
        let Some(tensor) = self.recorded(param.val().try_into_primitive::<CaptureBackend>()) else { return param };
        let trainable = self.trainable.contains(&id);
        let leaf = self
            .leaves
            .entry(id)
            .or_insert_with(|| AutodiffCapture::float_set_require_grad(AutodiffCapture::from_inner(tensor), trainable));
        let leaf = with_strategy(BackendTensor::Float(leaf.clone()), self.strategy);
        Param::initialized(id, Tensor::from_dispatch(leaf))
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let Some(tensor) = self.recorded(param.val().try_into_primitive::<CaptureBackend>()) else { return param };
        Param::initialized(param.id, Tensor::from_dispatch(with_strategy(BackendTensor::Int(tensor), self.strategy)))
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        let Some(tensor) = self.recorded(param.val().try_into_primitive::<CaptureBackend>()) else { return param };
        Param::initialized(param.id, Tensor::from_dispatch(with_strategy(BackendTensor::Bool(tensor), self.strategy)))
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        match self.flags.get(&flag.id) {
            Some(on) => flag.with_value(*on),
            None => flag,
        }
    }
}
