//! Sends messages between GPUs.
//!
//! # Protocol
//!
//! NCCL knows no tags, and what it has enqueued waits *on the device* for the peer, in the way of whatever is enqueued
//! behind. So nothing is enqueued before both sides want it:
//!
//! 1. `send` has the address of the buffer found and records when it is ready, puts it into the send queue under a
//!    number, and sends a *header* of number, dtype and dims over the host transport: with the tag of the message, so
//!    that messages of host and device data of one tag keep their order, and any tag may be received first. It returns.
//! 2. `recv` takes the header, allocates the buffer, answers with the number (*clear to send*) and enqueues `ncclRecv`,
//!    both under one lock (`receiver.rs`). `start_recv` leaves that to a thread of its own, which does it when the
//!    header arrives, whatever the rank computes meanwhile (`comm/posted_receives.rs`).
//! 3. The watchdog of the sending rank takes the answers in their order and enqueues `ncclSend` for each.
//!
//! **A rank may go before its messages.** When it drops its communicator, its watchdog keeps what has not been asked
//! for (`comm/sent_messages.rs`): until it is, or until its receiver says that it will receive *nothing more*, which is
//! the last answer of every rank that drops its own, or for as long as the time-out. A message that nobody has received
//! by then is dropped, with a warning in the log.
//!
//! **No deadlock.** Each direction between two ranks has a NCCL communicator and streams of its own, made with the
//! first message: what two ranks send to each other uses different streams, and no message waits for a collective, nor
//! a collective for a message. On one of them, sends and receives are enqueued in the order of the answers on both
//! sides. When an `ncclRecv` is enqueued its message has been sent, so it waits for nothing but what the sender's
//! device was given before: by the time at which they were enqueued, what waits is always later than what it waits for.
//! On the host, a rank that receives waits for the sender's watchdog, once, to make their communicator; a watchdog
//! waits for nobody but receivers who are waiting for just that.
//!
//! **On which stream?** A message is received on the stream of its direction, whatever thread receives it: its buffer
//! is made on the stream of that thread, the transfer waits for what that had been given before, and what the thread
//! computes next waits for the transfer. A thread that receives in the background has a stream of its own to burn, as
//! for collectives, and so has the one that fetches for `start_recv`: there is no order between what the rank computes
//! before it waits and the transfer. CubeCL has 128 streams for all threads (`max_streams`), so two may share one and
//! wait for more than they must. A collective is marked ready before the ranks synchronize, and so waits for no message
//! that a peer sends behind it; only a gather or an all-to-all, whose output is not known before, could, if such a
//! message arrived within the microseconds between: the time-out would end that.
//!
//! **Who makes the communicator's id?** The receiver, who sends it with its first answer: the first thing that both
//! sides are sure to see in the same order.
//!
//! A header (`comm/message_header.rs`) is told from a user's message by its form; a user's message of that form is
//! refused.

use std::sync::{Arc, Mutex};

use burn_cubecl::CubeDevice;
use cudarc::nccl::result as nccl;

use super::collective::data_type;
use super::gpu::Gpu;
use super::nccl_comm::{ID_BYTES, NcclComm};
use super::stream::{NcclStream, Preparing, prepare};
use super::watchdog::{CommHandle, Watchdog};
use crate::Error;
use crate::comm::device::{DeviceTensor, empty_on};
use crate::comm::message_header::{DTYPES, MessageHeader};
use crate::comm::sent_messages::SentMessages;
use crate::comm::{Call, CallShape, Operation, Transport};
use crate::lock::lock;

// NCCL transfers every dtype that a header can announce.
const _: () = {
    let mut place = 0;
    while place < DTYPES.len() {
        assert!(data_type(DTYPES[place]).is_some());
        place += 1;
    }
};

/// The communicator and stream of one direction between two ranks. The sender is rank 0 of it.
#[derive(Debug)]
pub(super) struct Channel {
    pub link: Arc<CommHandle>,
    pub stream: NcclStream,
}

impl Channel {
    pub fn new(id: &[u8], end: usize, host: &Arc<dyn Transport>, watchdog: &Arc<Watchdog>) -> Result<Self, Error> {
        let stream = NcclStream::new(watchdog.gpu())?;
        Ok(Self { link: watchdog.link(NcclComm::init(id, 2, end, host)?), stream })
    }
}

/// A message that waits for its receiver: where it is, what, and its tag.
pub(super) struct WaitingMessage {
    preparing: Preparing,
    tensor: DeviceTensor,
    pub tag: u64,
}

/// The messages that a rank has sent to one other, and the channel over which they travel.
#[derive(Debug)]
pub(super) struct SendQueue {
    pub messages: Arc<SentMessages<WaitingMessage>>,
    channel: Mutex<Option<Arc<Channel>>>,
}

impl SendQueue {
    /// `answers` is the group in which receivers answer.
    pub fn new(answers: Arc<dyn Transport>, to: usize) -> Self {
        Self { messages: Arc::new(SentMessages::new(answers, to)), channel: Mutex::default() }
    }

    /// Announces a message in its group, and keeps it until its receiver asks for it.
    pub fn put(&self, group: &dyn Transport, tag: u64, tensor: DeviceTensor, gpu: &Gpu) -> Result<(), Error> {
        let preparing = prepare(gpu, [&tensor].into_iter())?;
        let (dtype, dims) = (tensor.dtype, tensor.meta.shape().to_vec());
        // An empty tensor needs no transfer.
        let full = dims.iter().product::<usize>() > 0;
        let message = full.then_some(WaitingMessage { preparing, tensor, tag });
        let header = self.messages.put(message, |number| MessageHeader { number, dtype, dims }.write())?;
        group.send(self.messages.to(), tag, header)
    }

    /// Receives a message that the rank has sent to itself.
    pub fn take(&self, header: &MessageHeader, device: &CubeDevice) -> DeviceTensor {
        let taken = self.messages.take(header.number).map(|sent| sent.tensor);
        taken.unwrap_or_else(|| empty_on(device, header.dims.clone(), header.dtype))
    }

    /// Sends what its receiver has asked for. Called by the watchdog alone. Returns whether there was something.
    pub fn deliver(&self, watchdog: &Arc<Watchdog>) -> Result<bool, Error> {
        self.messages.deliver(|message, id| self.transfer(message, id, watchdog))
    }

    fn transfer(&self, message: WaitingMessage, id: &[u8], watchdog: &Arc<Watchdog>) -> Result<(), Error> {
        let (to, WaitingMessage { preparing, tensor, tag }) = (self.messages.to(), message);
        let garbled = || Error::invalid("send over NCCL", format!("the answer of rank {to} is garbled"));
        let known = lock(&self.channel).clone();
        let channel = match known {
            Some(channel) => channel,
            None if id.len() == ID_BYTES => {
                let channel = Arc::new(Channel::new(id, 0, watchdog.host(), watchdog)?);
                *lock(&self.channel) = Some(channel.clone());
                channel
            }
            None => return Err(garbled()),
        };
        let kind = data_type(tensor.dtype).ok_or_else(garbled)?;
        let count = tensor.meta.shape().iter().product();
        let prepared = preparing.finish(watchdog.host().timeout())?;
        let place = prepared.places().next().ok_or_else(garbled)?;
        let raw = channel.link.lock();
        let (done, called) = channel.stream.enqueue(&prepared, |stream| {
            // SAFETY: the buffer holds `count` elements and is held until the stream has passed.
            raw.finish("send", unsafe { nccl::send(place, count, kind, 1, raw.comm, stream) })
        })?;
        drop(raw);
        let ready = prepared.ready.clone();
        let shape = CallShape::new(&tensor.meta.shape().to_vec());
        let call = Call::on_device(Operation::Send { to, tag }, tensor.dtype, shape);
        watchdog.watch(call, &channel.link, (ready, done), vec![(tensor, Some(prepared))]);
        called
    }
}
