//! Dispatches a collective to the device transport or, through host memory, to the host transport.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;

use super::communicator::Communicator;
use super::host_buffer::{self, SliceOutput, TakenOutput, TensorOutput};
#[cfg(feature = "cubecl")]
use super::payload::OnDevice;
use super::transport::{BufferMut, BufferRef, Transfer};
use super::{Call, CallShape, Element, Operation, Payload};
use crate::Error;
use crate::tensor::Pool;

impl Communicator {
    /// [`dispatch_agreed`](Self::dispatch_agreed) where the shapes are all that the ranks must agree on.
    pub(super) fn dispatch<P: Payload>(
        &self,
        operation: Operation,
        payload: P,
        on_host: impl FnOnce(FlexTensor) -> Result<FlexTensor, Error>,
    ) -> Result<P, Error> {
        self.dispatch_agreed(operation, payload, 0, on_host)
    }

    /// Runs a collective on the payload's device if the transport supports it, else in host memory. `agreed` must be
    /// the same on all ranks.
    pub(super) fn dispatch_agreed<P: Payload>(
        &self,
        operation: Operation,
        payload: P,
        agreed: u64,
        on_host: impl FnOnce(FlexTensor) -> Result<FlexTensor, Error>,
    ) -> Result<P, Error> {
        #[cfg(feature = "cubecl")]
        let payload = match self.dispatch_on_device(operation, payload, agreed)? {
            Ok(output) => return Ok(output),
            Err(payload) => payload,
        };
        #[cfg(not(feature = "cubecl"))]
        let _ = (operation, agreed);
        let (data, origin) = payload.into_host()?;
        P::from_host(on_host(data)?, &origin)
    }

    /// Runs a collective on the device, or returns the payload if the transport does not support its device.
    #[cfg(feature = "cubecl")]
    fn dispatch_on_device<P: Payload>(
        &self,
        operation: Operation,
        payload: P,
        agreed: u64,
    ) -> Result<Result<P, P>, Error> {
        let Some(device_transport) = self.transport().on_device() else { return Ok(Err(payload)) };
        let (data, origin) = match payload.into_device(device_transport)? {
            OnDevice::Here(data, origin) => (data, origin),
            OnDevice::Elsewhere(payload) => return Ok(Err(payload)),
        };
        let shape = CallShape::new(&data.meta.shape().to_vec());
        let folded_hash = CallShape::folded_hash(&data.meta.shape().to_vec());
        let call = Call::on_device(operation, data.dtype, shape).agreeing(agreed ^ folded_hash);
        let mut result = None;
        self.run(&call, |_| {
            let (output, bytes) = device_transport.run(&call, data)?;
            result = Some(output);
            Ok(bytes)
        })?;
        let output = result.ok_or_else(|| Error::invalid("a collective", "the transport returned no tensor"))?;
        P::from_device(output, &origin).map(Ok)
    }

    pub(super) fn host_in_place(
        &self,
        operation: Operation,
        data: FlexTensor,
        agreed: u64,
    ) -> Result<FlexTensor, Error> {
        host_buffer::check_dtype(operation.name(), data.dtype())?;
        let mut data = host_buffer::exclusive(data);
        let folded_hash = CallShape::folded_hash(data.shape().as_slice());
        let shape = host_buffer::shape(&data);
        let call = Call::new(operation, Some(data.dtype()), shape).agreeing(agreed ^ folded_hash);
        self.in_place(&call, &mut [host_buffer::buffer_mut(&mut data)])?;
        Ok(data)
    }

    /// Runs a collective from an input into a new tensor.
    pub(super) fn out_of_place(
        &self,
        operation: Operation,
        data: Option<FlexTensor>,
        expected: Option<DType>,
    ) -> Result<FlexTensor, Error> {
        self.out_of_place_agreed(operation, data, expected, 0)
    }

    /// [`out_of_place`](Self::out_of_place) with a number that all ranks must agree on.
    pub(super) fn out_of_place_agreed(
        &self,
        operation: Operation,
        data: Option<FlexTensor>,
        expected: Option<DType>,
        agreed: u64,
    ) -> Result<FlexTensor, Error> {
        self.out_of_place_in(None, operation, data, expected, agreed)
    }

    /// [`out_of_place_agreed`](Self::out_of_place_agreed) into memory of a pool, if there is one.
    pub(super) fn out_of_place_in(
        &self,
        pool: Option<&Arc<Pool>>,
        operation: Operation,
        data: Option<FlexTensor>,
        expected: Option<DType>,
        agreed: u64,
    ) -> Result<FlexTensor, Error> {
        let data = data.map(host_buffer::contiguous);
        let dtype = data.as_ref().map(FlexTensor::dtype).or(expected);
        if let Some(dtype) = dtype {
            host_buffer::check_dtype(operation.name(), dtype)?;
        }
        let shape = data.as_ref().map_or(CallShape::flat(0), host_buffer::shape);
        let own_dims = data.as_ref().map(|data| data.shape().to_vec()).unwrap_or_default();
        let folded_hash = CallShape::folded_hash(&own_dims);
        if folded_hash != 0 && matches!(operation, Operation::Scatter { .. }) {
            let (rank, most) = (own_dims.len(), CallShape::MAX);
            let problem =
                format!("a tensor of rank {rank} was passed, {most} dims are the most; reshape it before and after");
            return Err(self.fail_with(Error::invalid("scatter", problem)));
        }
        let call = Call::new(operation, dtype, shape).agreeing(agreed ^ folded_hash);
        // SAFETY: nothing is read through a null place of length 0.
        let nothing = unsafe { BufferRef::from_raw(std::ptr::null(), 0, dtype.unwrap_or(DType::F32)) };
        let input = data.as_ref().map_or(nothing, host_buffer::buffer_ref);
        let mut output = TensorOutput::new(self, call, dtype, pool);
        self.run(&call, |transport| transport.collective(&call, Transfer::OutOfPlace { input, output: &mut output }))?;
        let unfold = |output: FlexTensor| match folded_hash {
            0 => output,
            _ => {
                let dims = [&output.shape().as_slice()[..1], &own_dims[1..]].concat();
                output.reshape(dims.into())
            }
        };
        // A rank that receives nothing gets its own input back, or an empty tensor.
        Ok(output
            .into_tensor()
            .map(unfold)
            .or(data)
            .unwrap_or_else(|| FlexTensor::zeros([0].into(), dtype.unwrap_or(DType::F32))))
    }

    /// Runs a collective from some elements of a tensor into that tensor, where the result has them as well. `agreed`
    /// must be the same on all ranks.
    pub(super) fn out_of_own_place(
        &self,
        operation: Operation,
        data: FlexTensor,
        own: Range<usize>,
        agreed: u64,
    ) -> Result<FlexTensor, Error> {
        host_buffer::check_dtype(operation.name(), data.dtype())?;
        let mut data = host_buffer::exclusive(data);
        self.out_of_own_part(operation, host_buffer::buffer_mut(&mut data), own, agreed)?;
        Ok(data)
    }

    /// The same with a buffer.
    pub(super) fn out_of_own_part(
        &self,
        operation: Operation,
        whole: BufferMut<'_>,
        own: Range<usize>,
        agreed: u64,
    ) -> Result<(), Error> {
        let call = Call::new(operation, Some(whole.dtype()), CallShape::flat(own.len())).agreeing(agreed);
        let mut output = TakenOutput::new(whole);
        let input = output.part(own);
        self.run(&call, |transport| {
            let apart = (!transport.gathers_in_place()).then(|| host_buffer::copied(input));
            let input = apart.as_ref().map_or(input, host_buffer::buffer_ref);
            transport.collective(&call, Transfer::OutOfPlace { input, output: &mut output })
        })
    }

    pub(super) fn in_place(&self, call: &Call, buffers: &mut [BufferMut<'_>]) -> Result<(), Error> {
        self.run(call, |transport| transport.collective(call, Transfer::InPlace(buffers)))
    }

    pub(super) fn out_of_place_slices<E: Element>(
        &self,
        call: &Call,
        input: &[E],
        output: &mut [E],
    ) -> Result<(), Error> {
        let (input, output) = (BufferRef::new(input), &mut SliceOutput(output));
        self.run(call, |transport| transport.collective(call, Transfer::OutOfPlace { input, output }))
    }
}
