//! Device data between threads: ranks that share a GPU, or have several in one process.
//!
//! A rank lays its tensor, a handle to a buffer on the device, on the group's board, meets the others, and takes the handles
//! of all. What is to be computed of them it enqueues on its own stream, with burn's kernels; CubeCL makes that stream wait
//! for the streams that write the buffers. Nothing is copied to the host, and the host does not wait for the device.
//!
//! Buffers are never written in place: a rank that is late may still read them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use burn::backend::DispatchDevice;
use burn::tensor::{Bool, DType, Device, Float, Int, Tensor};

use super::group::lock;
use super::transport::LocalTransport;
use crate::Error;
use crate::comm::device::{
    DeviceTensor, DeviceTransport, bytes_moved, from_device, rows_received, to_device, with_dims,
};
use crate::comm::{Call, Extent, Operation, ReduceOp, TensorKind, Transfer, Transport, part, reduce};

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

    fn run_as<K: Fold>(&self, operation: Operation, tensor: DeviceTensor) -> Result<(DeviceTensor, u64), Error> {
        let dims = tensor.meta.shape().to_vec();
        let call = Call::on_device(operation, tensor.dtype, Extent::new(&dims));
        let (rank, size) = (self.rank(), self.size());
        let brought = match operation {
            Operation::AllReduce(ReduceOp::PreMulSum(factor))
            | Operation::ReduceScatter(ReduceOp::PreMulSum(factor))
            | Operation::Reduce { op: ReduceOp::PreMulSum(factor), .. } => {
                to_device(K::scale(from_device::<1, K>(flat(tensor)), factor))?
            }
            _ => tensor,
        };
        let dtype = brought.dtype;
        let all = self.exchange(&call, brought)?;
        let rows: Vec<usize> = all.iter().map(|tensor| Extent::new(&tensor.meta.shape().to_vec()).rows()).collect();
        let rows = match operation {
            // Scaled tensors lie flat; these operations take equal dims anyway.
            Operation::AllReduce(_) | Operation::ReduceScatter(_) | Operation::Reduce { .. } => {
                vec![call.extent.rows(); size]
            }
            _ => rows,
        };
        let width = call.extent.width();
        let device = tensor_device(&all[rank]);
        let take = |from: usize, rows: Range<usize>| {
            let flat = from_device::<1, K>(flat(all[from].clone())).to_device(&device);
            flat.slice([rows.start * width..rows.end * width])
        };
        let parts = |rows_of: &dyn Fn(usize) -> Range<usize>| {
            let parts: Vec<_> =
                (0..size).map(|from| (from, rows_of(from))).filter(|(_, rows)| !rows.is_empty()).collect();
            match parts.len() {
                0 => take(rank, 0..0),
                _ => Tensor::cat(parts.into_iter().map(|(from, rows)| take(from, rows)).collect(), 0),
            }
        };
        let everything = |from: usize| 0..rows[from];
        let result = match operation {
            Operation::AllReduce(op) if size > 1 && call.extent.elements() >= SMALL => {
                // As on the host: everybody folds a share, and all put the shares together.
                let share = part(call.extent.elements(), size, rank);
                let inputs = all
                    .iter()
                    .map(|tensor| from_device::<1, K>(flat(tensor.clone())).to_device(&device).slice([share.clone()]));
                let folded = to_device(K::fold(inputs.collect(), op))?;
                let shares = self.exchange(&call, folded)?;
                Tensor::cat(shares.into_iter().map(|share| from_device::<1, K>(share).to_device(&device)).collect(), 0)
            }
            Operation::AllReduce(op) => K::fold((0..size).map(|from| take(from, everything(from))).collect(), op),
            Operation::Reduce { op, root } if root == rank => {
                K::fold((0..size).map(|from| take(from, everything(from))).collect(), op)
            }
            Operation::Reduce { .. } => take(rank, everything(rank)),
            Operation::ReduceScatter(op) => {
                let mine = part(call.extent.rows(), size, rank);
                K::fold((0..size).map(|from| take(from, mine.clone())).collect(), op)
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
        let bytes = bytes_moved(&operation, &rows, rank, width * dtype.size());
        Ok((with_dims(to_device(result)?, dims), bytes))
    }
}

impl DeviceTransport for LocalTransport {
    fn carries(&self, device: &Device, _: DType) -> bool {
        matches!(device.as_dispatch(), DispatchDevice::Cube(_))
    }

    fn run(&self, operation: Operation, tensor: DeviceTensor) -> Result<(DeviceTensor, u64), Error> {
        if let Operation::AllReduce(op) | Operation::ReduceScatter(op) | Operation::Reduce { op, .. } = operation {
            reduce::check(op, tensor.dtype)?;
        }
        match tensor.dtype {
            dtype if dtype.is_float() => self.run_as::<Float>(operation, tensor),
            dtype if dtype.is_bool() => self.run_as::<Bool>(operation, tensor),
            _ => self.run_as::<Int>(operation, tensor),
        }
    }
}

fn flat(tensor: DeviceTensor) -> DeviceTensor {
    let elements = tensor.meta.shape().iter().product();
    with_dims(tensor, vec![elements])
}

fn tensor_device(tensor: &DeviceTensor) -> Device {
    Device::new(DispatchDevice::Cube(tensor.device.clone()))
}

/// Kinds of tensors that burn's kernels can reduce.
trait Fold: TensorKind {
    /// The reduction of the ranks' contributions, in rank order. Factors have been applied.
    fn fold(contributions: Vec<Tensor<1, Self>>, op: ReduceOp) -> Tensor<1, Self>;

    /// Applies a factor.
    fn scale(contribution: Tensor<1, Self>, factor: f64) -> Tensor<1, Self>;
}

fn in_order<K: Fold>(
    contributions: Vec<Tensor<1, K>>,
    combine: impl Fn(Tensor<1, K>, Tensor<1, K>) -> Tensor<1, K>,
) -> Tensor<1, K> {
    contributions.into_iter().reduce(combine).expect("a group has at least one rank")
}

impl Fold for Float {
    fn fold(contributions: Vec<Tensor<1>>, op: ReduceOp) -> Tensor<1> {
        let (ranks, dtype) = (contributions.len(), contributions[0].dtype());
        let wide = match dtype {
            DType::F16 | DType::BF16 => contributions.into_iter().map(|x| x.cast(DType::F32)).collect(),
            _ => contributions,
        };
        let folded = match op {
            ReduceOp::Sum | ReduceOp::PreMulSum(_) => in_order(wide, |a, b| a + b),
            ReduceOp::Mean => in_order(wide, |a, b| a + b).div_scalar(ranks as f64),
            ReduceOp::Product => in_order(wide, |a, b| a * b),
            ReduceOp::Max => in_order(wide, |a, b| with_nan(&a, &b, a.clone().max_pair(b.clone()))),
            ReduceOp::Min => in_order(wide, |a, b| with_nan(&a, &b, a.clone().min_pair(b.clone()))),
        };
        match folded.dtype() == dtype {
            true => folded,
            false => folded.cast(dtype),
        }
    }

    fn scale(contribution: Tensor<1>, factor: f64) -> Tensor<1> {
        contribution.mul_scalar(factor)
    }
}

/// A NaN on any rank stays one.
fn with_nan(a: &Tensor<1>, b: &Tensor<1>, result: Tensor<1>) -> Tensor<1> {
    result.mask_fill(a.clone().is_nan().bool_or(b.clone().is_nan()), f32::NAN)
}

impl Fold for Int {
    fn fold(contributions: Vec<Tensor<1, Int>>, op: ReduceOp) -> Tensor<1, Int> {
        match op {
            ReduceOp::Max => in_order(contributions, |a, b| a.max_pair(b)),
            ReduceOp::Min => in_order(contributions, |a, b| a.min_pair(b)),
            ReduceOp::Product => in_order(contributions, |a, b| a * b),
            // Others were refused.
            _ => in_order(contributions, |a, b| a + b),
        }
    }

    fn scale(contribution: Tensor<1, Int>, _: f64) -> Tensor<1, Int> {
        // Refused before.
        contribution
    }
}

impl Fold for Bool {
    fn fold(contributions: Vec<Tensor<1, Bool>>, op: ReduceOp) -> Tensor<1, Bool> {
        match op {
            ReduceOp::Max => in_order(contributions, |a, b| a.bool_or(b)),
            // Others were refused.
            _ => in_order(contributions, |a, b| a.bool_and(b)),
        }
    }

    fn scale(contribution: Tensor<1, Bool>, _: f64) -> Tensor<1, Bool> {
        // Refused before.
        contribution
    }
}
