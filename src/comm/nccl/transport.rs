//! The `Transport` over NCCL: device data over NCCL, everything else over the host transport.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{DType, Device};
use burn_cubecl::CubeDevice;
use cubecl_environment::stream::StreamId;

use super::collective::{Addresses, Task, data_type};
use super::conversion::Conversion;
use super::messages::SendQueue;
use super::nccl_comm::NcclComm;
use super::receiver::Receiver;
use super::shape_exchange::{Shapes, reduce};
use super::stream::{NcclStream, Preparing, prepare};
use super::watchdog::{CommHandle, HeldBuffer, Watchdog};
use crate::Error;
use crate::comm::coalesced::coalesced_on_device;
use crate::comm::device::{DeviceTensor, DeviceTransport, bytes_moved, empty_on, flat, rows_received};
use crate::comm::message_header::MessageHeader;
use crate::comm::transport::check_rank;
use crate::comm::{Arrival, Call, CallLog, Message, Operation, ReduceOp, Transfer, Transport};

/// One rank's member of a group that NCCL joins. Everything but moving device data is done by the host transport.
#[derive(Debug)]
pub(super) struct NcclTransport {
    host: Arc<dyn Transport>,
    link: Arc<CommHandle>,
    stream: Arc<NcclStream>,
    watchdog: Arc<Watchdog>,
    /// The CUDA device of this rank, in burn's and in CubeCL's type.
    device: (Device, CubeDevice),
    /// By rank: the messages to it.
    send_queues: Box<[Arc<SendQueue>]>,
    receiver: Arc<Receiver>,
}

impl NcclTransport {
    /// Collective over `host`.
    pub fn new(
        host: Arc<dyn Transport>,
        raw: NcclComm,
        stream: Arc<NcclStream>,
        watchdog: Arc<Watchdog>,
        device: (Device, CubeDevice),
    ) -> Result<Self, Error> {
        let link = watchdog.link(raw);
        // The same group once more, for the answers of receivers.
        let answers = host.split("answers", 0, host.rank() as i64)?;
        let send_queue = |to| {
            let send_queue = Arc::new(SendQueue::new(answers.clone(), to));
            watchdog.send_queue(&send_queue);
            send_queue
        };
        let send_queues: Box<[_]> = (0..host.size()).map(send_queue).collect();
        let (own, cube) = (send_queues[host.rank()].clone(), device.1.clone());
        let receiver = Receiver::new(host.clone(), answers, watchdog.clone(), cube, own);
        Ok(Self { host, link, stream, watchdog, device, send_queues, receiver })
    }

    /// Starts to find the addresses of the inputs and as many outputs of a collective.
    fn prepare(&self, inputs: &[DeviceTensor], outputs: &[DeviceTensor]) -> Result<Preparing, Error> {
        let is_empty = |tensor: &&DeviceTensor| tensor.meta.shape().iter().any(|dim| *dim == 0);
        // Nothing is read or written at the address of an empty one: any will do.
        let other = inputs.iter().chain(outputs).find(|tensor| !is_empty(tensor));
        let found = |tensor| if is_empty(&tensor) { other.unwrap_or(tensor) } else { tensor };
        prepare(self.watchdog.gpu(), inputs.iter().chain(outputs).map(found))
    }

    /// Only here ranks find out that they call different things, or that one is lost: NCCL would hang.
    fn meet(&self, call: &Call) -> Result<(), Error> {
        self.host.collective(call, Transfer::Nothing).map(drop)
    }

    /// Enqueues what `call` does from the inputs into the outputs.
    fn enqueue(
        &self,
        operation: &Call,
        (preparing, dtype): (Preparing, DType),
        call: impl FnOnce(&Task<'_>, &[Addresses]) -> Result<(), Error>,
        shapes: &Shapes,
        shared: Vec<HeldBuffer>,
    ) -> Result<(), Error> {
        let prepared = preparing.finish(self.host.timeout())?;
        let mut raw = self.link.lock();
        let (done, called) = self.stream.enqueue(&prepared, |stream| {
            let (froms, tos) = (prepared.places(), prepared.places().skip(prepared.places().len() / 2));
            let places: Vec<Addresses> = froms.zip(tos).map(|(from, to)| (from.cast_const(), to)).collect();
            let (rank, rows, width) = (self.host.rank(), &shapes.rows[..], shapes.width());
            call(&Task { raw: &raw, rank, dtype, rows, width, stream }, &places)
        })?;
        if called.is_err() {
            raw.abort();
        }
        drop(raw);
        self.watchdog.watch(*operation, &self.link, (prepared.ready.clone(), done.clone()), shared);
        prepared.release(done);
        called
    }
}

impl DeviceTransport for NcclTransport {
    fn supports(&self, device: &Device, dtype: DType) -> bool {
        *device == self.device.0 && data_type(dtype).is_some()
    }

    fn run(&self, call: &Call, tensor: DeviceTensor) -> Result<(DeviceTensor, u64), Error> {
        let (operation, rank) = (call.operation, self.host.rank());
        let (dims, dtype, conversion) =
            (tensor.meta.shape().to_vec(), tensor.dtype, Conversion::of(&operation, &tensor));
        let tensor = conversion.before(tensor, self.watchdog.gpu())?;
        let shared = held_elsewhere(std::slice::from_ref(&tensor));
        let find = |shapes: &Shapes| {
            let output = match operation {
                Operation::AllReduce(_) | Operation::Reduce { .. } | Operation::Broadcast { .. } => room_for(&tensor),
                _ => empty_on(&tensor.device, shapes.dims_received(&operation, rank), tensor.dtype),
            };
            let found = self.prepare(std::slice::from_ref(&tensor), std::slice::from_ref(&output))?;
            Ok::<_, Error>((output, found))
        };
        let known = Shapes::alike(call, &tensor, self.host.size());
        // The device's thread finds the buffers while the ranks synchronize.
        let early = known.as_ref().map(find).transpose()?;
        self.meet(call)?;
        let shapes = match known {
            Some(shapes) => shapes,
            None => Shapes::ask(&*self.host, call, &tensor)?,
        };
        let (output, found) = match early {
            Some(early) => early,
            None => find(&shapes)?,
        };
        let width = if conversion == Conversion::None { shapes.width() } else { dims.iter().skip(1).product() };
        let bytes = bytes_moved(&operation, &shapes.rows, rank, width, dtype);
        let enqueue = |task: &Task<'_>, places: &[Addresses]| {
            places.iter().try_for_each(|(from, to)| task.run(&operation, *from, *to))
        };
        self.enqueue(call, (found, tensor.dtype), enqueue, &shapes, shared)?;
        let mut received = dims;
        if let Some(first) = received.first_mut().filter(|_| conversion != Conversion::None) {
            *first = rows_received(&operation, &shapes.rows, rank);
        }
        Ok((conversion.after(output, (received, dtype), self.watchdog.gpu())?, bytes))
    }

    fn all_reduce_many(&self, op: ReduceOp, tensors: Vec<DeviceTensor>) -> Result<(Vec<DeviceTensor>, u64), Error> {
        let call = coalesced_on_device(op, &tensors)?;
        let gpu = self.watchdog.gpu();
        let meant: Vec<_> = tensors.iter().map(|tensor| (tensor.meta.shape().to_vec(), tensor.dtype)).collect();
        let conversions: Vec<_> = tensors.iter().map(|tensor| Conversion::of(&call.operation, tensor)).collect();
        let tensors: Vec<_> = (tensors.into_iter().zip(&conversions))
            .map(|(tensor, conversion)| match conversion {
                // A tensor without elements has a dtype all the same.
                Conversion::None => Ok(tensor),
                _ => conversion.before(flat(tensor), gpu),
            })
            .collect::<Result<_, _>>()?;
        let shared = held_elsewhere(&tensors);
        let outputs: Vec<DeviceTensor> = tensors.iter().map(room_for).collect();
        let found = self.prepare(&tensors, &outputs)?;
        self.meet(&call)?;
        let counts: Vec<usize> = tensors.iter().map(|tensor| tensor.meta.shape().iter().product()).collect();
        let shapes = Shapes { rows: vec![call.shape.rows(); self.host.size()], dims: vec![call.shape.rows()] };
        let bytes = bytes_moved(&call.operation, &shapes.rows, self.host.rank(), 1, meant[0].1);
        let dtype =
            tensors.iter().zip(&counts).find(|(_, count)| **count > 0).map_or(meant[0].1, |(tensor, _)| tensor.dtype);
        let reduce = |task: &Task<'_>, places: &[Addresses]| task.all_reduce_many(op, places, &counts);
        self.enqueue(&call, (found, dtype), reduce, &shapes, shared)?;
        let results = outputs.into_iter().zip(conversions).zip(meant);
        let come = |((output, conversion), meant): ((_, Conversion), _)| conversion.after(output, meant, gpu);
        Ok((results.map(come).collect::<Result<_, _>>()?, bytes))
    }

    fn send(&self, to: usize, tag: u64, tensor: DeviceTensor) -> Result<(), Error> {
        check_rank(self, to, "send")?;
        self.send_queues[to].put(&*self.host, tag, tensor, self.watchdog.gpu())?;
        self.watchdog.wake();
        Ok(())
    }

    fn receive(&self, from: usize, tag: u64) -> Result<Arrival, Error> {
        self.receiver.receive((from, tag))
    }

    fn post_receive(&self, from: usize, tag: u64) {
        self.receiver.expect((from, tag));
    }
}

impl Drop for NcclTransport {
    fn drop(&mut self) {
        self.receiver.close();
        // What it has sent to itself cannot be received any more.
        let others = self.send_queues.iter().enumerate().filter(|(to, _)| *to != self.host.rank());
        others.for_each(|(_, send_queue)| self.watchdog.hold(send_queue));
    }
}

/// The tensors of which another thread may have a handle: it could write to them, and does not wait for what this one
/// has enqueued.
fn held_elsewhere(tensors: &[DeviceTensor]) -> Vec<HeldBuffer> {
    let here = StreamId::current();
    let shared = tensors.iter().filter(|tensor| !tensor.can_mut() && tensor.handle.stream != here);
    shared.map(|tensor| (tensor.clone(), None)).collect()
}

/// The tensor itself if it holds the only handle of its buffer, else another buffer of its dims.
fn room_for(tensor: &DeviceTensor) -> DeviceTensor {
    match tensor.handle.can_mut() {
        true => tensor.clone(),
        false => empty_on(&tensor.device, tensor.meta.shape().to_vec(), tensor.dtype),
    }
}

impl Transport for NcclTransport {
    fn name(&self) -> &'static str {
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

    fn gathers_in_place(&self) -> bool {
        self.host.gathers_in_place()
    }

    fn collective(&self, call: &Call, transfer: Transfer<'_, '_>) -> Result<u64, Error> {
        self.host.collective(call, transfer)
    }

    fn send(&self, to: usize, tag: u64, message: Message) -> Result<(), Error> {
        if MessageHeader::is_in(&message) {
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
        self.watchdog.gpu().enter()?;
        // A stream of its own: groups do not wait for each other.
        let stream = Arc::new(NcclStream::new(self.watchdog.gpu())?);
        let raw = self.link.lock().split(color, host.rank(), &host)?;
        Ok(Arc::new(Self::new(host, raw, stream, self.watchdog.clone(), self.device.clone())?))
    }

    fn abort(&self, error: Error) {
        self.host.abort(error);
        // What the device waits for ends now, not with the watchdog's next poll.
        self.watchdog.wake();
    }

    fn leave(&self) {
        self.host.leave();
    }

    fn panicking(&self) {
        self.host.panicking();
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
