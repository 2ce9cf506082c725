//! burn's capture device, and tensors on it with and without autodiff.

use std::cell::RefCell;

use burn::backend::ops::{BoolTensorOps, FloatTensorOps, IntTensorOps};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, AutodiffBackend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchDevice,
    DispatchKindConversion, DispatchTensor, GradientCheckpointingStrategy, set_default_dtypes,
};
use burn::prelude::*;
use burn::tensor::{BoolDType, DType, FloatDType, IntDType, Shape};
use burn_capture::{CaptureBackend, CaptureDevice};

use super::graph_error;
use crate::Error;

pub(crate) type AutodiffCapture = Autodiff<CaptureBackend>;
/// A tensor of any kind on the capture device.
pub(crate) type CaptureTensor = FloatTensor<CaptureBackend>;

/// The default dtypes of a device: floats, ints, bools.
type Dtypes = (FloatDType, IntDType, BoolDType);

thread_local! {
    // burn gives out at most 65,536 capture devices in a process, so each thread keeps its own until it ends.
    static DEVICES: RefCell<Vec<(Dtypes, Result<CaptureDevice, Error>)>> = const { RefCell::new(Vec::new()) };
}

/// The capture device of this thread with the default dtypes of a device: an index made inside the step must have the
/// dtype of one that comes from outside.
pub(crate) fn capture_device_like(home: &Device) -> Result<CaptureDevice, Error> {
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

pub(crate) fn capture_device(device: CaptureDevice) -> Device {
    Device::new(DispatchDevice::Capture(device))
}

/// A tensor of the capture device without data.
pub(crate) fn placeholder(
    device: CaptureDevice,
    shape: Shape,
    dtype: DType,
    what: &str,
) -> Result<CaptureTensor, Error> {
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

/// The static backend type has no checkpointing, the tensor itself says which strategy its operations follow.
pub(crate) fn with_strategy(
    tensor: BackendTensor<AutodiffCapture>,
    strategy: GradientCheckpointingStrategy,
) -> DispatchTensor {
    let mut tensor = <DispatchTensor as DispatchKindConversion<AutodiffCapture>>::from_backend(tensor);
    tensor.autodiff = DispatchAutodiffContext::Enabled(strategy);
    tensor
}

pub(crate) fn as_autodiff(mut tensor: DispatchTensor) -> Option<BackendTensor<AutodiffCapture>> {
    if tensor.autodiff != DispatchAutodiffContext::Disabled {
        tensor.autodiff = DispatchAutodiffContext::Enabled(GradientCheckpointingStrategy::Disabled);
    }
    <DispatchTensor as DispatchKindConversion<AutodiffCapture>>::try_into_backend(tensor).ok()
}

pub(crate) fn without_autodiff(tensor: CaptureTensor, dtype: DType) -> DispatchTensor {
    let tensor = if dtype.is_float() {
        BackendTensor::Float(tensor)
    } else if dtype.is_bool() {
        BackendTensor::Bool(tensor)
    } else {
        BackendTensor::Int(tensor)
    };
    <DispatchTensor as DispatchKindConversion<CaptureBackend>>::from_backend(tensor)
}

pub(crate) fn on_autodiff(
    tensor: CaptureTensor,
    dtype: DType,
    strategy: GradientCheckpointingStrategy,
) -> DispatchTensor {
    let tensor = if dtype.is_float() {
        BackendTensor::Float(AutodiffCapture::from_inner(tensor))
    } else if dtype.is_bool() {
        BackendTensor::Bool(tensor)
    } else {
        BackendTensor::Int(tensor)
    };
    with_strategy(tensor, strategy)
}
