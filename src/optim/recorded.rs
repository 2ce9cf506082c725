//! Moments on their way into a record and out of it.
//!
//! burn copies all that goes into a record, and makes what it takes out on its default device, in the default dtype of
//! that: with several GPUs, that of all ranks on the first. Fused optimizers share what is in host memory already, and
//! leave there what they take out: the next step has it on the device of the parameter, and it was on no other.

use burn::backend::flex::FlexTensor;
use burn::tensor::{Bytes, Device, Tensor, TensorData};
use burn_std::AllocationProperty;

use crate::tensor::PlainTensor;

/// What a record has of a moment: the memory of the moment itself, if it lies there from its begin to its end. Whoever
/// changes either from then on has a copy of it.
pub(super) fn to_record<const D: usize>(moment: &Tensor<D>) -> TensorData {
    let shared = PlainTensor::from(moment.clone());
    if !shared.on_flex() {
        return moment.clone().into_data();
    }
    let (shape, dtype) = (moment.shape(), moment.dtype());
    match shared.into_flex() {
        Ok(flex) if flex.is_contiguous() && flex.bytes().len() == shape.num_elements() * dtype.size() => {
            let bytes = bytes::Bytes::from_owner(MomentMemory(flex));
            TensorData::from_bytes(Bytes::from_shared(bytes, AllocationProperty::Other), shape, dtype)
        }
        _ => moment.clone().into_data(),
    }
}

/// The memory of a tensor.
struct MomentMemory(FlexTensor);

impl AsRef<[u8]> for MomentMemory {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// A moment of a record, in host memory and in the dtype that it has there.
pub(super) fn of_record<const D: usize>(data: TensorData) -> Tensor<D> {
    let (host, dtype) = (Device::flex(), data.dtype());
    if dtype.is_float() { Tensor::from_data(data, (&host, dtype)) } else { Tensor::from_data(data, &host) }
}

/// A moment on the device of its parameter, in the dtype that it has if the device knows that.
pub(super) fn on_device<const D: usize>(moment: Tensor<D>, device: &Device) -> Tensor<D> {
    match moment.device() == *device || device.supports_dtype(moment.dtype()) {
        true => moment.to_device(device),
        false => Tensor::from_data(moment.into_data(), device),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use burn::optim::{AdamConfig, AdamWConfig, Optimizer, RecordState, SgdConfig, StateSink, StateSource, momentum};
    use burn::tensor::DType;

    use super::*;
    use crate::optim::FusedOptimizer;

    /// The state of an optimizer after a step of a parameter of this dtype.
    pub(in crate::optim) fn state<O: Optimizer>(optimizer: &O, dtype: DType) -> O::State<2> {
        let value = || Tensor::<2>::ones([2, 3], (&Device::flex(), dtype));
        optimizer.step(0.1, value(), value(), None).1.unwrap()
    }

    pub(in crate::optim) fn flat<S: RecordState>(state: &S) -> StateSink {
        let mut sink = StateSink::default();
        state.state_flatten("7", &mut sink);
        sink.tensors.sort_by(|(one, _), (other, _)| one.cmp(other));
        sink
    }

    pub(in crate::optim) fn of<S: RecordState>(sink: StateSink, device: &Device) -> S {
        let mut source = StateSource::new(sink.scalars.into_iter().collect::<BTreeMap<_, _>>());
        sink.tensors.into_iter().for_each(|(name, data)| source.insert_tensor(name, data));
        S::state_unflatten("7", &mut source, device).unwrap()
    }

    fn places(sink: &StateSink) -> Vec<*const u8> {
        sink.tensors.iter().map(|(_, data)| data.as_bytes().as_ptr()).collect()
    }

    /// Into a record and out of it moments are where they are, whatever device burn says.
    fn stays<O: Optimizer>(optimizer: O, moments: usize) {
        for dtype in [DType::F32, DType::BF16] {
            let first = flat(&state(&optimizer, dtype));
            let (before, values) = (places(&first), first.tensors.clone());
            assert_eq!((before.len(), values[0].1.dtype()), (moments, dtype));
            // What is recorded there is only known as a value of a graph: it could not be read.
            let again = flat(&of::<O::State<2>>(first, &Device::capture()));
            assert_eq!(places(&again), before);
            assert_eq!(again.tensors, values);
        }
    }

    #[test]
    fn moments_stay_in_host_memory() {
        let momentum = momentum::MomentumConfig::new();
        stays(SgdConfig::new().with_momentum(Some(momentum)).build_fused(), 1);
        stays(AdamConfig::new().build_fused(), 2);
        stays(AdamWConfig::new().with_amsgrad(true).build_fused(), 3);
    }

    /// Neither what a record has nor what it was made of changes with the other.
    #[test]
    fn what_is_shared_is_copied_when_it_changes() {
        let optimizer = AdamWConfig::new().build_fused();
        let first = state(&optimizer, DType::F32);
        let (sink, copied) = (flat(&first), flat(&first).tensors);
        let copied: Vec<Vec<u8>> = copied.iter().map(|(_, data)| data.as_bytes().to_vec()).collect();
        let value = || Tensor::<2>::ones([2, 3], &Device::flex());
        let (_, next) = optimizer.step(0.1, value(), value(), Some(first));
        let same = |sink: &StateSink| sink.tensors.iter().zip(&copied).all(|((_, data), copy)| data.as_bytes() == copy);
        assert!(same(&sink) && !same(&flat(&next.unwrap())));
        // The other way round.
        let restored = of(sink, &Device::flex());
        let sink = flat(&restored);
        let (_, next) = optimizer.step(0.1, value(), value(), Some(restored));
        assert!(same(&sink) && !same(&flat(&next.unwrap())));
    }
}
