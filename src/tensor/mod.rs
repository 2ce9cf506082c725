//! Tensors whose kind, rank and device are known at run time only: what parameters, gradients, activations and messages
//! are to everything below a model.

mod allocations;
mod arena;
mod backend;
mod digest;
mod lent;
pub(crate) mod magnitude;
mod measured_sum;
mod ops;
mod panel;
mod product;
mod product_parts;
mod recycled;
mod scaled;
mod size;
mod squares;
mod tree;
mod vectors;

use burn::backend::flex::FlexTensor;
use burn::backend::ops::{BoolTensorOps, FloatTensorOps, IntTensorOps};
use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchDevice, DispatchKindConversion, DispatchTensor,
    Flex, TensorMetadata,
};
use burn::tensor::kind::{Autodiff, Basic};
use burn::tensor::{Bool, DType, Device, Int, Shape, Tensor, TensorData};

pub(crate) use self::allocations::ALIGN;
pub(crate) use self::backend::{check_device, with_backend};
pub(crate) use self::lent::{Lender, Returned};
pub(crate) use self::product::{Multiplied, Product, Strided};
pub(crate) use self::product_parts::{ProductPart, product_parts, run_parts};
pub(crate) use self::recycled::{FROM, Pool, Room};
#[doc(hidden)]
pub use self::size::Norm;
pub(crate) use self::size::{PartialNorm, sizes};
#[cfg(test)]
pub(crate) use self::squares::looked;
pub(crate) use self::squares::{Look, Squares};
#[doc(hidden)]
pub use self::tree::{TensorMapper, TensorTree};
pub(crate) use self::tree::{place, rows, rows_of_step};
pub(crate) use self::vectors::vectorized;
use crate::Error;

/// A tensor of any kind, rank and device, without autodiff.
///
/// It shares its buffer with the tensor that it was made of, and operations work in place where it has no other owner.
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

/// Calls the operation of a kind, of those on floats, ints and bools.
macro_rules! by_kind {
    ($kind:expr, $float:ident | $int:ident | $bool:ident($($argument:expr),*)) => {
        match $kind {
            Kind::Float => Dispatch::$float($($argument),*),
            Kind::Int => Dispatch::$int($($argument),*),
            Kind::Bool => Dispatch::$bool($($argument),*),
        }
    };
}
use by_kind;

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
        Self(by_kind!(Kind::of(dtype), float_zeros | int_zeros | bool_zeros(shape, device, dtype.into())))
    }

    /// These values on a device, in their own dtype; bools as the device stores them.
    pub(crate) fn from_data(data: TensorData, device: &Device) -> Self {
        let kind = Kind::of(data.dtype());
        let stored = if kind == Kind::Bool { device.settings().bool_dtype.into() } else { data.dtype() };
        let data = if data.dtype() == stored { data } else { data.convert_dtype(stored) };
        let device = device.as_dispatch();
        Self(by_kind!(kind, float_from_data | int_from_data | bool_from_data(data, device)))
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
        Self(by_kind!(Kind::of(self.dtype()), float_to_device | int_to_device | bool_to_device(self.0, device)))
    }
}
