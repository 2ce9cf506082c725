//! An engine for host data, with NCCL for device data on top.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use burn::tensor::{DType, Device};

use super::collective::{Task, data_type};
use super::lane::Lane;
use super::raw::Raw;
use crate::Error;
use crate::comm::device::{DeviceTensor, DeviceTransport, bytes_moved, empty_like, rows_received, to_host};
use crate::comm::{Arrival, BufferMut, Call, CallLog, Extent, Message, Operation, ReduceOp, Transfer, Transport};

/// A rank's place in a group that NCCL joins. All but collectives on device data is done by the engine below.
#[derive(Debug)]
pub(super) struct NcclTransport {
    host: Arc<dyn Transport>,
    /// NCCL takes one call at a time.
    raw: Mutex<Raw>,
    lane: Arc<Lane>,
    /// The CUDA device of this rank.
    device: Device,
}

impl NcclTransport {
    pub fn new(host: Arc<dyn Transport>, raw: Raw, lane: Arc<Lane>, device: Device) -> Self {
        Self { host, raw: Mutex::new(raw), lane, device }
    }

    /// The first dims of what all ranks bring. They differ only in gathers and exchanges, and only then it is asked.
    fn rows(&self, call: &Call) -> Result<Vec<usize>, Error> {
        let rows = call.extent.rows();
        if !matches!(call.operation, Operation::AllGather | Operation::Gather { .. } | Operation::AllToAll) {
            return Ok(vec![rows; self.host.size()]);
        }
        let mut all = vec![0u64; self.host.size()];
        all[self.host.rank()] = rows as u64;
        reduce(&*self.host, ReduceOp::Sum, &mut all)?;
        Ok(all.into_iter().map(|rows| rows as usize).collect())
    }
}

/// Reduces a few numbers of the engine's own over the host.
fn reduce(host: &dyn Transport, op: ReduceOp, values: &mut [u64]) -> Result<(), Error> {
    let call = Call::new(Operation::AllReduce(op), Some(DType::U64), Extent::flat(values.len()));
    host.collective(&call, Transfer::InPlace(&mut [BufferMut::new(values)])).map(drop)
}

impl DeviceTransport for NcclTransport {
    fn carries(&self, device: &Device, dtype: DType) -> bool {
        *device == self.device && data_type(dtype).is_some()
    }

    fn run(&self, operation: Operation, tensor: DeviceTensor) -> Result<(DeviceTensor, u64), Error> {
        let dims = tensor.meta.shape().to_vec();
        let call = Call::on_device(operation, tensor.dtype, Extent::new(&dims));
        // Here, and only here, ranks find out that they call different things, or that one is lost: NCCL would hang.
        self.host.collective(&call, Transfer::Nothing)?;
        let rows = self.rows(&call)?;
        let (rank, width) = (self.host.rank(), call.extent.width());
        let received = rows_received(&operation, &rows, rank);
        let in_place =
            matches!(operation, Operation::AllReduce(_) | Operation::Reduce { .. } | Operation::Broadcast { .. });
        let output = match in_place && tensor.handle.can_mut() {
            true => tensor.clone(),
            false => {
                let mut dims = dims;
                match dims.first_mut() {
                    Some(first) => *first = received,
                    None => debug_assert_eq!(received, 1),
                }
                empty_like(&tensor, dims)
            }
        };
        let mut raw = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        let enqueued = self.lane.enqueue(&tensor, &output, |from, to, stream| {
            let task = Task { raw: &raw, rank, dtype: tensor.dtype, rows: &rows, width, stream };
            task.run(&operation, from, to)
        });
        if enqueued.is_err() {
            raw.abort();
        }
        enqueued?;
        let bytes = bytes_moved(&operation, &rows, rank, width * tensor.dtype.size());
        Ok((output, bytes))
    }

    fn all_reduce_many(&self, op: ReduceOp, tensors: Vec<DeviceTensor>) -> Result<(Vec<DeviceTensor>, u64), Error> {
        let mut moved = 0;
        let mut reduce = |tensor| {
            let (tensor, bytes) = self.run(Operation::AllReduce(op), tensor)?;
            moved += bytes;
            Ok(tensor)
        };
        let reduced = tensors.into_iter().map(&mut reduce).collect::<Result<_, Error>>()?;
        Ok((reduced, moved))
    }

    fn send(&self, to: usize, tag: u64, tensor: DeviceTensor) -> Result<(), Error> {
        self.host.send(to, tag, Message(to_host(tensor)?))
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Arrival, Error> {
        self.host.receive(from, tag).map(Arrival::from)
    }
}

impl Transport for NcclTransport {
    fn engine(&self) -> &'static str {
        "nccl"
    }

    fn group(&self) -> &Arc<str> {
        self.host.group()
    }

    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world_rank(&self) -> usize {
        self.host.world_rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn collective(&self, call: &Call, transfer: Transfer<'_, '_>) -> Result<u64, Error> {
        self.host.collective(call, transfer)
    }

    fn send(&self, to: usize, tag: u64, message: Message) -> Result<(), Error> {
        self.host.send(to, tag, message)
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Message, Error> {
        self.host.receive(from, tag)
    }

    fn timeout(&self) -> Duration {
        self.host.timeout()
    }

    fn split(&self, name: &str, color: u64, key: i64) -> Result<Arc<dyn Transport>, Error> {
        let host = self.host.split(name, color, key)?;
        // NCCL's colors are small: the lowest rank of a part stands for it.
        let mut lowest = [self.host.rank() as u64];
        reduce(&*host, ReduceOp::Min, &mut lowest)?;
        let color = lowest[0] as usize;
        self.lane.enter()?;
        let raw = self.raw.lock().unwrap_or_else(PoisonError::into_inner).split(color, host.rank(), host.group())?;
        Ok(Arc::new(Self::new(host, raw, self.lane.clone(), self.device.clone())))
    }

    fn abort(&self, error: Error) {
        self.host.abort(error);
    }

    fn leave(&self) {
        self.host.leave();
    }

    fn failure(&self) -> Option<Error> {
        self.host.failure()
    }

    fn log(&self) -> CallLog {
        self.host.log()
    }

    fn on_device(&self) -> Option<&dyn DeviceTransport> {
        Some(self)
    }
}
