//! Collectives and messages on device tensors between threads: ranks that share a GPU, or have several in one process.
//!
//! A rank puts its tensor, a handle to a buffer on the device, into the group's device exchange, synchronizes with the
//! others, and takes the handles of all. It enqueues its computation on its own stream, with kernels of burn or of its
//! own; CubeCL makes that stream wait for the streams that write the buffers. Nothing is copied to the host, and the
//! host does not wait for the device.
//!
//! **Who may write to a buffer?** Streams wait for whoever has *written* what they read, not for whoever still *reads*
//! what they write. burn writes in place to a buffer with a single handle, and a rank drops a foreign handle when it
//! has enqueued its kernels, long before those have run. So no one may write afterwards to a tensor that a rank has
//! exchanged:
//!
//! - a tensor of which the rank keeps another handle is copied before it is exchanged or sent;
//! - a rank holds the handles of all until it has enqueued its work, so that its own kernels write elsewhere;
//! - a result that would be the buffer of another rank, as in a broadcast, is copied.
//!
//! Ranks of one group may have different devices. Tensors of another device go through host memory then, and the host
//! waits for them; NCCL, on top of such a group, avoids both.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use burn::backend::DispatchDevice;
use burn::tensor::{Bool, DType, Device, Float, Int, Tensor};
use burn_cubecl::CubeDevice;

use super::device_reduce::fold;
use super::transport::LocalTransport;
use crate::Error;
use crate::comm::coalesced::coalesced_on_device;
use crate::comm::device::{
    DeviceTensor, DeviceTransport, bytes_moved, exclusive, flat, from_device, rows_received, to_device, with_dims,
};
use crate::comm::payload::on_device;
use crate::comm::{Arrival, Call, CallShape, Operation, ReduceOp, TensorKind, Transfer, Transport, part, reduce};
use crate::lock::lock;

/// All-reduces of fewer elements are computed by every rank for itself: a second exchange would take longer.
const SMALL: usize = 1 << 14;

/// The tensors that ranks exchange, by the number of the exchange.
#[derive(Debug, Default)]
pub(super) struct DeviceExchange(Mutex<HashMap<u64, PendingExchange>>);

#[derive(Debug)]
struct PendingExchange {
    tensors: Vec<Option<DeviceTensor>>,
    fetched: usize,
}

impl LocalTransport {
    /// Exchanges tensors with the other ranks in `call`, and returns those of all.
    fn exchange(&self, call: &Call, tensor: DeviceTensor) -> Result<Vec<DeviceTensor>, Error> {
        let (size, device_exchange) = (self.size(), &self.device_exchange().0);
        let number = self.next_exchange();
        let tensor = if size == 1 { tensor } else { exclusive(tensor) };
        let empty = || PendingExchange { tensors: vec![None; size], fetched: 0 };
        lock(device_exchange).entry(number).or_insert_with(empty).tensors[self.rank()] = Some(tensor);
        if let Err(error) = self.collective(call, Transfer::Nothing) {
            // The world has failed.
            lock(device_exchange).remove(&number);
            return Err(error);
        }
        let mut device_exchange = lock(device_exchange);
        let missing = || Error::invalid(call.operation.name(), "a rank has put no tensor into the exchange");
        let exchange = device_exchange.get_mut(&number).ok_or_else(missing)?;
        exchange.fetched += 1;
        let last = exchange.fetched == size;
        let tensors = exchange.tensors.iter().cloned().collect::<Option<Vec<_>>>();
        if last {
            device_exchange.remove(&number);
        }
        tensors.ok_or_else(missing)
    }

    fn all_reduce_many_as<K: Scale>(
        &self,
        op: ReduceOp,
        tensors: &[DeviceTensor],
    ) -> Result<(Vec<DeviceTensor>, u64), Error> {
        let call = coalesced_on_device(op, tensors)?;
        let (reduced, bytes) = self.run_as::<K>(call, concatenated::<K>(tensors)?)?;
        Ok((split_like::<K>(reduced, tensors)?, bytes))
    }

    fn run_as<K: Scale>(&self, call: Call, tensor: DeviceTensor) -> Result<(DeviceTensor, u64), Error> {
        let (operation, dims, dtype) = (call.operation, tensor.meta.shape().to_vec(), tensor.dtype);
        let (rank, size) = (self.rank(), self.size());
        let brought = match operation {
            Operation::AllReduce(ReduceOp::PreMulSum(factor))
            | Operation::ReduceScatter(ReduceOp::PreMulSum(factor))
            | Operation::Reduce { op: ReduceOp::PreMulSum(factor), .. } => {
                to_device(K::scale(from_device::<1, K>(flat(tensor)), factor))?
            }
            _ => tensor,
        };
        let all = self.exchange(&call, brought)?;
        let rows: Vec<usize> = all.iter().map(|tensor| CallShape::new(&tensor.meta.shape().to_vec()).rows()).collect();
        let rows = match operation {
            // Scaled tensors are flat; these operations take equal dims anyway.
            Operation::AllReduce(_) | Operation::ReduceScatter(_) | Operation::Reduce { .. } => {
                vec![call.shape.rows(); size]
            }
            _ => rows,
        };
        let (width, dims) = match operation {
            // The tensors of the others do not count.
            Operation::Scatter { root } => {
                let dims = all[root].meta.shape().to_vec();
                (dims.iter().skip(1).product(), dims)
            }
            _ => (call.shape.width(), dims),
        };
        let device = all[rank].device.clone();
        let take =
            |from: usize, rows: Range<usize>| fetch::<K>(&all[from], rows.start * width..rows.end * width, &device);
        let parts = |rows_of: &dyn Fn(usize) -> Range<usize>| {
            let parts: Vec<_> =
                (0..size).map(|from| (from, rows_of(from))).filter(|(_, rows)| !rows.is_empty()).collect();
            match parts.len() {
                0 => take(rank, 0..0),
                _ => Tensor::cat(parts.into_iter().map(|(from, rows)| take(from, rows)).collect(), 0),
            }
        };
        let everything = |from: usize| 0..rows[from];
        let folded = |elements: Range<usize>, op: ReduceOp| match size {
            1 if all[rank].dtype == dtype => Ok(fetch::<K>(&all[rank], elements, &device)),
            _ => fold_here::<K>(&all, elements, op, dtype, &device).map(from_device::<1, K>),
        };
        let result = match operation {
            Operation::AllReduce(op) if size > 1 && call.shape.elements() >= SMALL => {
                // As on the host: every rank reduces a share, and all concatenate the shares.
                let share = part(call.shape.elements(), size, rank);
                let folded = fold_here::<K>(&all, share, op, dtype, &device)?;
                let shares = self.exchange(&call, folded)?;
                let whole = |share: &DeviceTensor| fetch::<K>(share, 0..share.meta.shape()[0], &device);
                Tensor::cat(shares.iter().map(whole).collect(), 0)
            }
            Operation::AllReduce(op) => folded(0..call.shape.elements(), op)?,
            Operation::Reduce { op, root } if root == rank => folded(0..call.shape.elements(), op)?,
            Operation::Reduce { .. } => take(rank, everything(rank)),
            Operation::ReduceScatter(op) => {
                let mine = part(call.shape.rows(), size, rank);
                folded(mine.start * width..mine.end * width, op)?
            }
            Operation::Broadcast { root } => take(root, everything(root)),
            Operation::AllGather => parts(&everything),
            Operation::Gather { root } if root == rank => parts(&everything),
            Operation::Gather { .. } => take(rank, everything(rank)),
            Operation::Scatter { root } => take(root, part(rows[root], size, rank)),
            Operation::AllToAll => parts(&|from| part(rows[from], size, rank)),
            Operation::Barrier | Operation::Split | Operation::Send { .. } | Operation::Receive { .. } => {
                return Err(Error::invalid(operation.name(), "it is not a collective on device data"));
            }
        };
        let mut dims = dims;
        if let Some(first) = dims.first_mut() {
            *first = rows_received(&operation, &rows, rank);
        }
        let bytes = bytes_moved(&operation, &rows, rank, width, dtype);
        let result = with_dims(to_device(result)?, dims);
        // While all handles are held: `exclusive` finds out by them whether the buffer is somebody else's.
        let result = if size == 1 { result } else { exclusive(result) };
        drop(all);
        Ok((result, bytes))
    }
}

impl DeviceTransport for LocalTransport {
    fn supports(&self, device: &Device, _: DType) -> bool {
        matches!(device.as_dispatch(), DispatchDevice::Cube(_))
    }

    fn run(&self, call: &Call, tensor: DeviceTensor) -> Result<(DeviceTensor, u64), Error> {
        if let Operation::AllReduce(op) | Operation::ReduceScatter(op) | Operation::Reduce { op, .. } = call.operation {
            reduce::check(op, tensor.dtype)?;
        }
        match tensor.dtype {
            dtype if dtype.is_float() => self.run_as::<Float>(*call, tensor),
            dtype if dtype.is_bool() => self.run_as::<Bool>(*call, tensor),
            _ => self.run_as::<Int>(*call, tensor),
        }
    }

    fn all_reduce_many(&self, op: ReduceOp, tensors: Vec<DeviceTensor>) -> Result<(Vec<DeviceTensor>, u64), Error> {
        match tensors.first().map(|tensor| tensor.dtype) {
            Some(dtype) if dtype.is_bool() => self.all_reduce_many_as::<Bool>(op, &tensors),
            Some(dtype) if !dtype.is_float() => self.all_reduce_many_as::<Int>(op, &tensors),
            _ => self.all_reduce_many_as::<Float>(op, &tensors),
        }
    }

    fn send(&self, to: usize, tag: u64, tensor: DeviceTensor) -> Result<(), Error> {
        self.deliver(to, tag, Arrival::Device(Box::new(exclusive(tensor))))
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Arrival, Error> {
        self.take(from, tag)
    }
}

/// Elements of a tensor, on `device`. From another device they go through host memory: CubeCL's own copy between two
/// GPUs makes the threads of both wait for each other, and two ranks that send to each other would deadlock.
fn fetch<K: Scale>(tensor: &DeviceTensor, elements: Range<usize>, device: &CubeDevice) -> Tensor<1, K> {
    let slice = from_device::<1, K>(flat(tensor.clone())).slice([elements]);
    match tensor.device == *device {
        true => slice,
        false => on_device(slice.into_data(), &Device::new(DispatchDevice::Cube(device.clone()))),
    }
}

/// Concatenates the tensors, flattened.
fn concatenated<K: Scale>(tensors: &[DeviceTensor]) -> Result<DeviceTensor, Error> {
    to_device(Tensor::cat(tensors.iter().map(|tensor| from_device::<1, K>(flat(tensor.clone()))).collect(), 0))
}

/// Splits a flat tensor into tensors with the dims of `like`.
fn split_like<K: Scale>(whole: DeviceTensor, like: &[DeviceTensor]) -> Result<Vec<DeviceTensor>, Error> {
    let (whole, mut first) = (from_device::<1, K>(whole), 0);
    let part = |tensor: &DeviceTensor| {
        let dims = tensor.meta.shape().to_vec();
        let elements = first..first + dims.iter().product::<usize>();
        first = elements.end;
        Ok(with_dims(to_device(whole.clone().slice([elements]))?, dims))
    };
    like.iter().map(part).collect()
}

/// The reduction of some elements of all tensors, in rank order, as elements of `dtype`. Factors have been applied.
fn fold_here<K: Scale>(
    all: &[DeviceTensor],
    elements: Range<usize>,
    op: ReduceOp,
    dtype: DType,
    device: &CubeDevice,
) -> Result<DeviceTensor, Error> {
    if all.iter().all(|tensor| tensor.device == *device) {
        return fold(all, elements, op, dtype);
    }
    let shards = all.iter().map(|tensor| to_device(fetch::<K>(tensor, elements.clone(), device)));
    fold(&shards.collect::<Result<Vec<_>, _>>()?, 0..elements.len(), op, dtype)
}

/// Tensor kinds that can be reduced.
trait Scale: TensorKind {
    /// Applies a factor. Floats of 16 bits become `f32`, so that the sum is rounded once.
    fn scale(contribution: Tensor<1, Self>, factor: f64) -> Tensor<1, Self>;
}

impl Scale for Float {
    fn scale(contribution: Tensor<1>, factor: f64) -> Tensor<1> {
        match contribution.dtype() {
            DType::F16 | DType::BF16 => contribution.cast(DType::F32).mul_scalar(factor),
            _ => contribution.mul_scalar(factor),
        }
    }
}

impl Scale for Int {
    fn scale(contribution: Tensor<1, Int>, _: f64) -> Tensor<1, Int> {
        // Refused before.
        contribution
    }
}

impl Scale for Bool {
    fn scale(contribution: Tensor<1, Bool>, _: f64) -> Tensor<1, Bool> {
        // Refused before.
        contribution
    }
}
