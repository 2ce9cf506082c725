//! Tensors whose kind, rank and device are known at run time only: what parameters, gradients, activations and messages are
//! to everything below a model.

use std::ops::Range;

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::ops::{BoolTensorOps, FloatTensorOps, IntTensorOps};
use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchDevice, DispatchKindConversion, DispatchTensor,
    Flex, TensorMetadata,
};
use burn::tensor::kind::{Autodiff, Basic};
use burn::tensor::{Bool, DType, Device, Int, Scalar, Shape, Slice, Tensor, TensorData};

use crate::Error;

/// Runs `$body` with `$B` bound to the backend of a device without autodiff, or evaluates `$otherwise` if this crate knows
/// none.
macro_rules! with_backend {
    ($device:expr, $B:ident => $body:expr, otherwise $otherwise:expr) => {
        match $device.as_dispatch() {
            burn::backend::DispatchDevice::Flex(_) => {
                type $B = burn::backend::Flex;
                $body
            }
            #[cfg(feature = "cubecl")]
            burn::backend::DispatchDevice::Cube(_) => {
                type $B = burn::backend::Cube;
                $body
            }
            #[allow(unreachable_patterns)]
            _ => $otherwise,
        }
    };
}
pub(crate) use with_backend;

/// Demands a device that steps can run on. What is wrong with another is said, to be put into an error.
pub(crate) fn check_device(device: &Device) -> Result<(), String> {
    with_backend!(device, B => { let _ = std::marker::PhantomData::<B>; Ok(()) }, otherwise Err(format!(
        "{device:?} is not a device that steps run on: they run on Device::flex(), and, with the feature `cuda` or `wgpu` of \
         burn-parallel, on those of burn's CubeCL backends"
    )))
}

/// A tensor of any kind, rank and device, without autodiff.
///
/// It shares its buffer with the tensor that it was made of, and operations work in place where nobody else holds that.
#[derive(Clone, Debug)]
pub struct PlainTensor(DispatchTensor);

/// Whether a tensor holds floats, ints or bools. Its dtype says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Float,
    Int,
    Bool,
}

impl Kind {
    fn of(dtype: DType) -> Self {
        match dtype {
            dtype if dtype.is_bool() => Self::Bool,
            dtype if dtype.is_int() || dtype.is_uint() => Self::Int,
            _ => Self::Float,
        }
    }
}

/// The tensor off its tape.
impl<const D: usize, K: Basic + Autodiff> From<Tensor<D, K>> for PlainTensor {
    fn from(tensor: Tensor<D, K>) -> Self {
        Self(tensor.inner().into_dispatch())
    }
}

impl PlainTensor {
    /// A tensor of any kind, off its tape.
    ///
    /// # Errors
    /// [`Error::Graph`] if it is quantized; `what` is what the error calls it.
    pub(crate) fn of(tensor: DispatchTensor, what: &str) -> Result<Self, Error> {
        let dtype = tensor.dtype();
        if !(dtype.is_float() || dtype.is_int() || dtype.is_uint() || dtype.is_bool()) {
            let problem = format!("{what} is {dtype:?}: quantized tensors cannot enter a graph");
            return Err(Error::Graph { problem });
        }
        if tensor.autodiff == DispatchAutodiffContext::Disabled {
            return Ok(Self(tensor));
        }
        // A primitive carries no static rank: the `1` in between is not looked at.
        Ok(match Kind::of(dtype) {
            Kind::Float => Self::from(Tensor::<1>::from_dispatch(tensor)),
            Kind::Int => Self::from(Tensor::<1, Int>::from_dispatch(tensor)),
            Kind::Bool => Self::from(Tensor::<1, Bool>::from_dispatch(tensor)),
        })
    }

    /// Zeros, or falses, on a device.
    pub(crate) fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Self {
        let (shape, device) = (shape.into(), device.as_dispatch());
        Self(match Kind::of(dtype) {
            Kind::Float => Dispatch::float_zeros(shape, device, dtype.into()),
            Kind::Int => Dispatch::int_zeros(shape, device, dtype.into()),
            Kind::Bool => Dispatch::bool_zeros(shape, device, dtype.into()),
        })
    }

    /// These values on a device, in their own dtype; bools as the device stores them.
    pub(crate) fn from_data(data: TensorData, device: &Device) -> Self {
        let kind = Kind::of(data.dtype());
        let stored = if kind == Kind::Bool { device.settings().bool_dtype.into() } else { data.dtype() };
        let data = if data.dtype() == stored { data } else { data.convert_dtype(stored) };
        let device = device.as_dispatch();
        Self(match kind {
            Kind::Float => Dispatch::float_from_data(data, device),
            Kind::Int => Dispatch::int_from_data(data, device),
            Kind::Bool => Dispatch::bool_from_data(data, device),
        })
    }

    /// The tensor as an ordinary float tensor of rank `D`, without a copy.
    ///
    /// # Errors
    /// [`Error::Graph`] if it is of another kind or rank.
    pub fn float<const D: usize>(self) -> Result<Tensor<D>, Error> {
        self.fits("float", Kind::Float, D).map(Tensor::from_dispatch)
    }

    /// The tensor as an ordinary int tensor of rank `D`, without a copy.
    ///
    /// # Errors
    /// [`Error::Graph`] if it is of another kind or rank.
    pub fn int<const D: usize>(self) -> Result<Tensor<D, Int>, Error> {
        self.fits("int", Kind::Int, D).map(Tensor::from_dispatch)
    }

    /// The tensor as an ordinary bool tensor of rank `D`, without a copy.
    ///
    /// # Errors
    /// [`Error::Graph`] if it is of another kind or rank.
    pub fn bool<const D: usize>(self) -> Result<Tensor<D, Bool>, Error> {
        self.fits("bool", Kind::Bool, D).map(Tensor::from_dispatch)
    }

    fn fits(self, wanted: &str, kind: Kind, rank: usize) -> Result<DispatchTensor, Error> {
        let (dtype, shape) = (self.dtype(), self.shape());
        if Kind::of(dtype) == kind && shape.num_dims() == rank {
            return Ok(self.0);
        }
        let shape = shape.as_slice();
        let problem =
            format!("a {wanted} tensor of rank {rank} was asked for, but there is {dtype:?} of shape {shape:?}");
        Err(Error::Graph { problem })
    }

    /// Its dtype.
    pub fn dtype(&self) -> DType {
        self.0.dtype()
    }

    /// Its dims.
    pub fn shape(&self) -> Shape {
        self.0.shape()
    }

    /// Its device.
    pub fn device(&self) -> Device {
        Device::new(self.0.device())
    }

    pub(crate) fn on_flex(&self) -> bool {
        matches!(self.0.device(), DispatchDevice::Flex(_))
    }

    pub(crate) fn rank(&self) -> usize {
        self.0.rank()
    }

    pub(crate) fn elements(&self) -> usize {
        self.shape().num_elements()
    }

    pub(crate) fn into_dispatch(self) -> DispatchTensor {
        self.0
    }

    /// The primitive of a backend, if it is on a device of that.
    pub(crate) fn into_backend<B: Backend>(self) -> Result<BackendTensor<B>, String>
    where
        DispatchTensor: DispatchKindConversion<B>,
    {
        <DispatchTensor as DispatchKindConversion<B>>::try_into_backend(self.0)
    }

    pub(crate) fn from_backend<B: Backend>(tensor: BackendTensor<B>) -> Self
    where
        DispatchTensor: DispatchKindConversion<B>,
    {
        Self(<DispatchTensor as DispatchKindConversion<B>>::from_backend(tensor))
    }

    /// A float primitive of a backend.
    pub(crate) fn from_float<B: Backend>(tensor: B::FloatTensorPrimitive) -> Self
    where
        DispatchTensor: DispatchKindConversion<B>,
    {
        Self::from_backend::<B>(BackendTensor::Float(tensor))
    }

    /// The tensor in host memory: itself if it is on Flex, a copy if not.
    pub(crate) fn into_flex(self) -> Result<FlexTensor, Error> {
        if !self.on_flex() {
            return self.into_data().map(FlexTensor::from_data);
        }
        match self.into_backend::<Flex>() {
            // On Flex a tensor of any kind is the same primitive.
            Ok(BackendTensor::Float(tensor) | BackendTensor::Int(tensor) | BackendTensor::Bool(tensor)) => Ok(tensor),
            Ok(other) => Err(Error::invalid("payload", format!("a {} tensor does not travel", other.name()))),
            Err(problem) => Err(Error::invalid("payload", format!("the tensor cannot be read: {problem}"))),
        }
    }

    /// A tensor in host memory.
    pub(crate) fn from_flex(tensor: FlexTensor) -> Self {
        let tensor = match Kind::of(tensor.dtype()) {
            Kind::Float => BackendTensor::Float(tensor),
            Kind::Int => BackendTensor::Int(tensor),
            Kind::Bool => BackendTensor::Bool(tensor),
        };
        Self::from_backend::<Flex>(tensor)
    }

    /// Its values.
    pub(crate) fn into_data(self) -> Result<TensorData, Error> {
        let data = match Kind::of(self.dtype()) {
            Kind::Float => Tensor::<1>::from_dispatch(self.0).try_into_data(),
            Kind::Int => Tensor::<1, Int>::from_dispatch(self.0).try_into_data(),
            Kind::Bool => Tensor::<1, Bool>::from_dispatch(self.0).try_into_data(),
        };
        data.map_err(|problem| Error::invalid("payload", format!("the tensor cannot be read: {problem}")))
    }

    /// The tensor on a device without autodiff.
    pub(crate) fn moved_to(self, device: &Device) -> Self {
        let device = device.as_dispatch();
        if self.0.device() == *device {
            return self;
        }
        Self(match Kind::of(self.dtype()) {
            Kind::Float => Dispatch::float_to_device(self.0, device),
            Kind::Int => Dispatch::int_to_device(self.0, device),
            Kind::Bool => Dispatch::bool_to_device(self.0, device),
        })
    }

    /// The same elements under other dims.
    pub(crate) fn reshape(self, dims: impl Into<Shape>) -> Self {
        let shape = dims.into();
        Self(match Kind::of(self.dtype()) {
            Kind::Float => Dispatch::float_reshape(self.0, shape),
            Kind::Int => Dispatch::int_reshape(self.0, shape),
            Kind::Bool => Dispatch::bool_reshape(self.0, shape),
        })
    }

    /// The dims in another order.
    pub(crate) fn permute(self, order: &[usize]) -> Self {
        Self(match Kind::of(self.dtype()) {
            Kind::Float => Dispatch::float_permute(self.0, order),
            Kind::Int => Dispatch::int_permute(self.0, order),
            Kind::Bool => Dispatch::bool_permute(self.0, order),
        })
    }

    /// One element in the place of many, without memory for them.
    pub(crate) fn expand(self, dims: impl Into<Shape>) -> Self {
        let shape = dims.into();
        Self(match Kind::of(self.dtype()) {
            Kind::Float => Dispatch::float_expand(self.0, shape),
            Kind::Int => Dispatch::int_expand(self.0, shape),
            Kind::Bool => Dispatch::bool_expand(self.0, shape),
        })
    }

    /// One dim as two, the first of which has `parts` entries: `parts` divides it. On Flex never a copy.
    pub(crate) fn split_dim(self, dim: usize, parts: usize) -> Result<Self, Error> {
        let mut dims = self.shape().to_vec();
        let share = dims[dim] / parts;
        dims.splice(dim..=dim, [parts, share]);
        if !self.on_flex() {
            return Ok(self.reshape(dims));
        }
        let tensor = self.into_flex()?;
        let layout = tensor.layout();
        let mut strides = layout.strides().to_vec();
        strides.insert(dim, strides[dim] * share as isize);
        let split = Layout::new(Shape::from(dims), strides, layout.start_offset());
        Ok(Self::from_flex(tensor.with_layout(split)))
    }

    /// Its elements in order, and on Flex no more memory than these take along the dims that were cut.
    pub(crate) fn packed(self) -> Result<Self, Error> {
        match self.on_flex() {
            true => Ok(Self::from_flex(self.into_flex()?.to_contiguous())),
            false => Ok(self),
        }
    }

    /// A range of one dim.
    pub(crate) fn narrow(self, dim: usize, range: Range<usize>) -> Self {
        let shape = self.shape();
        let whole = |(place, size): (usize, &usize)| if place == dim { range.clone() } else { 0..*size };
        let slices: Vec<Slice> = shape.iter().enumerate().map(|dim| Slice::from(whole(dim))).collect();
        Self(match Kind::of(self.dtype()) {
            Kind::Float => Dispatch::float_slice(self.0, &slices),
            Kind::Int => Dispatch::int_slice(self.0, &slices),
            Kind::Bool => Dispatch::bool_slice(self.0, &slices),
        })
    }

    /// Tensors of one kind one behind the other along a dim.
    ///
    /// # Errors
    /// [`Error::Graph`] if there is none.
    pub(crate) fn cat(tensors: Vec<Self>, dim: usize) -> Result<Self, Error> {
        let Some(first) = tensors.first() else {
            return Err(Error::Graph { problem: "no tensors can be put together".into() });
        };
        let kind = Kind::of(first.dtype());
        let tensors: Vec<DispatchTensor> = tensors.into_iter().map(|tensor| tensor.0).collect();
        Ok(Self(match kind {
            Kind::Float => Dispatch::float_cat(tensors, dim),
            Kind::Int => Dispatch::int_cat(tensors, dim),
            Kind::Bool => Dispatch::bool_cat(tensors, dim),
        }))
    }

    /// The sum with a float tensor of the same shape, dtype and device; in place, if nobody else holds this one.
    ///
    /// # Panics
    /// If they are not.
    #[allow(clippy::should_implement_trait)]
    pub fn add(self, other: Self) -> Self {
        Self(Dispatch::float_add(self.0, other.0))
    }

    /// A float tensor times a number, in place, if nobody else holds it; itself if the number is 1.
    ///
    /// # Panics
    /// If it is a tensor of another kind.
    pub fn scale(self, factor: f64) -> Self {
        match factor == 1.0 {
            true => self,
            false => Self(Dispatch::float_mul_scalar(self.0, Scalar::Float(factor))),
        }
    }
}
