//! What can travel: burn tensors of any kind, and vectors.

use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, GradientCheckpointingStrategy};
use burn::tensor::kind::{Autodiff, Basic};
use burn::tensor::{BackendPrimitive, DType, Device, Tensor, TensorData};

use super::Element;
#[cfg(feature = "cubecl")]
use super::device::{self, DeviceTensor, DeviceTransport};
use crate::Error;
use crate::tensor::PlainTensor;

/// Something that a collective can carry: a burn tensor of any rank and kind, or a `Vec` of [`Element`]s.
///
/// Collectives take a payload by value and give back one of the same type, so that memory which nobody else holds is
/// worked on in place: a `Vec` always, a tensor of [`Device::flex`] when it is contiguous and not shared. A tensor of
/// another device travels through host memory.
///
/// **Not differentiable.** A tensor on an autodiff device goes in without its graph and comes out as a constant; moves
/// that gradients flow through are in [`layout`](crate::layout).
pub trait Payload: Sized + Send + 'static {
    /// What is needed beside the data to make the payload again: nothing, or the device.
    type Home: Clone + Default + Send + 'static;

    /// The dtype that this type always has, if it has one.
    fn fixed_dtype() -> Option<DType>;

    /// The data in host memory, and what is needed for the way back.
    ///
    /// # Errors
    /// [`Error::UnsupportedDType`] if it is quantized; [`Error::InvalidArgument`] if its values cannot be read.
    fn into_host(self) -> Result<(FlexTensor, Self::Home), Error>;

    /// The way back.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the data is of another rank or kind than this type.
    fn from_host(data: FlexTensor, home: &Self::Home) -> Result<Self, Error>;

    /// The data on the device of an engine that carries it there, and what is needed for the way back; or the payload, if it
    /// is somewhere else.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it is on the device and cannot be had.
    #[cfg(feature = "cubecl")]
    fn into_device(self, _: &dyn DeviceTransport) -> Result<OnDevice<Self>, Error> {
        Ok(OnDevice::Elsewhere(self))
    }

    /// Whether [`into_device`](Self::into_device) will find it there.
    #[cfg(feature = "cubecl")]
    fn is_carried(&self, _: &dyn DeviceTransport) -> bool {
        false
    }

    /// A message that has come on a device. What does not live on devices is brought to the host, which waits for it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the data is of another rank or kind than this type.
    #[cfg(feature = "cubecl")]
    fn from_message(data: DeviceTensor) -> Result<Self, Error> {
        Self::from_host(device::to_host(data)?, &Self::Home::default())
    }

    /// The way back from the device.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if this type does not live on devices.
    #[cfg(feature = "cubecl")]
    fn from_device(_: DeviceTensor, _: &Self::Home) -> Result<Self, Error> {
        Err(Error::invalid("payload", "it does not live on a device"))
    }
}

/// Where [`Payload::into_device`] found the data.
#[cfg(feature = "cubecl")]
#[derive(Debug)]
pub enum OnDevice<P: Payload> {
    /// On the device: the data, and what is needed for the way back.
    Here(DeviceTensor, P::Home),
    /// Not on the device.
    Elsewhere(P),
}

impl<E: Element> Payload for Vec<E> {
    type Home = ();

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

/// Where a tensor lived: its device, and how its autodiff treats checkpoints, if it had any.
#[derive(Debug, Clone)]
pub struct TensorHome {
    device: Device,
    autodiff: Option<GradientCheckpointingStrategy>,
}

impl TensorHome {
    /// Where a tensor is.
    pub(crate) fn of<const D: usize, K: TensorKind>(tensor: &Tensor<D, K>) -> Self {
        Self { device: tensor.device().inner(), autodiff: tensor.gradient_checkpointing_strategy() }
    }
}

impl TensorHome {
    /// A plain tensor that has come back, with autodiff if it had it.
    pub(crate) fn welcome<const D: usize, K: TensorKind>(&self, plain: Tensor<D, K>) -> Tensor<D, K> {
        match self.autodiff {
            None => plain,
            Some(strategy) => plain.autodiff().with_gradient_checkpointing_strategy(strategy),
        }
    }
}

impl Default for TensorHome {
    fn default() -> Self {
        Self { device: Device::flex(), autodiff: None }
    }
}

/// What a kind of tensor must be on the devices that are compiled in, beside Flex: nothing without the feature `cubecl`.
#[cfg(not(feature = "cubecl"))]
pub trait CubeKind {}

#[cfg(not(feature = "cubecl"))]
impl<K> CubeKind for K {}

#[cfg(feature = "cubecl")]
pub use super::device::CubeKind;

/// The kinds of tensor that travel: `Float`, `Int`, `Bool`.
pub trait TensorKind:
    Basic + Autodiff + BackendPrimitive<Flex, Primitive = FlexTensor> + CubeKind + Send + 'static
{
    /// Whether a dtype is of this kind.
    fn holds(dtype: DType) -> bool;
}

impl TensorKind for burn::tensor::Float {
    fn holds(dtype: DType) -> bool {
        dtype.is_float()
    }
}

impl TensorKind for burn::tensor::Int {
    fn holds(dtype: DType) -> bool {
        dtype.is_int() || dtype.is_uint()
    }
}

impl TensorKind for burn::tensor::Bool {
    fn holds(dtype: DType) -> bool {
        dtype.is_bool()
    }
}

/// A tensor of the data, of its own dtype, on a device. A bool is stored as the device likes.
pub(crate) fn on_device<const D: usize, K: TensorKind>(data: TensorData, device: &Device) -> Tensor<D, K> {
    match data.dtype() {
        DType::Bool(_) => Tensor::from_data(data, device),
        dtype => Tensor::from_data(data, (device, dtype)),
    }
}

/// Whether data of this dtype and rank makes a tensor of `D` dims and kind `K`.
fn fits<const D: usize, K: TensorKind>(dtype: DType, rank: usize) -> Result<(), Error> {
    if rank != D || !K::holds(dtype) {
        let expected = format!("a tensor of rank {D} and another kind was expected");
        return Err(Error::invalid("payload", format!("{expected}, one of rank {rank} and dtype {dtype:?} came")));
    }
    Ok(())
}

impl<const D: usize, K: TensorKind> Payload for Tensor<D, K> {
    type Home = TensorHome;

    fn fixed_dtype() -> Option<DType> {
        None
    }

    fn into_host(self) -> Result<(FlexTensor, TensorHome), Error> {
        let dtype = self.dtype();
        if !K::holds(dtype) {
            return Err(Error::UnsupportedDType { operation: "a collective", dtype });
        }
        let home = TensorHome { device: self.device().inner(), autodiff: self.gradient_checkpointing_strategy() };
        let plain = self.inner();
        let on_flex = plain.device() == Device::flex();
        let data = match on_flex {
            true => plain.try_into_primitive::<Flex>().map_err(|problem| {
                Error::invalid("payload", format!("the tensor cannot be read on its device: {problem:?}"))
            })?,
            false => FlexTensor::from_data(plain.into_data()),
        };
        Ok((data, home))
    }

    fn from_host(data: FlexTensor, home: &TensorHome) -> Result<Self, Error> {
        let dtype = data.dtype();
        fits::<D, K>(dtype, data.layout().shape().num_dims())?;
        let plain = match home.device == Device::flex() {
            true => Tensor::from_primitive::<Flex>(data),
            false => on_device(data.into_data(), &home.device),
        };
        Ok(home.welcome(plain))
    }

    #[cfg(feature = "cubecl")]
    fn into_device(self, engine: &dyn DeviceTransport) -> Result<OnDevice<Self>, Error> {
        let home = TensorHome { device: self.device().inner(), autodiff: self.gradient_checkpointing_strategy() };
        match self.is_carried(engine) {
            true => Ok(OnDevice::Here(device::to_device(self.inner())?, home)),
            false => Ok(OnDevice::Elsewhere(self)),
        }
    }

    #[cfg(feature = "cubecl")]
    fn is_carried(&self, engine: &dyn DeviceTransport) -> bool {
        engine.carries(&self.device().inner(), self.dtype())
    }

    #[cfg(feature = "cubecl")]
    fn from_message(data: DeviceTensor) -> Result<Self, Error> {
        fits::<D, K>(data.dtype, data.meta.shape().len())?;
        Ok(device::from_device(data))
    }

    #[cfg(feature = "cubecl")]
    fn from_device(data: DeviceTensor, home: &TensorHome) -> Result<Self, Error> {
        Ok(home.welcome(device::from_device(data)))
    }
}

/// A tensor of any rank and kind travels as it is.
impl Payload for PlainTensor {
    type Home = TensorHome;

    fn fixed_dtype() -> Option<DType> {
        None
    }

    fn into_host(self) -> Result<(FlexTensor, TensorHome), Error> {
        let home = TensorHome { device: self.device(), autodiff: None };
        Ok((self.into_flex()?, home))
    }

    fn from_host(data: FlexTensor, home: &TensorHome) -> Result<Self, Error> {
        match home.device == Device::flex() {
            true => Ok(Self::from_flex(data)),
            false => Ok(Self::from_data(data.into_data(), &home.device)),
        }
    }

    #[cfg(feature = "cubecl")]
    fn into_device(self, engine: &dyn DeviceTransport) -> Result<OnDevice<Self>, Error> {
        let home = TensorHome { device: self.device(), autodiff: None };
        match self.is_carried(engine) {
            true => Ok(OnDevice::Here(device::plain_to_device(self)?, home)),
            false => Ok(OnDevice::Elsewhere(self)),
        }
    }

    #[cfg(feature = "cubecl")]
    fn is_carried(&self, engine: &dyn DeviceTransport) -> bool {
        engine.carries(&self.device(), self.dtype())
    }

    #[cfg(feature = "cubecl")]
    fn from_message(data: DeviceTensor) -> Result<Self, Error> {
        Ok(device::plain_from_device(data))
    }

    #[cfg(feature = "cubecl")]
    fn from_device(data: DeviceTensor, _: &TensorHome) -> Result<Self, Error> {
        Ok(device::plain_from_device(data))
    }
}
