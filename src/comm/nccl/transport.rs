//! An engine for host data, with NCCL for device data on top.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{DType, Device};
use burn_cubecl::CubeDevice;
use cubecl_environment::stream::StreamId;

use super::collective::{Task, data_type};
use super::keeper::{Held, Keeper, Link};
use super::lane::{Lane, prepare};
use super::messages::{Header, Inbox, Outbox};
use super::raw::Raw;
use crate::Error;
use crate::comm::collectives::pieces_on_device;
use crate::comm::device::{DeviceTensor, DeviceTransport, bytes_moved, empty_on, rows_received};
use crate::comm::{Arrival, BufferMut, Call, CallLog, Extent, Message, Operation, ReduceOp, Transfer, Transport};

/// A rank's place in a group that NCCL joins. All but what moves device data is done by the engine below.
#[derive(Debug)]
pub(super) struct NcclTransport {
    host: Arc<dyn Transport>,
    /// The same group once more, for the answers of those who receive messages.
    answers: Arc<dyn Transport>,
    link: Arc<Link>,
    lane: Arc<Lane>,
    keeper: Arc<Keeper>,
    /// The CUDA device of this rank, as users and as CubeCL call it.
    device: (Device, CubeDevice),
    /// By rank: what is on its way to it, and from it.
    mail: Box<[(Arc<Outbox>, Inbox)]>,
}

impl NcclTransport {
    /// Collective over `host`.
    pub fn new(
        host: Arc<dyn Transport>,
        raw: Raw,
        lane: Arc<Lane>,
        keeper: Arc<Keeper>,
        device: (Device, CubeDevice),
    ) -> Result<Self, Error> {
        let link = keeper.link(raw);
        let answers = host.split("answers", 0, host.rank() as i64)?;
        let outbox = |to| {
            let outbox = Arc::new(Outbox::new(host.clone(), answers.clone(), to));
            keeper.outbox(&outbox);
            outbox
        };
        let mail = (0..host.size()).map(|peer| (outbox(peer), Inbox::default())).collect();
        Ok(Self { link, host, answers, lane, keeper, device, mail })
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

    /// Enqueues what `call` does from the inputs into the outputs, which are as many.
    fn enqueue(
        &self,
        operation: &Call,
        inputs: &[DeviceTensor],
        outputs: &[DeviceTensor],
        call: impl FnOnce(&Task<'_>, &[Place]) -> Result<(), Error>,
        rows: &[usize],
        shared: Vec<Held>,
    ) -> Result<(), Error> {
        let prepared = prepare(inputs.iter().chain(outputs))?;
        let mut raw = self.link.lock();
        let (done, called) = self.lane.enqueue(&prepared, |stream| {
            let (froms, tos) = (prepared.places(), prepared.places().skip(inputs.len()));
            let places: Vec<Place> = froms.zip(tos).map(|(from, to)| (from.cast_const(), to)).collect();
            let (rank, width, dtype) = (self.host.rank(), operation.extent.width(), inputs[0].dtype);
            call(&Task { raw: &raw, rank, dtype, rows, width, stream }, &places)
        })?;
        if called.is_err() {
            raw.abort();
        }
        drop(raw);
        self.keeper.watch(*operation, &self.link, (prepared.ready.clone(), done.clone()), shared);
        prepared.release(done);
        called
    }

    fn check_rank(&self, rank: usize, operation: &'static str) -> Result<(), Error> {
        match rank < self.host.size() {
            true => Ok(()),
            false => {
                let (group, size) = (self.host.group().clone(), self.host.size());
                Err(Error::NoSuchRank { group, rank, size, operation })
            }
        }
    }
}

/// Where something is read and written.
pub(super) type Place = (*const std::ffi::c_void, *mut std::ffi::c_void);

/// Reduces a few numbers of the engine's own over the host.
fn reduce(host: &dyn Transport, op: ReduceOp, values: &mut [u64]) -> Result<(), Error> {
    let call = Call::new(Operation::AllReduce(op), Some(DType::U64), Extent::flat(values.len()));
    host.collective(&call, Transfer::InPlace(&mut [BufferMut::new(values)])).map(drop)
}

impl DeviceTransport for NcclTransport {
    fn carries(&self, device: &Device, dtype: DType) -> bool {
        *device == self.device.0 && data_type(dtype).is_some()
    }

    fn run(&self, call: &Call, tensor: DeviceTensor) -> Result<(DeviceTensor, u64), Error> {
        let (operation, dims) = (call.operation, tensor.meta.shape().to_vec());
        // Here, and only here, ranks find out that they call different things, or that one is lost: NCCL would hang.
        self.host.collective(call, Transfer::Nothing)?;
        let rows = self.rows(call)?;
        let rank = self.host.rank();
        let in_place =
            matches!(operation, Operation::AllReduce(_) | Operation::Reduce { .. } | Operation::Broadcast { .. });
        let shared = held_elsewhere(std::slice::from_ref(&tensor));
        let output = match in_place {
            true => room_for(&tensor),
            false => {
                let mut dims = dims;
                match dims.first_mut() {
                    Some(first) => *first = rows_received(&operation, &rows, rank),
                    None => debug_assert_eq!(rows_received(&operation, &rows, rank), 1),
                }
                empty_on(&tensor.device, dims, tensor.dtype)
            }
        };
        let bytes = bytes_moved(&operation, &rows, rank, call.extent.width(), tensor.dtype);
        let (inputs, outputs) = ([tensor], [output]);
        self.enqueue(
            call,
            &inputs,
            &outputs,
            |task, places| places.iter().try_for_each(|(from, to)| task.run(&operation, *from, *to)),
            &rows,
            shared,
        )?;
        let [output] = outputs;
        Ok((output, bytes))
    }

    fn all_reduce_many(&self, op: ReduceOp, tensors: Vec<DeviceTensor>) -> Result<(Vec<DeviceTensor>, u64), Error> {
        let call = pieces_on_device(op, &tensors)?;
        self.host.collective(&call, Transfer::Nothing)?;
        let shared = held_elsewhere(&tensors);
        let outputs: Vec<DeviceTensor> = tensors.iter().map(room_for).collect();
        let counts: Vec<usize> = tensors.iter().map(|tensor| tensor.meta.shape().iter().product()).collect();
        let rows = vec![call.extent.rows(); self.host.size()];
        let bytes = bytes_moved(&call.operation, &rows, self.host.rank(), 1, tensors[0].dtype);
        let reduce = |task: &Task<'_>, places: &[Place]| task.all_reduce_many(op, places, &counts);
        self.enqueue(&call, &tensors, &outputs, reduce, &rows, shared)?;
        Ok((outputs, bytes))
    }

    fn send(&self, to: usize, tag: u64, tensor: DeviceTensor) -> Result<(), Error> {
        self.check_rank(to, "send")?;
        self.mail[to].0.put(tag, tensor)?;
        self.keeper.wake();
        Ok(())
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Arrival, Error> {
        let message = self.host.receive(from, tag)?;
        if !Header::is_in(&message) {
            return Ok(message.into());
        }
        let garbled = || Error::invalid("recv over NCCL", format!("the header of a message of rank {from} is garbled"));
        let header = Header::read(&message).ok_or_else(garbled)?;
        if from == self.host.rank() {
            return self.mail[from].0.take(&header, &self.device.1).map(|tensor| Arrival::Device(Box::new(tensor)));
        }
        let ends = (&self.host, &*self.answers, &self.keeper);
        let fetched = self.mail[from].1.fetch(header, &self.device.1, (from, tag), ends);
        fetched.map(|tensor| Arrival::Device(Box::new(tensor)))
    }
}

/// The tensors of which another thread may have a handle: it could write to them, and does not wait for what this one has
/// enqueued.
fn held_elsewhere(tensors: &[DeviceTensor]) -> Vec<Held> {
    let here = StreamId::current();
    let shared = tensors.iter().filter(|tensor| !tensor.can_mut() && tensor.handle.stream != here);
    shared.map(|tensor| (tensor.clone(), None)).collect()
}

/// The tensor itself if nobody else holds its buffer, else another buffer of its dims.
fn room_for(tensor: &DeviceTensor) -> DeviceTensor {
    match tensor.handle.can_mut() {
        true => tensor.clone(),
        false => empty_on(&tensor.device, tensor.meta.shape().to_vec(), tensor.dtype),
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
        if Header::is_in(&message) {
            let problem = "a message of this form means something else here: give the tensor another shape";
            return Err(Error::invalid("send over NCCL", problem));
        }
        self.host.send(to, tag, message)
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Message, Error> {
        DeviceTransport::receive(self, from, tag)?.into_host()
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
        self.keeper.gpu().enter()?;
        // A stream of its own: groups do not wait for each other.
        let lane = Arc::new(Lane::new(self.keeper.gpu())?);
        let raw = self.link.lock().split(color, host.rank(), &host)?;
        Ok(Arc::new(Self::new(host, raw, lane, self.keeper.clone(), self.device.clone())?))
    }

    fn abort(&self, error: Error) {
        self.host.abort(error);
        // What the device waits for is ended now, not in the keeper's next turn.
        self.keeper.wake();
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
