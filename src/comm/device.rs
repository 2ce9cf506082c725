//! Device tensors in collectives: burn's tensors as buffers, and the trait of transports that move them from device to
//! device.

use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{BackendPrimitive, Bool, BoolStore, DType, Device, Float, Int, Shape, Tensor, TensorData};
use burn_cubecl::kernel::into_contiguous;
pub use burn_cubecl::tensor::CubeTensor as DeviceTensor;
use burn_cubecl::{Cube, CubeBackend};
use burn_ir::{BackendIr, InitOperationIr, OperationIr, OperationOutput};
use cubecl_environment::stream::StreamId;

use crate::Error;
use crate::comm::{Arrival, Call, Operation, ReduceOp, TensorKind, part};
use crate::tensor::PlainTensor;

/// A transport that moves device tensors without a copy through the host.
pub trait DeviceTransport: Send + Sync {
    /// Whether it moves tensors of this dtype and device (without autodiff); others go through host memory.
    fn supports(&self, device: &Device, dtype: DType) -> bool;

    /// Enqueues a collective on a contiguous tensor, under the contract of [`Transport`](super::Transport): `call`
    /// describes it, and must agree with those of the other ranks. Returns the tensor in which the result will be,
    /// whose readers are enqueued behind, and the bytes that this rank moves.
    fn run(&self, call: &Call, tensor: DeviceTensor) -> Result<(DeviceTensor, u64), Error>;

    /// Enqueues an all-reduce of several contiguous tensors of one dtype, at least one, as one collective. As
    /// [`run`](Self::run) otherwise.
    fn all_reduce_many(&self, op: ReduceOp, tensors: Vec<DeviceTensor>) -> Result<(Vec<DeviceTensor>, u64), Error>;

    /// Sends a contiguous tensor. Returns before it is received; the tensor is not written to any more.
    fn send(&self, to: usize, tag: u64, tensor: DeviceTensor) -> Result<(), Error>;

    /// Receives the oldest message of `from` with this `tag`, whether it was sent from a device or from host memory.
    fn receive(&self, from: usize, tag: u64) -> Result<Arrival, Error>;

    /// Posts a receive: says that this rank will [receive](Self::receive) such a message, so that it may be transferred
    /// as soon as it is sent. Does not block. A transport whose messages need no receiver to be transferred has nothing
    /// to do.
    fn post_receive(&self, from: usize, tag: u64) {
        let _ = (from, tag);
    }
}

/// Kinds of tensors on CubeCL's devices. On them all kinds have one primitive.
pub trait CubeKind: BackendPrimitive<Cube, Primitive = FloatTensor<Cube>> {}

impl<K: BackendPrimitive<Cube, Primitive = FloatTensor<Cube>>> CubeKind for K {}

/// The contiguous buffer behind a tensor without autodiff of a CubeCL device. Enqueues what burn has deferred; nothing
/// waits for the device.
pub(crate) fn to_device<const D: usize, K: TensorKind>(tensor: Tensor<D, K>) -> Result<DeviceTensor, Error> {
    let dtype = tensor.dtype();
    let fused = tensor
        .try_into_primitive::<Cube>()
        .map_err(|problem| Error::invalid("payload", format!("the tensor has no buffer on its device: {problem:?}")))?;
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

/// [`to_device`] of a tensor of any kind and rank.
pub(crate) fn plain_to_device(tensor: PlainTensor) -> Result<DeviceTensor, Error> {
    let (dtype, tensor) = (tensor.dtype(), tensor.into_dispatch());
    // A primitive carries no static rank: the `1` in between is not looked at.
    match dtype {
        dtype if dtype.is_bool() => to_device(Tensor::<1, Bool>::from_dispatch(tensor)),
        dtype if dtype.is_int() || dtype.is_uint() => to_device(Tensor::<1, Int>::from_dispatch(tensor)),
        _ => to_device(Tensor::<1>::from_dispatch(tensor)),
    }
}

/// The way back.
pub(crate) fn plain_from_device(data: DeviceTensor) -> PlainTensor {
    match data.dtype {
        dtype if dtype.is_bool() => from_device::<1, Bool>(data).into(),
        dtype if dtype.is_int() || dtype.is_uint() => from_device::<1, Int>(data).into(),
        _ => from_device::<1, Float>(data).into(),
    }
}

/// Whether two tensors of a CubeCL device are at the same address of the same buffer.
pub(crate) fn same_buffer(a: &PlainTensor, b: &PlainTensor) -> bool {
    match (plain_to_device(a.clone()), plain_to_device(b.clone())) {
        (Ok(a), Ok(b)) => {
            std::ptr::eq(a.handle.memory.descriptor(), b.handle.memory.descriptor())
                && a.handle.offset_start == b.handle.offset_start
        }
        _ => false,
    }
}

/// A copy in host memory. Waits for the device.
pub(crate) fn to_host(tensor: DeviceTensor) -> Result<FlexTensor, Error> {
    let (dims, dtype) = (tensor.meta.shape().to_vec(), tensor.dtype);
    let flat = flat(tensor);
    let read = match dtype {
        dtype if dtype.is_float() => from_device::<1, Float>(flat).try_into_data(),
        dtype if dtype.is_bool() => from_device::<1, Bool>(flat).try_into_data(),
        _ => from_device::<1, Int>(flat).try_into_data(),
    };
    let unreadable =
        |problem| Error::invalid("payload", format!("a tensor cannot be read from its device: {problem:?}"));
    let (bytes, _, dtype) = read.map_err(unreadable)?.into_parts();
    Ok(FlexTensor::from_data(TensorData::from_bytes(bytes, dims, dtype)))
}

/// The same buffer, of one dim.
pub(crate) fn flat(tensor: DeviceTensor) -> DeviceTensor {
    let elements = tensor.meta.shape().iter().product();
    with_dims(tensor, vec![elements])
}

/// The tensor if it holds the only handle of its buffer, else a copy on its device.
pub(crate) fn exclusive(tensor: DeviceTensor) -> DeviceTensor {
    if tensor.can_mut() || tensor.meta.shape().iter().product::<usize>() == 0 {
        return tensor;
    }
    let (dims, dtype) = (tensor.meta.shape().to_vec(), tensor.dtype);
    // The kernel knows numbers.
    let numbers = match dtype {
        DType::Bool(BoolStore::U32) => DType::U32,
        DType::Bool(_) => DType::U8,
        dtype => dtype,
    };
    let whole = with_dtype(with_dims(tensor, dims.clone()), numbers);
    with_dims(with_dtype(whole.copy(), dtype), dims)
}

fn with_dtype(tensor: DeviceTensor, dtype: DType) -> DeviceTensor {
    let shape = Shape::from(tensor.meta.shape().to_vec());
    DeviceTensor::new_contiguous(tensor.client, tensor.device, shape, tensor.handle, dtype)
}

/// A contiguous buffer whose values are not set.
#[cfg(feature = "cuda")]
pub(crate) fn empty_on(device: &burn_cubecl::CubeDevice, dims: Vec<usize>, dtype: DType) -> DeviceTensor {
    let client = device.client();
    let buffer = client.empty(dims.iter().product::<usize>() * dtype.size());
    DeviceTensor::new_contiguous(client, device.clone(), Shape::from(dims), buffer, dtype)
}

/// First dim of the result of `rank`, when the ranks pass tensors of these first dims.
pub(crate) fn rows_received(operation: &Operation, rows: &[usize], rank: usize) -> usize {
    let size = rows.len();
    match *operation {
        Operation::ReduceScatter(_) => part(rows[rank], size, rank).len(),
        Operation::AllGather => rows.iter().sum(),
        Operation::Gather { root } if root == rank => rows.iter().sum(),
        Operation::Scatter { root } => part(rows[root], size, rank).len(),
        Operation::AllToAll => rows.iter().map(|rows| part(*rows, size, rank).len()).sum(),
        _ => rows[rank],
    }
}

/// The bytes that a rank moves, counted as by the other transports: read from peers and written to them.
pub(crate) fn bytes_moved(operation: &Operation, rows: &[usize], rank: usize, width: usize, dtype: DType) -> u64 {
    let (size, row_bytes) = (rows.len(), width * dtype.size());
    let share = (part(rows[rank] * width, size, rank).len() * dtype.size()) as u64;
    let whole = (rows[rank] * row_bytes) as u64;
    let received = (rows_received(operation, rows, rank) * row_bytes) as u64;
    match operation {
        Operation::AllReduce(_) => 2 * share * (size as u64 - 1),
        Operation::ReduceScatter(_) => received * (size as u64 - 1),
        Operation::Reduce { root, .. } if *root == rank => share * (size as u64 - 1),
        Operation::Reduce { .. } => share * size as u64,
        Operation::Broadcast { root } if *root == rank => 0,
        Operation::Broadcast { .. } => whole,
        Operation::Scatter { root } if *root == rank => 0,
        Operation::AllGather | Operation::Gather { .. } => received.saturating_sub(whole),
        _ => received,
    }
}

/// The same buffer under other dims.
pub(crate) fn with_dims(tensor: DeviceTensor, dims: Vec<usize>) -> DeviceTensor {
    DeviceTensor::new_contiguous(tensor.client, tensor.device, Shape::from(dims), tensor.handle, tensor.dtype)
}
