//! Device data between threads: ranks that share a GPU, or have several in one process.
//!
//! A rank lays its tensor, a handle to a buffer on the device, on the group's board, meets the others, and takes the handles
//! of all. What is to be computed of them it enqueues on its own stream, with kernels of burn or of its own; CubeCL makes that stream wait
//! for the streams that write the buffers. Nothing is copied to the host, and the host does not wait for the device.
//!
//! **Who may write to a buffer?** Streams wait for whoever has *written* what they read, not for whoever still *reads* what
//! they write. burn writes in place to a buffer of which nobody else holds a handle, and a rank lets go of a foreign handle
//! when it has enqueued its kernels, long before those have run. So what a rank lays out must be nobody's to write to
//! afterwards:
//!
//! - a tensor of which the rank keeps another handle is copied before it is laid out or sent;
//! - a rank holds the handles of all until it has enqueued its work, so that its own kernels write elsewhere;
//! - a result that would be the buffer of another rank, as in a broadcast, is copied.
//!
//! Ranks of one group may have different devices. What another device holds goes through host memory then, and the host
//! waits for it; NCCL, on top of such a group, spares both.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use burn::backend::DispatchDevice;
use burn::tensor::{Bool, DType, Device, Float, Int, Tensor};
use burn_cubecl::CubeDevice;

use super::fold::fold;
use super::group::lock;
use super::transport::LocalTransport;
use crate::Error;
use crate::comm::coalesced::pieces_on_device;
use crate::comm::device::{
    DeviceTensor, DeviceTransport, bytes_moved, exclusive, flat, from_device, rows_received, to_device, with_dims,
};
use crate::comm::payload::on_device;
use crate::comm::{Arrival, Call, Extent, Operation, ReduceOp, TensorKind, Transfer, Transport, part, reduce};

/// All-reduces of fewer elements are computed by every rank for itself: a second meeting would take longer.
const SMALL: usize = 1 << 14;

/// Where ranks lay what stays on the device, by the number of the exchange.
#[derive(Debug, Default)]
pub(super) struct Board(Mutex<HashMap<u64, Exchange>>);

#[derive(Debug)]
struct Exchange {
    tensors: Vec<Option<DeviceTensor>>,
    fetched: usize,
}

impl LocalTransport {
    /// Meets the others in `call`, and returns what all ranks have brought.
    fn exchange(&self, call: &Call, tensor: DeviceTensor) -> Result<Vec<DeviceTensor>, Error> {
        let (size, board) = (self.size(), &self.board().0);
        let number = self.next_exchange();
        let tensor = if size == 1 { tensor } else { exclusive(tensor) };
        let empty = || Exchange { tensors: vec![None; size], fetched: 0 };
        lock(board).entry(number).or_insert_with(empty).tensors[self.rank()] = Some(tensor);
        if let Err(error) = self.collective(call, Transfer::Nothing) {
            // The world is over.
            lock(board).remove(&number);
            return Err(error);
        }
        let mut board = lock(board);
        let missing = || Error::invalid(call.operation.name(), "a rank brought no tensor to the meeting");
        let exchange = board.get_mut(&number).ok_or_else(missing)?;
        exchange.fetched += 1;
        let last = exchange.fetched == size;
        let tensors = exchange.tensors.iter().cloned().collect::<Option<Vec<_>>>();
        if last {
            board.remove(&number);
        }
        tensors.ok_or_else(missing)
    }

    fn all_reduce_many_as<K: Scale>(
        &self,
        op: ReduceOp,
        tensors: &[DeviceTensor],
    ) -> Result<(Vec<DeviceTensor>, u64), Error> {
        let call = pieces_on_device(op, tensors)?;
        let (reduced, bytes) = self.run_as::<K>(call, joined::<K>(tensors)?)?;
        Ok((parted::<K>(reduced, tensors)?, bytes))
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
        let rows: Vec<usize> = all.iter().map(|tensor| Extent::new(&tensor.meta.shape().to_vec()).rows()).collect();
        let rows = match operation {
            // Scaled tensors lie flat; these operations take equal dims anyway.
            Operation::AllReduce(_) | Operation::ReduceScatter(_) | Operation::Reduce { .. } => {
                vec![call.extent.rows(); size]
            }
            _ => rows,
        };
        let (width, dims) = match operation {
            // The others bring nothing that counts.
            Operation::Scatter { root } => {
                let dims = all[root].meta.shape().to_vec();
                (dims.iter().skip(1).product(), dims)
            }
            _ => (call.extent.width(), dims),
        };
        let device = all[rank].device.clone();
        let take =
            |from: usize, rows: Range<usize>| bring::<K>(&all[from], rows.start * width..rows.end * width, &device);
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
            1 if all[rank].dtype == dtype => Ok(bring::<K>(&all[rank], elements, &device)),
            _ => fold_here::<K>(&all, elements, op, dtype, &device).map(from_device::<1, K>),
        };
        let result = match operation {
            Operation::AllReduce(op) if size > 1 && call.extent.elements() >= SMALL => {
                // As on the host: everybody folds a share, and all put the shares together.
                let share = part(call.extent.elements(), size, rank);
                let folded = fold_here::<K>(&all, share, op, dtype, &device)?;
                let shares = self.exchange(&call, folded)?;
                let whole = |share: &DeviceTensor| bring::<K>(share, 0..share.meta.shape()[0], &device);
                Tensor::cat(shares.iter().map(whole).collect(), 0)
            }
            Operation::AllReduce(op) => folded(0..call.extent.elements(), op)?,
            Operation::Reduce { op, root } if root == rank => folded(0..call.extent.elements(), op)?,
            Operation::Reduce { .. } => take(rank, everything(rank)),
            Operation::ReduceScatter(op) => {
                let mine = part(call.extent.rows(), size, rank);
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
        // Still while all are held: what is somebody's own is told by that.
        let result = if size == 1 { result } else { exclusive(result) };
        drop(all);
        Ok((result, bytes))
    }
}

impl DeviceTransport for LocalTransport {
    fn carries(&self, device: &Device, _: DType) -> bool {
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
        self.hand_over(to, tag, Arrival::Device(Box::new(exclusive(tensor))))
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Arrival, Error> {
        self.take(from, tag)
    }
}

/// Elements of a tensor on a device. Those of another device go through host memory: CubeCL's own way between two GPUs makes
/// the threads of both wait for each other, and two ranks that send towards each other would do so for ever.
fn bring<K: Scale>(tensor: &DeviceTensor, elements: Range<usize>, device: &CubeDevice) -> Tensor<1, K> {
    let slice = from_device::<1, K>(flat(tensor.clone())).slice([elements]);
    match tensor.device == *device {
        true => slice,
        false => on_device(slice.into_data(), &Device::new(DispatchDevice::Cube(device.clone()))),
    }
}

/// The tensors, one behind the other.
fn joined<K: Scale>(tensors: &[DeviceTensor]) -> Result<DeviceTensor, Error> {
    to_device(Tensor::cat(tensors.iter().map(|tensor| from_device::<1, K>(flat(tensor.clone()))).collect(), 0))
}

/// The way back.
fn parted<K: Scale>(whole: DeviceTensor, like: &[DeviceTensor]) -> Result<Vec<DeviceTensor>, Error> {
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
    let shards = all.iter().map(|tensor| to_device(bring::<K>(tensor, elements.clone(), device)));
    fold(&shards.collect::<Result<Vec<_>, _>>()?, 0..elements.len(), op, dtype)
}

/// Kinds of tensors that are reduced.
trait Scale: TensorKind {
    /// Applies a factor. What has 16 bits is wide afterwards, so that it is rounded once, when all are added.
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
