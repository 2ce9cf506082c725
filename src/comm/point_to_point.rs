//! Point-to-point messages of a communicator.

use burn::tensor::{Device, Tensor};

use super::communicator::Communicator;
#[cfg(feature = "cubecl")]
use super::payload::OnDevice;
use super::payload::on_device;
use super::{Arrival, Call, CallShape, Message, Operation, Payload, Pending, TensorKind, host_buffer};
use crate::Error;

impl Communicator {
    /// Sends a payload to rank `to`. Does not wait for it to be received; between threads of a process the tensor
    /// itself is handed over, without a copy.
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
        host_buffer::check_dtype("send", data.dtype())?;
        let bytes = data.layout().num_elements() * data.dtype().size();
        let call = Call::new(Operation::Send { to, tag }, Some(data.dtype()), host_buffer::shape(&data));
        self.count(&call, || self.transport().send(to, tag, Message(data)).map(|()| bytes as u64))
    }

    /// Sends a payload from its device, or returns it if the transport does not support that.
    #[cfg(feature = "cubecl")]
    fn send_on_device<P: Payload>(&self, payload: P, to: usize, tag: u64) -> Result<Option<P>, Error> {
        let Some(device_transport) = self.transport().on_device() else { return Ok(Some(payload)) };
        let data = match payload.into_device(device_transport)? {
            OnDevice::Here(data, _) => data,
            OnDevice::Elsewhere(payload) => return Ok(Some(payload)),
        };
        let shape = CallShape::new(&data.meta.shape().to_vec());
        let bytes = shape.elements() * data.dtype.size();
        let call = Call::on_device(Operation::Send { to, tag }, data.dtype, shape);
        self.count(&call, || device_transport.send(to, tag, data).map(|()| bytes as u64)).map(|()| None)
    }

    /// Receives the oldest message of rank `from` with this `tag`. Tensors arrive without autodiff: on the CPU device
    /// [`Device::flex`](burn::tensor::Device::flex) if they went through host memory, on the device of this rank if
    /// NCCL moved them, on that of the sender if both are threads. [`recv_on`](Self::recv_on) chooses the device.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`]; [`Error::UnexpectedMessage`], on every rank, if the message is not a `P`.
    pub fn recv<P: Payload>(&self, from: usize, tag: u64) -> Result<P, Error> {
        let call = Call::new(Operation::Receive { from, tag }, None, CallShape::flat(0));
        let mut received = None;
        self.count(&call, || {
            let arrival = self.take(from, tag)?;
            let (dtype, dims) = arrival.dtype_and_dims();
            let bytes = dims.iter().product::<usize>() * dtype.size();
            received = Some((arrival, format!("{dtype:?} {dims:?}")));
            Ok(bytes as u64)
        })?;
        let (arrival, found) = received.ok_or_else(|| Error::invalid("recv", "the transport returned no message"))?;
        let made = match arrival {
            Arrival::Host(Message(data)) => P::from_host(data, &P::Origin::default()),
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
        if let Some(device_transport) = self.transport().on_device() {
            return device_transport.receive(from, tag);
        }
        self.transport().receive(from, tag).map(Arrival::from)
    }

    /// [`recv`](Self::recv) of a tensor onto `device`, without autodiff. One that arrives on another device goes
    /// through host memory; use NCCL (feature `cuda`) where that is too slow.
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

    /// [`recv`](Self::recv) as a handle: the message is transferred while the rank computes, and is received by
    /// waiting. Of several with one tag, whoever waits first gets the oldest.
    pub fn start_recv<P: Payload>(&self, from: usize, tag: u64) -> Pending<P> {
        #[cfg(feature = "cubecl")]
        if let Some(device_transport) = self.transport().on_device() {
            device_transport.post_receive(from, tag);
        }
        let comm = self.clone();
        Pending::deferred(move || comm.recv(from, tag))
    }
}
