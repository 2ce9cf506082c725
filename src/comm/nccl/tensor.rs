//! burn's tensors and the device buffers behind them.

use burn::backend::tensor::FloatTensor;
use burn::tensor::{BackendPrimitive, Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
pub use burn_cubecl::tensor::CubeTensor as DeviceTensor;
use burn_cubecl::{Cube, CubeBackend};
use burn_ir::{BackendIr, InitOperationIr, OperationIr, OperationOutput};
use cubecl_environment::stream::StreamId;

use crate::Error;
use crate::comm::TensorKind;

/// Kinds of tensors on CubeCL's devices. On them all kinds have one primitive.
pub trait CubeKind: BackendPrimitive<Cube, Primitive = FloatTensor<Cube>> {}

impl<K: BackendPrimitive<Cube, Primitive = FloatTensor<Cube>>> CubeKind for K {}

/// The contiguous buffer behind a tensor without autodiff of a CubeCL device. What burn has put off is enqueued; nothing waits
/// for the device.
pub(crate) fn to_device<const D: usize, K: TensorKind>(tensor: Tensor<D, K>) -> Result<DeviceTensor, Error> {
    let dtype = tensor.dtype();
    let fused = tensor.try_into_primitive::<Cube>().map_err(|problem| {
        Error::invalid("payload", format!("the tensor is on no device that NCCL can reach: {problem:?}"))
    })?;
    let client = fused.client.clone();
    let plain = if dtype.is_float() {
        client.resolve_tensor_float::<CubeBackend>(fused)
    } else if dtype.is_bool() {
        client.resolve_tensor_bool::<CubeBackend>(fused)
    } else {
        client.resolve_tensor_int::<CubeBackend>(fused)
    };
    // Allocations of CUDA may be pitched.
    Ok(into_contiguous(plain))
}

/// The way back.
pub(crate) fn from_device<const D: usize, K: TensorKind>(data: DeviceTensor) -> Tensor<D, K> {
    let client = burn_fusion::get_client::<CubeBackend>(&data.device);
    let (shape, dtype) = (Shape::from(data.meta.shape().to_vec()), data.dtype);
    // A handle is the same for all kinds.
    let handle = CubeBackend::float_tensor_handle(data);
    let init = InitOperationIr::create(shape, dtype, || client.register_tensor_handle(handle));
    let init = OperationIr::Init(init);
    let fused = client.register(StreamId::current(), init, burn_fusion::NoOp::<CubeBackend>::new()).output();
    Tensor::from_primitive::<Cube>(fused)
}

/// A buffer of other dims on the same device, whose values are not set.
pub(super) fn empty_like(like: &DeviceTensor, dims: Vec<usize>) -> DeviceTensor {
    let elements: usize = dims.iter().product();
    let buffer = like.client.empty(elements * like.dtype.size());
    DeviceTensor::new_contiguous(like.client.clone(), like.device.clone(), Shape::from(dims), buffer, like.dtype)
}
