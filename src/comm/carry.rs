//! The way of a collective's data to the engine and back: on the engine's device, or through host memory.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;

use super::communicator::Communicator;
use super::host::{self, SliceOutput, TensorOutput};
#[cfg(feature = "cubecl")]
use super::payload::OnDevice;
use super::transport::{BufferMut, BufferRef, Transfer};
use super::{Call, Element, Extent, Operation, Payload};
use crate::Error;

impl Communicator {
    /// [`carry_agreed`](Self::carry_agreed) where the shapes tell all that must agree.
    pub(super) fn carry<P: Payload>(
        &self,
        operation: Operation,
        payload: P,
        on_host: impl FnOnce(FlexTensor) -> Result<FlexTensor, Error>,
    ) -> Result<P, Error> {
        self.carry_agreed(operation, payload, 0, on_host)
    }

    /// Runs a collective where the payload is: on its device if the engine can, else in host memory.
    /// `agreed` must be the same on all ranks.
    pub(super) fn carry_agreed<P: Payload>(
        &self,
        operation: Operation,
        payload: P,
        agreed: u64,
        on_host: impl FnOnce(FlexTensor) -> Result<FlexTensor, Error>,
    ) -> Result<P, Error> {
        #[cfg(feature = "cubecl")]
        let payload = match self.carry_on_device(operation, payload, agreed)? {
            Ok(carried) => return Ok(carried),
            Err(payload) => payload,
        };
        #[cfg(not(feature = "cubecl"))]
        let _ = (operation, agreed);
        let (data, home) = payload.into_host()?;
        P::from_host(on_host(data)?, &home)
    }

    /// Runs a collective on the device, or returns the payload if it is not on the engine's.
    #[cfg(feature = "cubecl")]
    fn carry_on_device<P: Payload>(
        &self,
        operation: Operation,
        payload: P,
        agreed: u64,
    ) -> Result<Result<P, P>, Error> {
        let Some(engine) = self.transport().on_device() else { return Ok(Err(payload)) };
        let (data, home) = match payload.into_device(engine)? {
            OnDevice::Here(data, home) => (data, home),
            OnDevice::Elsewhere(payload) => return Ok(Err(payload)),
        };
        let extent = Extent::new(&data.meta.shape().to_vec());
        let beyond = Extent::beyond(&data.meta.shape().to_vec());
        let call = Call::on_device(operation, data.dtype, extent).agreeing(agreed ^ beyond);
        let mut result = None;
        self.run(&call, |_| {
            let (carried, bytes) = engine.run(&call, data)?;
            result = Some(carried);
            Ok(bytes)
        })?;
        let carried = result.ok_or_else(|| Error::invalid("a collective", "the engine gave no tensor"))?;
        P::from_device(carried, &home).map(Ok)
    }

    pub(super) fn host_in_place(&self, operation: Operation, data: FlexTensor) -> Result<FlexTensor, Error> {
        host::check_dtype(operation.name(), data.dtype())?;
        let mut data = host::exclusive(data);
        let beyond = Extent::beyond(data.shape().as_slice());
        let call = Call::new(operation, Some(data.dtype()), host::extent(&data)).agreeing(beyond);
        self.in_place(&call, &mut [host::lend_mut(&mut data)])?;
        Ok(data)
    }

    /// A collective from an input into a new tensor.
    pub(super) fn through(
        &self,
        operation: Operation,
        data: Option<FlexTensor>,
        expected: Option<DType>,
    ) -> Result<FlexTensor, Error> {
        self.through_agreed(operation, data, expected, 0)
    }

    /// [`through`](Self::through) with a number that must be the same on all ranks, where the shapes do not tell.
    pub(super) fn through_agreed(
        &self,
        operation: Operation,
        data: Option<FlexTensor>,
        expected: Option<DType>,
        agreed: u64,
    ) -> Result<FlexTensor, Error> {
        let data = data.map(host::packed);
        let dtype = data.as_ref().map(FlexTensor::dtype).or(expected);
        if let Some(dtype) = dtype {
            host::check_dtype(operation.name(), dtype)?;
        }
        let extent = data.as_ref().map_or(Extent::flat(0), host::extent);
        let shape = data.as_ref().map(|data| data.shape().to_vec()).unwrap_or_default();
        let beyond = Extent::beyond(&shape);
        if beyond != 0 && matches!(operation, Operation::Scatter { .. }) {
            let (rank, most) = (shape.len(), Extent::MAX);
            let problem =
                format!("a tensor of rank {rank} was brought, {most} dims are the most; reshape it before and after");
            return Err(self.fail_with(Error::invalid("scatter", problem)));
        }
        let call = Call::new(operation, dtype, extent).agreeing(agreed ^ beyond);
        // SAFETY: nothing is read through a null place of length 0.
        let nothing = unsafe { BufferRef::from_raw(std::ptr::null(), 0, dtype.unwrap_or(DType::F32)) };
        let input = data.as_ref().map_or(nothing, host::lend);
        let mut output = TensorOutput::new(self, call, dtype);
        self.run(&call, |transport| transport.collective(&call, Transfer::Through { input, output: &mut output }))?;
        let unfold = |output: FlexTensor| match beyond {
            0 => output,
            _ => {
                let dims = [&output.shape().as_slice()[..1], &shape[1..]].concat();
                output.reshape(dims.into())
            }
        };
        // A rank that receives nothing gets back a tensor of no use to anybody: its own input, or an empty one.
        Ok(output
            .into_tensor()
            .map(unfold)
            .or(data)
            .unwrap_or_else(|| FlexTensor::zeros([0].into(), dtype.unwrap_or(DType::F32))))
    }

    pub(super) fn in_place(&self, call: &Call, buffers: &mut [BufferMut<'_>]) -> Result<(), Error> {
        self.run(call, |transport| transport.collective(call, Transfer::InPlace(buffers)))
    }

    pub(super) fn through_place<E: Element>(&self, call: &Call, input: &[E], output: &mut [E]) -> Result<(), Error> {
        let (input, output) = (BufferRef::new(input), &mut SliceOutput(output));
        self.run(call, |transport| transport.collective(call, Transfer::Through { input, output }))
    }
}
