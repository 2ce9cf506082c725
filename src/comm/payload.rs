//! The values that collectives and messages take: burn tensors of any kind, and vectors.

use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, GradientCheckpointingStrategy};
use burn::tensor::kind::{Autodiff, Basic};
use burn::tensor::{BackendPrimitive, DType, Device, Tensor, TensorData};

use super::Element;
#[cfg(feature = "cubecl")]
use super::device::{self, DeviceTensor, DeviceTransport};
use crate::Error;
use crate::tensor::PlainTensor;

/// A value that collectives and messages take: a burn tensor of any rank and kind, or a `Vec` of [`Element`]s.
///
/// Collectives take a payload by value and return one of the same type, so that they can work in place on memory with a
/// single owner: a `Vec` always, a tensor of [`Device::flex`] when it is contiguous and not shared. A tensor of another
/// device goes through host memory.
///
/// **Not differentiable.** A tensor on an autodiff device goes in without its graph and comes out as a constant;
/// differentiable moves are in [`layout`](crate::layout).
pub trait Payload: Sized + Send + 'static {
    /// What is needed beside the data to restore the payload: nothing, or the device.
    type Origin: Clone + Default + Send + 'static;

    /// The dtype that this type always has, if it has one.
    fn fixed_dtype() -> Option<DType>;

    /// The data in host memory, and what is needed to restore the payload.
    ///
    /// # Errors
    /// [`Error::UnsupportedDType`] if it is quantized; [`Error::InvalidArgument`] if its values cannot be read.
    fn into_host(self) -> Result<(FlexTensor, Self::Origin), Error>;

    /// The way back.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the data is of another rank or kind than this type.
    fn from_host(data: FlexTensor, origin: &Self::Origin) -> Result<Self, Error>;

    /// The data on its device if `device_transport` supports that device, and what is needed to restore the payload;
    /// else the payload.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the buffer on the device is not accessible.
    #[cfg(feature = "cubecl")]
    fn into_device(self, _: &dyn DeviceTransport) -> Result<OnDevice<Self>, Error> {
        Ok(OnDevice::Elsewhere(self))
    }

    /// Whether [`into_device`](Self::into_device) returns the data on its device.
    #[cfg(feature = "cubecl")]
    fn stays_on_device(&self, _: &dyn DeviceTransport) -> bool {
        false
    }

    /// Makes the payload of a message that arrived on a device. A payload that is not a device tensor is copied to the
    /// host, which waits for the device.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the data is of another rank or kind than this type.
    #[cfg(feature = "cubecl")]
    fn from_message(data: DeviceTensor) -> Result<Self, Error> {
        Self::from_host(device::to_host(data)?, &Self::Origin::default())
    }

    /// Restores the payload from its data on the device.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if this type is not a device tensor.
    #[cfg(feature = "cubecl")]
    fn from_device(_: DeviceTensor, _: &Self::Origin) -> Result<Self, Error> {
        Err(Error::invalid("payload", "it is not a device tensor"))
    }
}

/// The result of [`Payload::into_device`].
#[cfg(feature = "cubecl")]
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "it is taken apart where it is made")]
pub enum OnDevice<P: Payload> {
    /// On the device: the data, and what is needed to restore the payload.
    Here(DeviceTensor, P::Origin),
    /// Not on the device.
    Elsewhere(P),
}

impl<E: Element> Payload for Vec<E> {
    type Origin = ();

    fn fixed_dtype() -> Option<DType> {
        Some(E::DTYPE)
    }

    fn into_host(self) -> Result<(FlexTensor, ()), Error> {
        let len = self.len();
        Ok((FlexTensor::from_data(TensorData::new(self, [len])), ()))
    }

    fn from_host(data: FlexTensor, (): &()) -> Result<Self, Error> {
        let found = data.dtype();
        data.into_data().try_into_vec::<E>().map_err(|_| {
            Error::invalid("payload", format!("a vector of {:?} was expected, elements of {found:?} came", E::DTYPE))
        })
    }
}

/// Where a tensor came from: its device, and the checkpointing strategy of its autodiff, if it had any.
#[derive(Debug, Clone)]
pub struct TensorOrigin {
    device: Device,
    autodiff: Option<GradientCheckpointingStrategy>,
}

impl TensorOrigin {
    /// The origin of this tensor.
    pub(crate) fn of<const D: usize, K: TensorKind>(tensor: &Tensor<D, K>) -> Self {
        Self { device: tensor.device().inner(), autodiff: tensor.gradient_checkpointing_strategy() }
    }
}

impl TensorOrigin {
    /// The received tensor with autodiff, if its origin had it.
    pub(crate) fn restore<const D: usize, K: TensorKind>(&self, plain: Tensor<D, K>) -> Tensor<D, K> {
        match self.autodiff {
            None => plain,
            Some(strategy) => plain.autodiff().with_gradient_checkpointing_strategy(strategy),
        }
    }
}

impl Default for TensorOrigin {
    fn default() -> Self {
        Self { device: Device::flex(), autodiff: None }
    }
}

/// What a tensor kind must implement on the compiled devices beside Flex: nothing without the feature `cubecl`.
#[cfg(not(feature = "cubecl"))]
pub trait CubeKind {}

#[cfg(not(feature = "cubecl"))]
impl<K> CubeKind for K {}

#[cfg(feature = "cubecl")]
pub use super::device::CubeKind;

/// The supported kinds of tensors: `Float`, `Int`, `Bool`.
pub trait TensorKind:
    Basic + Autodiff + BackendPrimitive<Flex, Primitive = FlexTensor> + CubeKind + Send + 'static
{
    /// Whether a dtype is of this kind.
    fn includes(dtype: DType) -> bool;
}

impl TensorKind for burn::tensor::Float {
    fn includes(dtype: DType) -> bool {
        dtype.is_float()
    }
}

impl TensorKind for burn::tensor::Int {
    fn includes(dtype: DType) -> bool {
        dtype.is_int() || dtype.is_uint()
    }
}

impl TensorKind for burn::tensor::Bool {
    fn includes(dtype: DType) -> bool {
        dtype.is_bool()
    }
}

/// A tensor of the data, of its own dtype, on a device. A bool is stored in the device's default format.
pub(crate) fn on_device<const D: usize, K: TensorKind>(data: TensorData, device: &Device) -> Tensor<D, K> {
    match data.dtype() {
        DType::Bool(_) => Tensor::from_data(data, device),
        dtype => Tensor::from_data(data, (device, dtype)),
    }
}

/// Whether data of this dtype and rank makes a tensor of `D` dims and kind `K`.
fn check_kind<const D: usize, K: TensorKind>(dtype: DType, rank: usize) -> Result<(), Error> {
    if rank != D || !K::includes(dtype) {
        let expected = format!("a tensor of rank {D} and another kind was expected");
        return Err(Error::invalid("payload", format!("{expected}, one of rank {rank} and dtype {dtype:?} came")));
    }
    Ok(())
}

impl<const D: usize, K: TensorKind> Payload for Tensor<D, K> {
    type Origin = TensorOrigin;

    fn fixed_dtype() -> Option<DType> {
        None
    }

    fn into_host(self) -> Result<(FlexTensor, TensorOrigin), Error> {
        let dtype = self.dtype();
        if !K::includes(dtype) {
            return Err(Error::UnsupportedDType { operation: "a collective", dtype });
        }
        let origin = TensorOrigin { device: self.device().inner(), autodiff: self.gradient_checkpointing_strategy() };
        let plain = self.inner();
        let is_flex = plain.device() == Device::flex();
        let data = match is_flex {
            true => plain.try_into_primitive::<Flex>().map_err(|problem| {
                Error::invalid("payload", format!("the tensor cannot be read on its device: {problem:?}"))
            })?,
            false => FlexTensor::from_data(plain.into_data()),
        };
        Ok((data, origin))
    }

    fn from_host(data: FlexTensor, origin: &TensorOrigin) -> Result<Self, Error> {
        let dtype = data.dtype();
        check_kind::<D, K>(dtype, data.layout().shape().num_dims())?;
        let plain = match origin.device == Device::flex() {
            true => Tensor::from_primitive::<Flex>(data),
            false => on_device(data.into_data(), &origin.device),
        };
        Ok(origin.restore(plain))
    }

    #[cfg(feature = "cubecl")]
    fn into_device(self, device_transport: &dyn DeviceTransport) -> Result<OnDevice<Self>, Error> {
        let origin = TensorOrigin { device: self.device().inner(), autodiff: self.gradient_checkpointing_strategy() };
        match self.stays_on_device(device_transport) {
            true => Ok(OnDevice::Here(device::to_device(self.inner())?, origin)),
            false => Ok(OnDevice::Elsewhere(self)),
        }
    }

    #[cfg(feature = "cubecl")]
    fn stays_on_device(&self, device_transport: &dyn DeviceTransport) -> bool {
        device_transport.supports(&self.device().inner(), self.dtype())
    }

    #[cfg(feature = "cubecl")]
    fn from_message(data: DeviceTensor) -> Result<Self, Error> {
        check_kind::<D, K>(data.dtype, data.meta.shape().len())?;
        Ok(device::from_device(data))
    }

    #[cfg(feature = "cubecl")]
    fn from_device(data: DeviceTensor, origin: &TensorOrigin) -> Result<Self, Error> {
        Ok(origin.restore(device::from_device(data)))
    }
}

/// A tensor whose rank and kind are known at run time only.
impl Payload for PlainTensor {
    type Origin = TensorOrigin;

    fn fixed_dtype() -> Option<DType> {
        None
    }

    fn into_host(self) -> Result<(FlexTensor, TensorOrigin), Error> {
        let origin = TensorOrigin { device: self.device(), autodiff: None };
        Ok((self.into_flex()?, origin))
    }

    fn from_host(data: FlexTensor, origin: &TensorOrigin) -> Result<Self, Error> {
        match origin.device == Device::flex() {
            true => Ok(Self::from_flex(data)),
            false => Ok(Self::from_data(data.into_data(), &origin.device)),
        }
    }

    #[cfg(feature = "cubecl")]
    fn into_device(self, device_transport: &dyn DeviceTransport) -> Result<OnDevice<Self>, Error> {
        let origin = TensorOrigin { device: self.device(), autodiff: None };
        match self.stays_on_device(device_transport) {
            true => Ok(OnDevice::Here(device::plain_to_device(self)?, origin)),
            false => Ok(OnDevice::Elsewhere(self)),
        }
    }

    #[cfg(feature = "cubecl")]
    fn stays_on_device(&self, device_transport: &dyn DeviceTransport) -> bool {
        device_transport.supports(&self.device(), self.dtype())
    }

    #[cfg(feature = "cubecl")]
    fn from_message(data: DeviceTensor) -> Result<Self, Error> {
        Ok(device::plain_from_device(data))
    }

    #[cfg(feature = "cubecl")]
    fn from_device(data: DeviceTensor, _: &TensorOrigin) -> Result<Self, Error> {
        Ok(device::plain_from_device(data))
    }
}
