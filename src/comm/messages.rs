//! What one rank sends to another.

use burn::tensor::{Device, Tensor};

use super::communicator::Communicator;
#[cfg(feature = "cubecl")]
use super::payload::OnDevice;
use super::payload::on_device;
use super::{Arrival, Call, Extent, Message, Operation, Payload, Pending, TensorKind, host};
use crate::Error;

impl Communicator {
    /// Sends a payload to rank `to`. Does not wait for it to be received; within a process the memory itself moves, on a
    /// device as in the host.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`].
    pub fn send<P: Payload>(&self, payload: P, to: usize, tag: u64) -> Result<(), Error> {
        #[cfg(feature = "cubecl")]
        let payload = match self.send_on_device(payload, to, tag)? {
            None => return Ok(()),
            Some(payload) => payload,
        };
        let (data, _) = payload.into_host()?;
        host::check_dtype("send", data.dtype())?;
        let bytes = data.layout().num_elements() * data.dtype().size();
        let call = Call::new(Operation::Send { to, tag }, Some(data.dtype()), host::extent(&data));
        self.count(&call, || self.transport().send(to, tag, Message(data)).map(|()| bytes as u64))
    }

    /// Sends a payload that is on the engine's device from there, or returns it if it is not.
    #[cfg(feature = "cubecl")]
    fn send_on_device<P: Payload>(&self, payload: P, to: usize, tag: u64) -> Result<Option<P>, Error> {
        let Some(engine) = self.transport().on_device() else { return Ok(Some(payload)) };
        let data = match payload.into_device(engine)? {
            OnDevice::Here(data, _) => data,
            OnDevice::Elsewhere(payload) => return Ok(Some(payload)),
        };
        let extent = Extent::new(&data.meta.shape().to_vec());
        let bytes = extent.elements() * data.dtype.size();
        let call = Call::on_device(Operation::Send { to, tag }, data.dtype, extent);
        self.count(&call, || engine.send(to, tag, data).map(|()| bytes as u64)).map(|()| None)
    }

    /// Receives the oldest message of rank `from` that bears `tag`. Tensors arrive without autodiff: on the CPU device
    /// [`Device::flex`](burn::tensor::Device::flex) if they travelled through host memory, on the device of this rank if
    /// NCCL carried them, on that of the sender if both are threads. [`recv_on`](Self::recv_on) says where.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`]; [`Error::UnexpectedMessage`], on every rank, if the message is not a `P`.
    pub fn recv<P: Payload>(&self, from: usize, tag: u64) -> Result<P, Error> {
        let call = Call::new(Operation::Receive { from, tag }, None, Extent::flat(0));
        let mut received = None;
        self.count(&call, || {
            let arrival = self.take(from, tag)?;
            let (dtype, dims) = arrival.outline();
            let bytes = dims.iter().product::<usize>() * dtype.size();
            received = Some((arrival, format!("{dtype:?} {dims:?}")));
            Ok(bytes as u64)
        })?;
        let (arrival, found) = received.ok_or_else(|| Error::invalid("recv", "the engine returned no message"))?;
        let made = match arrival {
            Arrival::Host(Message(data)) => P::from_host(data, &P::Home::default()),
            #[cfg(feature = "cubecl")]
            Arrival::Device(data) => P::from_message(*data),
        };
        made.map_err(|_| {
            let (group, to, expected) = (self.group().clone(), self.rank(), std::any::type_name::<P>().to_owned());
            let error = Error::UnexpectedMessage { group, from, to, tag, expected, found, log: self.log() };
            self.fail_with(error)
        })
    }

    fn take(&self, from: usize, tag: u64) -> Result<Arrival, Error> {
        #[cfg(feature = "cubecl")]
        if let Some(engine) = self.transport().on_device() {
            return engine.receive(from, tag);
        }
        self.transport().receive(from, tag).map(Arrival::from)
    }

    /// [`recv`](Self::recv) of a tensor that shall be on `device`, without autodiff, wherever it comes from. One that comes
    /// from another device goes through host memory; put NCCL on top (feature `cuda`) where that is too slow.
    ///
    /// # Errors
    /// As of [`recv`](Self::recv).
    pub fn recv_on<const D: usize, K: TensorKind>(
        &self,
        device: &Device,
        from: usize,
        tag: u64,
    ) -> Result<Tensor<D, K>, Error> {
        let device = device.clone().inner();
        let tensor: Tensor<D, K> = self.recv(from, tag)?;
        if tensor.device() == device {
            return Ok(tensor);
        }
        let data = tensor
            .try_into_data()
            .map_err(|problem| Error::invalid("recv_on", format!("the message cannot be read: {problem:?}")))?;
        Ok(on_device(data, &device))
    }

    /// [`recv`](Self::recv) as a handle: the message travels while the rank computes, and is taken by waiting. Of several that
    /// bear one tag, whoever waits first gets the oldest.
    pub fn start_recv<P: Payload>(&self, from: usize, tag: u64) -> Pending<P> {
        #[cfg(feature = "cubecl")]
        if let Some(engine) = self.transport().on_device() {
            engine.expect(from, tag);
        }
        let comm = self.clone();
        Pending::deferred(move || comm.recv(from, tag))
    }
}
