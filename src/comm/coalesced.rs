//! Several payloads that are reduced as one collective.

use burn::backend::flex::FlexTensor;
use burn::tensor::DType;

use super::communicator::Communicator;
#[cfg(feature = "cubecl")]
use super::payload::OnDevice;
use super::transport::BufferMut;
use super::{Call, Extent, Operation, Payload, ReduceOp, host, reduce};
use crate::Error;

impl Communicator {
    /// Reduces several payloads as one collective, without copying them together: one call, one wait.
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
        let (tensors, homes): (Vec<_>, Vec<_>) = hosts.into_iter().unzip();
        let reduced = self.all_reduce_many(tensors, op)?;
        reduced.into_iter().zip(&homes).map(|(data, home)| P::from_host(data, home)).collect()
    }

    /// Reduces payloads together on the device, or returns them if one is not on the engine's.
    #[cfg(feature = "cubecl")]
    fn all_reduce_many_on_device<P: Payload>(
        &self,
        payloads: Vec<P>,
        op: ReduceOp,
    ) -> Result<Result<Vec<P>, Vec<P>>, Error> {
        let Some(engine) = self.transport().on_device() else { return Ok(Err(payloads)) };
        if payloads.is_empty() || !payloads.iter().all(|payload| payload.is_carried(engine)) {
            return Ok(Err(payloads));
        }
        let (mut tensors, mut homes) = (Vec::with_capacity(payloads.len()), Vec::with_capacity(payloads.len()));
        for payload in payloads {
            match payload.into_device(engine)? {
                OnDevice::Here(data, home) => {
                    tensors.push(data);
                    homes.push(home);
                }
                OnDevice::Elsewhere(_) => {
                    return Err(Error::invalid("all_reduce_coalesced", "a payload left its device on the way"));
                }
            }
        }
        let call = pieces_on_device(op, &tensors)?;
        let mut reduced = Vec::new();
        self.run(&call, |_| {
            let (tensors, bytes) = engine.all_reduce_many(op, tensors)?;
            reduced = tensors;
            Ok(bytes)
        })?;
        reduced.into_iter().zip(&homes).map(|(data, home)| P::from_device(data, home)).collect::<Result<_, _>>().map(Ok)
    }

    fn all_reduce_many(&self, data: Vec<FlexTensor>, op: ReduceOp) -> Result<Vec<FlexTensor>, Error> {
        // A rank that brings nothing meets the others all the same: they may have brought something.
        let dtype = one_dtype(data.iter().map(FlexTensor::dtype), op)?;
        let mut data: Vec<FlexTensor> = data.into_iter().map(host::exclusive).collect();
        let lens = data.iter().map(|tensor| tensor.layout().num_elements());
        let mut call = Call::new(Operation::AllReduce(op), dtype, Extent::flat(lens.clone().sum()));
        call.pieces = data.len();
        call.cut = fingerprint(lens);
        let mut buffers: Vec<BufferMut<'_>> = data.iter_mut().map(host::lend_mut).collect();
        self.in_place(&call, &mut buffers)?;
        drop(buffers);
        Ok(data)
    }
}

/// The dtype of what is reduced together, if it is anything.
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
pub(super) fn pieces_on_device(op: ReduceOp, tensors: &[super::DeviceTensor]) -> Result<Call, Error> {
    let nothing = || Error::invalid("all_reduce_coalesced", "there is nothing to reduce");
    let dtype = one_dtype(tensors.iter().map(|tensor| tensor.dtype), op)?.ok_or_else(nothing)?;
    let lens = tensors.iter().map(|tensor| tensor.meta.shape().iter().product());
    Ok(Call::pieces_on_device(op, dtype, lens.clone().sum(), tensors.len(), fingerprint(lens)))
}

/// FNV-1a over the lengths of coalesced buffers. The highest bit is left to say where they are.
fn fingerprint(lens: impl Iterator<Item = usize>) -> u64 {
    lens.fold(0xcbf2_9ce4_8422_2325_u64, |hash, len| (hash ^ len as u64).wrapping_mul(0x100_0000_01b3)) >> 1
}
