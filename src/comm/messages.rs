//! What one rank sends to another.

use super::communicator::Communicator;
use super::{Call, Extent, Message, Operation, Payload, Pending, host};
use crate::Error;

impl Communicator {
    /// Sends a payload to rank `to`. Does not wait for it to be received; within a process the memory itself moves.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`].
    pub fn send<P: Payload>(&self, payload: P, to: usize, tag: u64) -> Result<(), Error> {
        let (data, _) = payload.into_host()?;
        host::check_dtype("send", data.dtype())?;
        let bytes = data.layout().num_elements() * data.dtype().size();
        let call = Call::new(Operation::Send { to, tag }, Some(data.dtype()), host::extent(&data));
        self.count(&call, || self.transport().send(to, tag, Message(data)).map(|()| bytes as u64))
    }

    /// Receives the oldest message of rank `from` that bears `tag`. Tensors arrive on the CPU device
    /// [`Device::flex`](burn::tensor::Device::flex).
    ///
    /// # Errors
    /// [`Error::NoSuchRank`]; [`Error::UnexpectedMessage`], on every rank, if the message is not a `P`.
    pub fn recv<P: Payload>(&self, from: usize, tag: u64) -> Result<P, Error> {
        let call = Call::new(Operation::Receive { from, tag }, None, Extent::flat(0));
        let mut received = None;
        self.count(&call, || {
            let Message(data) = self.transport().receive(from, tag)?;
            let bytes = data.layout().num_elements() * data.dtype().size();
            received = Some(data);
            Ok(bytes as u64)
        })?;
        let data = received.ok_or_else(|| Error::invalid("recv", "the engine returned no message"))?;
        let found = format!("{:?} {:?}", data.dtype(), host::extent(&data).dims());
        P::from_host(data, &P::Home::default()).map_err(|_| {
            let (group, to, expected) = (self.group().clone(), self.rank(), std::any::type_name::<P>().to_owned());
            let error = Error::UnexpectedMessage { group, from, to, tag, expected, found, log: self.log() };
            self.fail_with(error)
        })
    }

    /// [`recv`](Self::recv) as a handle: the message travels while the rank computes, and is taken by waiting.
    pub fn start_recv<P: Payload>(&self, from: usize, tag: u64) -> Pending<P> {
        let comm = self.clone();
        Pending::deferred(move || comm.recv(from, tag))
    }
}
