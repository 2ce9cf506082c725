//! Reduces several payloads as one collective.

use burn::backend::flex::FlexTensor;
use burn::tensor::DType;

use super::communicator::Communicator;
#[cfg(feature = "cubecl")]
use super::payload::OnDevice;
use super::transport::BufferMut;
use super::{Call, CallShape, Operation, Payload, ReduceOp, host_buffer, reduce};
use crate::Error;

impl Communicator {
    /// Reduces several payloads as one collective, without copying them together: one call, one synchronization.
    ///
    /// # Errors
    /// [`Error::UnsupportedReduction`]; [`Error::InvalidArgument`] if their dtypes differ.
    pub fn all_reduce_coalesced<P: Payload>(&self, payloads: Vec<P>, op: ReduceOp) -> Result<Vec<P>, Error> {
        #[cfg(feature = "cubecl")]
        let payloads = match self.all_reduce_many_on_device(payloads, op)? {
            Ok(reduced) => return Ok(reduced),
            Err(payloads) => payloads,
        };
        let hosts = payloads.into_iter().map(P::into_host).collect::<Result<Vec<_>, _>>()?;
        let (tensors, origins): (Vec<_>, Vec<_>) = hosts.into_iter().unzip();
        let reduced = self.all_reduce_many(tensors, op)?;
        reduced.into_iter().zip(&origins).map(|(data, origin)| P::from_host(data, origin)).collect()
    }

    /// Reduces payloads together on the device, or returns them if the transport does not support the device of one of
    /// them.
    #[cfg(feature = "cubecl")]
    fn all_reduce_many_on_device<P: Payload>(
        &self,
        payloads: Vec<P>,
        op: ReduceOp,
    ) -> Result<Result<Vec<P>, Vec<P>>, Error> {
        let Some(device_transport) = self.transport().on_device() else { return Ok(Err(payloads)) };
        if payloads.is_empty() || !payloads.iter().all(|payload| payload.stays_on_device(device_transport)) {
            return Ok(Err(payloads));
        }
        let (mut tensors, mut origins) = (Vec::with_capacity(payloads.len()), Vec::with_capacity(payloads.len()));
        for payload in payloads {
            match payload.into_device(device_transport)? {
                OnDevice::Here(data, origin) => {
                    tensors.push(data);
                    origins.push(origin);
                }
                OnDevice::Elsewhere(_) => {
                    return Err(Error::invalid("all_reduce_coalesced", "a payload moved to another device meanwhile"));
                }
            }
        }
        let call = coalesced_on_device(op, &tensors)?;
        let mut reduced = Vec::new();
        self.run(&call, |_| {
            let (tensors, bytes) = device_transport.all_reduce_many(op, tensors)?;
            reduced = tensors;
            Ok(bytes)
        })?;
        reduced
            .into_iter()
            .zip(&origins)
            .map(|(data, origin)| P::from_device(data, origin))
            .collect::<Result<_, _>>()
            .map(Ok)
    }

    fn all_reduce_many(&self, data: Vec<FlexTensor>, op: ReduceOp) -> Result<Vec<FlexTensor>, Error> {
        // A rank without payloads takes part all the same: the others may have some.
        let dtype = one_dtype(data.iter().map(FlexTensor::dtype), op)?;
        let mut data: Vec<FlexTensor> = data.into_iter().map(host_buffer::exclusive).collect();
        let lens = data.iter().map(|tensor| tensor.layout().num_elements());
        let mut call = Call::new(Operation::AllReduce(op), dtype, CallShape::flat(lens.clone().sum()));
        call.buffers = data.len();
        call.fingerprint = fingerprint(lens);
        let mut buffers: Vec<BufferMut<'_>> = data.iter_mut().map(host_buffer::buffer_mut).collect();
        self.in_place(&call, &mut buffers)?;
        drop(buffers);
        Ok(data)
    }
}

/// The common dtype of what is reduced together; `None` if that is nothing.
fn one_dtype(mut dtypes: impl Iterator<Item = DType>, op: ReduceOp) -> Result<Option<DType>, Error> {
    let Some(first) = dtypes.next() else { return Ok(None) };
    if let Some(other) = dtypes.find(|dtype| *dtype != first) {
        let problem = format!("tensors of {first:?} and {other:?} cannot be reduced together");
        return Err(Error::invalid("all_reduce_coalesced", problem));
    }
    reduce::check(op, first)?;
    Ok(Some(first))
}

/// The call that reduces these tensors, at least one, together.
#[cfg(feature = "cubecl")]
pub(super) fn coalesced_on_device(op: ReduceOp, tensors: &[super::DeviceTensor]) -> Result<Call, Error> {
    let nothing = || Error::invalid("all_reduce_coalesced", "there is nothing to reduce");
    let dtype = one_dtype(tensors.iter().map(|tensor| tensor.dtype), op)?.ok_or_else(nothing)?;
    let lens = tensors.iter().map(|tensor| tensor.meta.shape().iter().product());
    Ok(Call::coalesced_on_device(op, dtype, lens.clone().sum(), tensors.len(), fingerprint(lens)))
}

/// FNV-1a over the lengths of coalesced buffers. The highest bit is reserved: it says where they are.
fn fingerprint(lens: impl Iterator<Item = usize>) -> u64 {
    lens.fold(0xcbf2_9ce4_8422_2325_u64, |hash, len| (hash ^ len as u64).wrapping_mul(0x100_0000_01b3)) >> 1
}
