//! Putting a module and its inputs on the capture device, as leaves of `Autodiff<CaptureBackend>`.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use burn::backend::ops::{BoolTensorOps, FloatTensorOps, IntTensorOps};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, AutodiffBackend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchDevice,
    DispatchKindConversion, DispatchTensor, GradientCheckpointingStrategy, TensorMetadata, set_default_dtypes,
};
use burn::module::{Flag, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::prelude::*;
use burn::tensor::{Bool, BoolDType, DType, FloatDType, Int, IntDType, Shape};
use burn_capture::{CaptureBackend, CaptureDevice};
use burn_ir::TensorId;

use super::graph_error;
use super::inputs::TensorMapper;
use crate::error::Error;

pub(super) type AutodiffCapture = Autodiff<CaptureBackend>;
/// A tensor of any kind on the capture device.
pub(super) type Recorded = FloatTensor<CaptureBackend>;
pub(super) type Leaf = FloatTensor<AutodiffCapture>;

/// The default dtypes of a device: floats, ints, bools.
type Dtypes = (FloatDType, IntDType, BoolDType);

thread_local! {
    // burn gives out at most 65,536 capture devices in a process, so each thread keeps its own for good.
    static DEVICES: RefCell<Vec<(Dtypes, Result<CaptureDevice, Error>)>> = const { RefCell::new(Vec::new()) };
}

/// The capture device of this thread with the default dtypes of a device: an index made inside the step must have the dtype of
/// one that comes from outside.
pub(super) fn capture_device_like(home: &Device) -> Result<CaptureDevice, Error> {
    let settings = home.settings();
    let dtypes = (settings.float_dtype, settings.int_dtype, settings.bool_dtype);
    DEVICES.with_borrow_mut(|devices| match devices.iter().find(|(known, _)| *known == dtypes) {
        Some((_, device)) => device.clone(),
        None => {
            let device = with_dtypes(CaptureDevice::default(), dtypes);
            devices.push((dtypes, device.clone()));
            device
        }
    })
}

fn with_dtypes(device: CaptureDevice, (float, int, bool): Dtypes) -> Result<CaptureDevice, Error> {
    let configure = || {
        set_default_dtypes::<CaptureBackend>(&device, float, int, bool)?;
        set_default_dtypes::<Dispatch>(&DispatchDevice::Capture(device), float, int, bool)
    };
    let mut configured = Ok(());
    // Asking the device which dtypes it supports is an operation on it.
    let scope = device.capture_scope(|scope| {
        configured = configure();
        scope.complete([], [])
    });
    let problem = |e: String| {
        graph_error(format!("the capture device cannot be given the dtypes {float:?}, {int:?}, {bool:?}: {e}"))
    };
    scope.map_err(|e| problem(e.to_string()))?;
    configured.map_err(|e| problem(format!("{e:?}")))?;
    Ok(device)
}

/// A tensor at the edge of the graph.
pub(super) struct EdgeTensor {
    pub(super) path: String,
    pub(super) id: TensorId,
    pub(super) shape: Shape,
    pub(super) dtype: DType,
}

pub(super) fn capture_device(device: CaptureDevice) -> Device {
    Device::new(DispatchDevice::Capture(device))
}

/// A tensor of the capture device without data.
pub(super) fn placeholder(device: CaptureDevice, shape: Shape, dtype: DType, what: &str) -> Result<Recorded, Error> {
    if dtype.is_float() {
        Ok(CaptureBackend::float_empty(shape, &device, dtype.into()))
    } else if dtype.is_bool() {
        Ok(CaptureBackend::bool_empty(shape, &device, dtype.into()))
    } else if dtype.is_int() || dtype.is_uint() {
        Ok(CaptureBackend::int_empty(shape, &device, dtype.into()))
    } else {
        Err(graph_error(format!("{what} is {dtype:?}: dequantize it before the capture")))
    }
}

// The static backend type has no checkpointing, the tensor itself says which strategy its operations follow.
fn with_strategy(tensor: BackendTensor<AutodiffCapture>, strategy: GradientCheckpointingStrategy) -> DispatchTensor {
    let mut tensor = <DispatchTensor as DispatchKindConversion<AutodiffCapture>>::from_backend(tensor);
    tensor.autodiff = DispatchAutodiffContext::Enabled(strategy);
    tensor
}

pub(super) fn as_autodiff(mut tensor: DispatchTensor) -> Option<BackendTensor<AutodiffCapture>> {
    if tensor.autodiff != DispatchAutodiffContext::Disabled {
        tensor.autodiff = DispatchAutodiffContext::Enabled(GradientCheckpointingStrategy::Disabled);
    }
    <DispatchTensor as DispatchKindConversion<AutodiffCapture>>::try_into_backend(tensor).ok()
}

fn without_autodiff(tensor: Recorded, dtype: DType) -> DispatchTensor {
    let tensor = if dtype.is_float() {
        BackendTensor::Float(tensor)
    } else if dtype.is_bool() {
        BackendTensor::Bool(tensor)
    } else {
        BackendTensor::Int(tensor)
    };
    <DispatchTensor as DispatchKindConversion<CaptureBackend>>::from_backend(tensor)
}

fn on_autodiff(tensor: Recorded, dtype: DType, strategy: GradientCheckpointingStrategy) -> DispatchTensor {
    let tensor = if dtype.is_float() {
        BackendTensor::Float(AutodiffCapture::from_inner(tensor))
    } else if dtype.is_bool() {
        BackendTensor::Bool(tensor)
    } else {
        BackendTensor::Int(tensor)
    };
    with_strategy(tensor, strategy)
}

/// First pass over the module: every parameter becomes a plain capture tensor without data.
pub(super) struct ToCapture {
    device: CaptureDevice,
    tensors: HashMap<ParamId, Recorded>,
    failed: Option<Error>,
}

impl ToCapture {
    pub(super) fn new(device: CaptureDevice) -> Self {
        Self { device, tensors: HashMap::new(), failed: None }
    }

    /// The tensor of every parameter and running statistic.
    pub(super) fn finish(self) -> Result<HashMap<ParamId, Recorded>, Error> {
        self.failed.map_or(Ok(self.tensors), Err)
    }

    fn empty(&mut self, id: ParamId, shape: Shape, dtype: DType) -> Option<Recorded> {
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

/// Finds the running statistics: a clone from before the first pass shares them, but no parameter.
pub(super) struct RunningStates {
    pub(super) device: Device,
    pub(super) ids: HashSet<ParamId>,
}

impl ModuleVisitor for RunningStates {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.val().device() == self.device {
            self.ids.insert(param.id);
        }
    }
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

pub(super) fn join(path: &[usize]) -> String {
    path.iter().map(usize::to_string).collect::<Vec<_>>().join(".")
}

/// Inputs become capture tensors without data; for training on autodiff, as a batch made on the training device would be:
/// dropout and batch norm ask their input whether this is training.
pub(super) struct CaptureInputs {
    device: CaptureDevice,
    strategy: Option<GradientCheckpointingStrategy>,
    path: Vec<usize>,
    pub(super) inputs: Vec<EdgeTensor>,
}

impl CaptureInputs {
    /// With autodiff if there is a strategy for its checkpoints.
    pub(super) fn new(device: CaptureDevice, strategy: Option<GradientCheckpointingStrategy>) -> Self {
        Self { device, strategy, path: Vec::new(), inputs: Vec::new() }
    }
}

impl TensorMapper for CaptureInputs {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        let (path, shape, dtype) = (join(&self.path), tensor.shape(), tensor.dtype());
        let tensor = placeholder(self.device, shape.clone(), dtype, &format!("input `{path}`"))?;
        self.inputs.push(EdgeTensor { path, id: tensor.id(), shape, dtype });
        Ok(match self.strategy {
            Some(strategy) => on_autodiff(tensor, dtype, strategy),
            None => without_autodiff(tensor, dtype),
        })
    }

    fn enter(&mut self, index: usize) {
        self.path.push(index);
    }

    fn exit(&mut self) {
        self.path.pop();
    }
}

pub(super) struct CaptureOutputs {
    pub(super) path: Vec<usize>,
    pub(super) outputs: Vec<EdgeTensor>,
}

impl CaptureOutputs {
    pub(super) fn new() -> Self {
        Self { path: Vec::new(), outputs: Vec::new() }
    }
}

/// A tensor that was computed on the capture device, as an edge of the graph.
pub(super) fn computed(what: &str, path: String, tensor: &DispatchTensor) -> Result<EdgeTensor, Error> {
    let (shape, dtype) = (tensor.shape(), tensor.dtype());
    let id = match tensor.autodiff {
        DispatchAutodiffContext::Disabled => {
            match <DispatchTensor as DispatchKindConversion<CaptureBackend>>::try_into_backend(tensor.clone()) {
                Ok(BackendTensor::Float(t) | BackendTensor::Int(t) | BackendTensor::Bool(t)) => Some(t.id()),
                _ => None,
            }
        }
        DispatchAutodiffContext::Enabled(_) => match as_autodiff(tensor.clone()) {
            Some(BackendTensor::Float(t)) => Some(t.primitive().id()),
            Some(BackendTensor::Int(t) | BackendTensor::Bool(t)) => Some(t.id()),
            _ => None,
        },
    };
    let id = id.ok_or_else(|| graph_error(format!("{what} was not computed from the module and the inputs")))?;
    Ok(EdgeTensor { path, id, shape, dtype })
}

impl TensorMapper for CaptureOutputs {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        let path = join(&self.path);
        self.outputs.push(computed(&format!("output `{path}`"), path, &tensor)?);
        Ok(tensor)
    }

    fn enter(&mut self, index: usize) {
        self.path.push(index);
    }

    fn exit(&mut self) {
        self.path.pop();
    }
}
