//! Recording a training step of an unmodified module.
//!
//! burn's capture device records tensor code, but has no autodiff of its own: `Device::capture().autodiff()` panics. So
//! the leaves are made here, on `Autodiff<CaptureBackend>`, and the concrete backward of that backend is called. Parameters
//! and inputs enter as tensors *without data*: nothing is copied, and a `forward` that reads them on the host fails
//! instead of freezing what it read.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::backend::ops::{BoolTensorOps, FloatTensorOps, IntTensorOps};
use burn::backend::tensor::FloatTensor;
use burn::backend::flex::FlexDevice;
use burn::backend::{
    Autodiff, AutodiffBackend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchDevice, DispatchKindConversion,
    DispatchTensor, Flex, GradientCheckpointingStrategy, TensorMetadata, get_device_settings, set_default_dtypes,
};
use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::prelude::*;
use burn::tensor::{Bool, DType, Int, Shape};
use burn_capture::{CaptureBackend, CaptureDevice, CapturedGraph};
use burn_ir::TensorId;

use super::inputs::{GraphInputs, TensorMapper};
use super::module::Survey;
use super::step::StepGraph;
use super::{assemble, graph_error, panic_text};
use crate::error::Error;

type AutodiffCapture = Autodiff<CaptureBackend>;
/// A tensor of any kind on the capture device.
type Recorded = FloatTensor<CaptureBackend>;
type Leaf = FloatTensor<AutodiffCapture>;

thread_local! {
    // burn gives out at most 65,536 capture devices in a process, so each thread keeps its own for good.
    static DEVICE: Result<CaptureDevice, Error> = like_flex(CaptureDevice::default());
}

/// Gives a new capture device the default dtypes of Flex: an index made inside the step must have the dtype of one that
/// comes from outside.
fn like_flex(device: CaptureDevice) -> Result<CaptureDevice, Error> {
    let configure = || {
        let flex = get_device_settings::<Flex>(&FlexDevice);
        set_default_dtypes::<CaptureBackend>(&device, flex.float_dtype, flex.int_dtype, flex.bool_dtype)?;
        let flex = Device::flex().settings();
        let device = DispatchDevice::Capture(device);
        set_default_dtypes::<Dispatch>(&device, flex.float_dtype, flex.int_dtype, flex.bool_dtype)
    };
    let mut configured = Ok(());
    // Asking the device which dtypes it supports is an operation on it.
    let scope = device.capture_scope(|scope| {
        configured = configure();
        scope.complete([], [])
    });
    let problem = |e: String| graph_error(format!("the capture device cannot be given the dtypes of Flex: {e}"));
    scope.map_err(|e| problem(e.to_string()))?;
    configured.map_err(|e| problem(format!("{e:?}")))?;
    Ok(device)
}

/// What the closure of [`capture_step`] may return: the loss, or the loss and further outputs.
pub trait StepLoss {
    /// Separates the loss and hands the further outputs to `mapper`.
    ///
    /// # Errors
    /// Those of the mapper.
    fn split(self, mapper: &mut dyn TensorMapper) -> Result<Tensor<1>, Error>;
}

impl StepLoss for Tensor<1> {
    fn split(self, _: &mut dyn TensorMapper) -> Result<Tensor<1>, Error> {
        Ok(self)
    }
}

impl<O: GraphInputs> StepLoss for (Tensor<1>, O) {
    fn split(self, mapper: &mut dyn TensorMapper) -> Result<Tensor<1>, Error> {
        self.1.map_tensors(mapper)?;
        Ok(self.0)
    }
}

/// Records one training step of `model`: `loss` on `inputs`, and the backward pass.
///
/// The module is taken in training mode, as after [`Module::train`]: parameters require gradients and flags are on unless
/// they were frozen. `model` and `inputs` stay as they are, on whatever device with or without autodiff. The inputs give
/// shapes and dtypes only. `loss` must be computed from the module and the inputs that the closure is given; it must have
/// one element. Extra outputs are returned beside it: `|model, x| (loss, (logits, accuracy))`.
///
/// If the module's device checkpoints gradients ([`Device::gradient_checkpointing`]), the recomputation is in the graph.
///
/// # Errors
/// [`Error::Graph`] saying what to do, if the step cannot be recorded (see [the module page](super)), if the loss has more
/// than one element, or does not depend on a trainable parameter. burn reports some of these as panics, which are caught;
/// their message still goes through the panic hook.
pub fn capture_step<M, I, F, R>(model: &M, inputs: I, loss: F) -> Result<StepGraph, Error>
where
    M: Module,
    I: GraphInputs,
    F: FnOnce(&M, I) -> R,
    R: StepLoss,
{
    let device = DEVICE.with(Clone::clone)?;
    let mut recording = Err(graph_error("nothing was recorded"));
    // The closure's state cannot be seen again after a panic: `model` is only cloned, the rest is moved in.
    let captured = catch_unwind(AssertUnwindSafe(|| {
        device.capture_scope(|scope| {
            recording = record(device, model, inputs, loss);
            // Inputs and outputs are told apart here, not by burn: they enter as operations without data.
            scope.complete([], [])
        })
    }));
    let captured: CapturedGraph = match captured {
        Ok(Ok(captured)) => captured,
        Ok(Err(error)) => {
            return Err(match recording {
                Err(problem) => problem,
                Ok(_) => graph_error(format!(
                    "the step reads a tensor that was made outside it ({error}): pass it as an input, or keep it in the \
                     module"
                )),
            });
        }
        Err(payload) => return Err(explain(&panic_text(payload))),
    };
    assemble::assemble(captured, recording?)
}

/// What the closure of a capture leaves behind, in the capture's own tensor ids.
pub(super) struct Recording {
    pub(super) survey: Survey,
    /// Tensor of every parameter and running statistic.
    pub(super) params: HashMap<ParamId, TensorId>,
    pub(super) running: HashSet<ParamId>,
    pub(super) gradients: HashMap<ParamId, TensorId>,
    pub(super) inputs: Vec<EdgeTensor>,
    pub(super) outputs: Vec<EdgeTensor>,
    pub(super) loss: EdgeTensor,
    /// An operation that stands between forward and backward.
    pub(super) marker: TensorId,
}

/// A tensor at the edge of the graph.
pub(super) struct EdgeTensor {
    pub(super) path: String,
    pub(super) id: TensorId,
    pub(super) shape: Shape,
    pub(super) dtype: DType,
}

fn record<M, I, F, R>(device: CaptureDevice, model: &M, inputs: I, loss: F) -> Result<Recording, Error>
where
    M: Module,
    I: GraphInputs,
    F: FnOnce(&M, I) -> R,
    R: StepLoss,
{
    let train = model.clone().train();
    let survey = Survey::of(&train);
    let strategy = survey.strategy.unwrap_or_default();

    // `valid` also unshares the running statistics, so that mapping them does not reach the original module.
    let valid = train.valid();
    let before = valid.clone();
    let mut empty = ToCapture { device, tensors: HashMap::new(), failed: None };
    let captured = valid.map(&mut empty);
    if let Some(error) = empty.failed {
        return Err(error);
    }
    let mut running = RunningStates { device: capture_device(device), ids: HashSet::new() };
    before.visit(&mut running);

    let flags = survey.flags.iter().map(|(_, id, on)| (*id, *on)).collect();
    let trainable = survey.trainable();
    let mut leaves = ToLeaves { strategy, trainable, flags, running: running.ids, leaves: HashMap::new(), failed: None };
    // Parameters are there already; this moves the module's other tensors, which become constants.
    let captured = captured.to_device(&capture_device(device)).map(&mut leaves);
    if let Some(error) = leaves.failed {
        return Err(error);
    }

    let mut edge = CaptureInputs { device, strategy, path: Vec::new(), inputs: Vec::new() };
    let inputs = inputs.map_tensors(&mut edge)?;

    let mut outputs = CaptureOutputs { path: Vec::new(), outputs: Vec::new() };
    let loss = loss(&captured, inputs).split(&mut outputs)?;
    let (loss, tracked) = check_loss(loss)?;
    let marker = CaptureBackend::float_empty(Shape::new([1]), &device, DType::F32.into()).id();

    let mut found = AutodiffCapture::backward(tracked);
    let gradients = leaves.leaves.iter().filter_map(|(id, leaf)| {
        let gradient = if leaves.trainable.contains(id) { AutodiffCapture::grad_remove(leaf, &mut found) } else { None };
        gradient.map(|gradient| (*id, gradient.id()))
    });
    let gradients = gradients.collect();
    Ok(Recording {
        survey,
        params: empty.tensors.iter().map(|(id, tensor)| (*id, tensor.id())).collect(),
        running: leaves.running,
        gradients,
        inputs: edge.inputs,
        outputs: outputs.outputs,
        loss,
        marker,
    })
}

fn check_loss(loss: Tensor<1>) -> Result<(EdgeTensor, Leaf), Error> {
    let [elements] = loss.dims();
    if elements != 1 {
        return Err(graph_error(format!(
            "the loss must have one element, but it has {elements}: reduce it with `.mean()` or `.sum()`"
        )));
    }
    let loss = loss.into_dispatch();
    let (shape, dtype) = (loss.shape(), loss.dtype());
    let unconnected = "the loss does not depend on any trainable parameter: compute it from the module and the inputs that \
                       the closure is given, and check that the module is not frozen";
    let Some(BackendTensor::Float(tracked)) = as_autodiff(loss) else {
        return Err(graph_error(unconnected));
    };
    if !tracked.is_tracked() {
        return Err(graph_error(unconnected));
    }
    Ok((EdgeTensor { path: "loss".into(), id: tracked.primitive().id(), shape, dtype }, tracked))
}

fn capture_device(device: CaptureDevice) -> Device {
    Device::new(DispatchDevice::Capture(device))
}

/// A tensor of the capture device without data.
fn empty(device: CaptureDevice, shape: Shape, dtype: DType, what: &str) -> Result<Recorded, Error> {
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

fn as_autodiff(mut tensor: DispatchTensor) -> Option<BackendTensor<AutodiffCapture>> {
    if tensor.autodiff != DispatchAutodiffContext::Disabled {
        tensor.autodiff = DispatchAutodiffContext::Enabled(GradientCheckpointingStrategy::Disabled);
    }
    <DispatchTensor as DispatchKindConversion<AutodiffCapture>>::try_into_backend(tensor).ok()
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
struct ToCapture {
    device: CaptureDevice,
    tensors: HashMap<ParamId, Recorded>,
    failed: Option<Error>,
}

impl ToCapture {
    fn empty(&mut self, id: ParamId, shape: Shape, dtype: DType) -> Option<Recorded> {
        if let Some(tied) = self.tensors.get(&id) {
            if tied.shape() == shape {
                return Some(tied.clone());
            }
            let (a, b) = (tied.shape(), shape);
            self.failed = Some(graph_error(format!("two parameters of shapes {a:?} and {b:?} have the id {id}")));
            return None;
        }
        match empty(self.device, shape, dtype, "a parameter") {
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
struct RunningStates {
    device: Device,
    ids: HashSet<ParamId>,
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
struct ToLeaves {
    strategy: GradientCheckpointingStrategy,
    trainable: HashSet<ParamId>,
    flags: HashMap<ParamId, bool>,
    running: HashSet<ParamId>,
    leaves: HashMap<ParamId, Leaf>,
    failed: Option<Error>,
}

impl ToLeaves {
    fn recorded<T, E: core::fmt::Debug>(&mut self, primitive: Result<T, E>) -> Option<T> {
        primitive.map_err(|e| self.failed = Some(graph_error(format!("a parameter left the capture device: {e:?}")))).ok()
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
        let leaf = self.leaves.entry(id).or_insert_with(|| {
            AutodiffCapture::float_set_require_grad(AutodiffCapture::from_inner(tensor), trainable)
        });
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

/// Inputs become capture tensors without data, on autodiff as a batch made on the training device would be: dropout and
/// batch norm ask their input whether this is training.
struct CaptureInputs {
    device: CaptureDevice,
    strategy: GradientCheckpointingStrategy,
    path: Vec<usize>,
    inputs: Vec<EdgeTensor>,
}

impl TensorMapper for CaptureInputs {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        let (path, shape, dtype) = (join(&self.path), tensor.shape(), tensor.dtype());
        let tensor = empty(self.device, shape.clone(), dtype, &format!("input `{path}`"))?;
        self.inputs.push(EdgeTensor { path, id: tensor.id(), shape, dtype });
        Ok(on_autodiff(tensor, dtype, self.strategy))
    }

    fn enter(&mut self, index: usize) {
        self.path.push(index);
    }

    fn exit(&mut self) {
        self.path.pop();
    }
}

struct CaptureOutputs {
    path: Vec<usize>,
    outputs: Vec<EdgeTensor>,
}

impl TensorMapper for CaptureOutputs {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        let (path, shape, dtype) = (join(&self.path), tensor.shape(), tensor.dtype());
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
        let id = id.ok_or_else(|| graph_error(format!("output `{path}` was not computed from the module and the inputs")))?;
        self.outputs.push(EdgeTensor { path, id, shape, dtype });
        Ok(tensor)
    }

    fn enter(&mut self, index: usize) {
        self.path.push(index);
    }

    fn exit(&mut self) {
        self.path.pop();
    }
}

/// What to do about a panic of burn during a capture.
fn explain(panic: &str) -> Error {
    let says = |words: &[&str]| words.iter().any(|words| panic.contains(words));
    let advice = if says(&["Cannot move"]) {
        "`to_device` inside the step cannot be recorded: move tensors before the step. A `BatchNorm` that is called twice \
         in one forward does the same; give each call its own `BatchNorm`"
    } else if says(&["no concrete value", "no initialized value"]) {
        "the step reads a tensor on the host (`into_scalar`, `into_data`, `to_data`), which has no value while the graph is \
         recorded: keep such decisions outside the step, or express them with tensor operations (`mask_where`)"
    } else if says(&["seeding"]) {
        "the step seeds a device: seed before the step"
    } else if says(&["not on the same device", "not on the same backend", "wrong backend"]) {
        "the step uses a tensor that is neither an input nor part of the module: pass it as an input"
    } else {
        "the step panicked while it was recorded; does it run eagerly?"
    };
    graph_error(format!("{advice} (burn said: {panic})"))
}
