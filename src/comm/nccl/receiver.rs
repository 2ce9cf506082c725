//! Receives messages between GPUs: what `recv` does, on whatever thread. `messages.rs` describes the protocol.

use std::sync::{Arc, Mutex};

use burn_cubecl::CubeDevice;
use cudarc::nccl::result as nccl;

use super::collective::data_type;
use super::event::CudaEvent;
use super::messages::{Channel, SendQueue};
use super::nccl_comm::unique_id;
use super::stream::{follow_here, prepare};
use super::watchdog::Watchdog;
use crate::Error;
use crate::comm::device::{DeviceTensor, empty_on};
use crate::comm::message_header::MessageHeader;
use crate::comm::posted_receives::{Asked, PostedReceives, SourceAndTag};
use crate::comm::sent_messages::{ask, ask_nothing_more};
use crate::comm::{Arrival, Call, CallShape, Message, Operation, Transport};
use crate::lock::lock;

/// The receiving side of a rank in a group.
pub(super) struct Receiver {
    host: Arc<dyn Transport>,
    /// The group in which it answers.
    answers: Arc<dyn Transport>,
    watchdog: Arc<Watchdog>,
    device: CubeDevice,
    /// By sending rank: the channel of that direction, from the first message on.
    channels: Box<[Mutex<Option<Channel>>]>,
    /// Messages of the rank to itself.
    own: Arc<SendQueue>,
    posted: PostedReceives<Come>,
}

/// A message, and the event from which on it is complete if NCCL transfers it.
type Come = (Arrival, Option<Arc<CudaEvent>>);

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Receiver {
    pub fn new(
        host: Arc<dyn Transport>,
        answers: Arc<dyn Transport>,
        watchdog: Arc<Watchdog>,
        device: CubeDevice,
        own: Arc<SendQueue>,
    ) -> Arc<Self> {
        let channels = (0..host.size()).map(|_| Mutex::default()).collect();
        Arc::new(Self { host, answers, watchdog, device, channels, own, posted: PostedReceives::default() })
    }

    /// Posts a receive: the next message of this key is transferred as soon as it has been sent.
    pub fn expect(self: &Arc<Self>, key: SourceAndTag) {
        let (from, rank) = (key.0, self.host.rank());
        // `receive` reports a rank that does not exist.
        if from >= self.host.size() || from == rank || !self.posted.expect(key) {
            return;
        }
        let receiver = self.clone();
        let fetch = move || {
            let look = |(from, tag)| receiver.host.try_receive(from, tag);
            if let Err(error) = receiver.posted.serve(look, |key, message| receiver.after(key, message)) {
                receiver.host.abort(error);
            }
        };
        let name = format!("nccl recv {rank} of {}", self.host.group());
        if let Err(problem) = std::thread::Builder::new().name(name).spawn(fetch) {
            log::warn!("messages travel only when they are asked for, for want of a thread: {problem}");
            self.posted.close();
        }
    }

    /// Fetches nothing more that has not been asked for.
    pub fn close(&self) {
        self.posted.close();
    }

    pub fn receive(&self, (from, tag): SourceAndTag) -> Result<Arrival, Error> {
        let (arrival, done) = match self.posted.take((from, tag), self.host.timeout()) {
            Asked::Fetched(come) => come,
            Asked::NotYet(turn) => {
                let message = self.host.receive(from, tag)?;
                drop(turn);
                return self.after((from, tag), message).map(|(arrival, _)| arrival);
            }
            Asked::Late => return Err(self.late((from, tag))),
        };
        // It was received on the stream of another thread.
        if let (Arrival::Device(tensor), Some(done)) = (&arrival, done) {
            follow_here(self.watchdog.gpu(), tensor, done);
        }
        Ok(arrival)
    }

    /// Fails the world for a message that was announced and does not arrive.
    fn late(&self, (from, tag): SourceAndTag) -> Error {
        let host = &self.host;
        let call = Call::new(Operation::Receive { from, tag }, None, CallShape::flat(0));
        host.abort(Error::Timeout {
            group: host.group().clone(),
            rank: host.rank(),
            operation: call.to_string(),
            waited: host.timeout(),
            missing: format!("the message that rank {from} has announced"),
            log: host.log(),
        });
        host.failure().unwrap_or_else(|| Error::invalid("recv over NCCL", "the message does not arrive"))
    }

    /// The message, or the one that a header announces.
    fn after(&self, (from, tag): SourceAndTag, message: Message) -> Result<Come, Error> {
        if !MessageHeader::is_in(&message) {
            return Ok((message.into(), None));
        }
        let garbled = || Error::invalid("recv over NCCL", format!("the header of a message of rank {from} is garbled"));
        let header = MessageHeader::read(&message).ok_or_else(garbled)?;
        let (tensor, done) = match from == self.host.rank() {
            true => (self.own.take(&header, &self.device), None),
            false => self.fetch(header, (from, tag))?,
        };
        Ok((Arrival::Device(Box::new(tensor)), done))
    }

    /// Receives what a header announces.
    fn fetch(
        &self,
        header: MessageHeader,
        (from, tag): SourceAndTag,
    ) -> Result<(DeviceTensor, Option<Arc<CudaEvent>>), Error> {
        let unsupported = || Error::UnsupportedDType { operation: "recv over NCCL", dtype: header.dtype };
        let kind = data_type(header.dtype).ok_or_else(unsupported)?;
        let output = empty_on(&self.device, header.dims, header.dtype);
        let count = output.meta.shape().iter().product();
        if count == 0 {
            return Ok((output, None));
        }
        let preparing = prepare(self.watchdog.gpu(), [&output].into_iter())?;
        // Locked to the end: receives are enqueued in the order of the answers.
        let mut channel = lock(&self.channels[from]);
        let id = match *channel {
            Some(_) => None,
            None => Some(unique_id()?),
        };
        ask(&*self.answers, from, header.number, id.as_ref().map_or(&[][..], |id| &id[..]))?;
        if let Some(id) = id {
            *channel = Some(Channel::new(&id, 1, &self.host, &self.watchdog)?);
        }
        let nowhere = || Error::invalid("recv over NCCL", "there is no room for the message");
        let Some(channel) = &*channel else { return Err(nowhere()) };
        let prepared = preparing.finish(self.host.timeout())?;
        let place = prepared.places().next().ok_or_else(nowhere)?;
        let raw = channel.link.lock();
        let (done, called) = channel.stream.enqueue(&prepared, |stream| {
            // SAFETY: the buffer has room for `count` elements and is held until the stream has passed.
            raw.finish("recv", unsafe { nccl::recv(place, count, kind, 0, raw.comm, stream) })
        })?;
        drop(raw);
        let shape = CallShape::new(&output.meta.shape().to_vec());
        let call = Call::on_device(Operation::Receive { from, tag }, header.dtype, shape);
        self.watchdog.watch(call, &channel.link, (prepared.ready.clone(), done.clone()), Vec::new());
        prepared.release(done.clone());
        called.map(|()| (output, Some(done)))
    }
}

/// When the last thread that could receive is gone: the others need not keep messages for this rank any more.
impl Drop for Receiver {
    fn drop(&mut self) {
        let others = (0..self.host.size()).filter(|rank| *rank != self.host.rank());
        for other in others.filter(|_| self.host.failure().is_none()) {
            // A rank that cannot be reached has gone, or the world has failed: nothing is kept then.
            let _ = ask_nothing_more(&*self.answers, other);
        }
    }
}
