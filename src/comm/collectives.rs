//! What the ranks of a group do together.

use burn::backend::flex::FlexTensor;
use burn::tensor::DType;

use super::communicator::Communicator;
use super::host::{self, SliceOutput, TensorOutput};
#[cfg(feature = "cubecl")]
use super::payload::OnDevice;
use super::transport::{BufferMut, BufferRef, Transfer};
use super::{Call, Element, Extent, Operation, Payload, ReduceOp, reduce};
use crate::Error;

impl Communicator {
    /// Every rank gets the reduction over all ranks, bit-identical everywhere. All bring the same shape and dtype.
    ///
    /// # Errors
    /// [`Error::UnsupportedReduction`].
    pub fn all_reduce<P: Payload>(&self, payload: P, op: ReduceOp) -> Result<P, Error> {
        self.carry(Operation::AllReduce(op), payload, |data| self.all_reduce_host(data, op))
    }

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

    /// [`all_reduce`](Self::all_reduce) on a slice, in place.
    pub fn all_reduce_in_place<E: Element>(&self, slice: &mut [E], op: ReduceOp) -> Result<(), Error> {
        reduce::check(op, E::DTYPE)?;
        let call = Call::new(Operation::AllReduce(op), Some(E::DTYPE), Extent::flat(slice.len()));
        self.in_place(&call, &mut [BufferMut::new(slice)])
    }

    /// Every rank gets its [part](super::part) of the first dim of the reduction over all ranks. All bring the same shape
    /// and dtype; ranks that get no row get an empty payload.
    ///
    /// # Errors
    /// [`Error::UnsupportedReduction`].
    pub fn reduce_scatter<P: Payload>(&self, payload: P, op: ReduceOp) -> Result<P, Error> {
        self.carry(Operation::ReduceScatter(op), payload, |data| {
            reduce::check(op, data.dtype())?;
            self.through(Operation::ReduceScatter(op), Some(data), None)
        })
    }

    /// Every rank gets the payloads of all, one behind the other along the first dim in rank order. First dims may differ;
    /// the other dims and the dtype may not.
    pub fn all_gather<P: Payload>(&self, payload: P) -> Result<P, Error> {
        self.carry(Operation::AllGather, payload, |data| self.through(Operation::AllGather, Some(data), None))
    }

    /// [`all_gather`](Self::all_gather) from a slice into a slice, whose length is the sum over the ranks.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on a rank whose output has another length; the world fails with it.
    pub fn all_gather_into<E: Element>(&self, input: &[E], output: &mut [E]) -> Result<(), Error> {
        self.through_place(&Call::new(Operation::AllGather, Some(E::DTYPE), Extent::flat(input.len())), input, output)
    }

    /// [`all_reduce`](Self::all_reduce) of a matrix with [`ReduceOp::Sum`], in place.
    pub(crate) fn all_reduce_matrix<E: Element>(&self, rows: &mut [E], dims: [usize; 2]) -> Result<(), Error> {
        let call = Call::new(Operation::AllReduce(ReduceOp::Sum), Some(E::DTYPE), Extent::new(&dims));
        self.in_place(&call, &mut [BufferMut::new(rows)])
    }

    /// [`reduce_scatter`](Self::reduce_scatter) of a matrix with [`ReduceOp::Sum`] into this rank's rows.
    pub(crate) fn reduce_scatter_matrix<E: Element>(
        &self,
        rows: &[E],
        dims: [usize; 2],
        own: &mut [E],
    ) -> Result<(), Error> {
        let call = Call::new(Operation::ReduceScatter(ReduceOp::Sum), Some(E::DTYPE), Extent::new(&dims));
        self.through_place(&call, rows, own)
    }

    /// [`all_gather`](Self::all_gather) of the rows of matrices, `dims` being those of this rank's.
    pub(crate) fn all_gather_matrix<E: Element>(
        &self,
        own: &[E],
        dims: [usize; 2],
        rows: &mut [E],
    ) -> Result<(), Error> {
        self.through_place(&Call::new(Operation::AllGather, Some(E::DTYPE), Extent::new(&dims)), own, rows)
    }

    /// Every rank gets the payload of `root`. All bring the same shape and dtype; what the others bring is overwritten.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`].
    pub fn broadcast<P: Payload>(&self, payload: P, root: usize) -> Result<P, Error> {
        self.check_root(root, "broadcast")?;
        let operation = Operation::Broadcast { root };
        self.carry(operation, payload, |data| self.host_in_place(operation, data))
    }

    /// [`broadcast`](Self::broadcast) on a slice, in place.
    pub fn broadcast_in_place<E: Element>(&self, slice: &mut [E], root: usize) -> Result<(), Error> {
        self.check_root(root, "broadcast")?;
        let call = Call::new(Operation::Broadcast { root }, Some(E::DTYPE), Extent::flat(slice.len()));
        self.in_place(&call, &mut [BufferMut::new(slice)])
    }

    /// `root` gets the reduction over all ranks, the others `None`. All bring the same shape and dtype.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`], [`Error::UnsupportedReduction`].
    pub fn reduce<P: Payload>(&self, payload: P, op: ReduceOp, root: usize) -> Result<Option<P>, Error> {
        self.check_root(root, "reduce")?;
        let reduced = self.carry(Operation::Reduce { op, root }, payload, |data| {
            reduce::check(op, data.dtype())?;
            self.host_in_place(Operation::Reduce { op, root }, data)
        })?;
        Ok((root == self.rank()).then_some(reduced))
    }

    /// `root` gets the payloads of all as in [`all_gather`](Self::all_gather), the others `None`.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`].
    pub fn gather<P: Payload>(&self, payload: P, root: usize) -> Result<Option<P>, Error> {
        self.check_root(root, "gather")?;
        let operation = Operation::Gather { root };
        let gathered = self.carry(operation, payload, |data| self.through(operation, Some(data), None))?;
        Ok((root == self.rank()).then_some(gathered))
    }

    /// Every rank gets its [part](super::part) of the first dim of what `root` brings; the others bring `None`. Tensors
    /// arrive on the CPU device [`Device::flex`](burn::tensor::Device::flex) of ranks that bring none.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`]; [`Error::InvalidArgument`] if the root brings nothing, or what a receiver does not take; the
    /// world fails with it.
    pub fn scatter<P: Payload>(&self, payload: Option<P>, root: usize) -> Result<P, Error> {
        self.check_root(root, "scatter")?;
        if root == self.rank() && payload.is_none() {
            let problem = format!("rank {root} is the root and brings nothing to scatter");
            return Err(self.fail_with(Error::invalid("scatter", problem)));
        }
        let (data, home) = match payload.filter(|_| root == self.rank()).map(P::into_host).transpose()? {
            Some((data, home)) => (Some(data), home),
            None => (None, P::Home::default()),
        };
        let data = self.through(Operation::Scatter { root }, data, P::fixed_dtype())?;
        // Only here can a receiver be surprised: it brought nothing for the others to compare with.
        P::from_host(data, &home).map_err(|error| self.fail_with(error))
    }

    /// [`scatter`](Self::scatter) where every rank brings a payload. Of those of the others only kind, dtype and device count,
    /// which must be the root's: on a device that the engine carries, the parts stay there.
    pub(crate) fn scatter_alike<P: Payload>(&self, payload: P, root: usize) -> Result<P, Error> {
        self.check_root(root, "scatter")?;
        let operation = Operation::Scatter { root };
        self.carry(operation, payload, |data| {
            let dtype = data.dtype();
            self.through(operation, (root == self.rank()).then_some(data), Some(dtype))
        })
    }

    /// Part `j` of this rank's first dim goes to rank `j`; the rank gets its part of every rank, in rank order.
    pub fn all_to_all<P: Payload>(&self, payload: P) -> Result<P, Error> {
        self.all_to_all_agreed(payload, 0)
    }

    /// [`all_to_all`](Self::all_to_all) with a number that must be the same on all ranks, where the shapes do not tell.
    pub(crate) fn all_to_all_agreed<P: Payload>(&self, payload: P, agreed: u64) -> Result<P, Error> {
        let operation = Operation::AllToAll;
        self.carry_agreed(operation, payload, agreed, |data| self.through_agreed(operation, Some(data), None, agreed))
    }

    /// [`carry_agreed`](Self::carry_agreed) where the shapes tell all that must agree.
    fn carry<P: Payload>(
        &self,
        operation: Operation,
        payload: P,
        on_host: impl FnOnce(FlexTensor) -> Result<FlexTensor, Error>,
    ) -> Result<P, Error> {
        self.carry_agreed(operation, payload, 0, on_host)
    }

    /// Runs a collective where the payload is: on its device if the engine can, else in host memory.
    /// `agreed` must be the same on all ranks.
    fn carry_agreed<P: Payload>(
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
        let call = Call::on_device(operation, data.dtype, extent).agreeing(agreed);
        let mut result = None;
        self.run(&call, |_| {
            let (carried, bytes) = engine.run(&call, data)?;
            result = Some(carried);
            Ok(bytes)
        })?;
        let carried = result.ok_or_else(|| Error::invalid("a collective", "the engine gave no tensor"))?;
        P::from_device(carried, &home).map(Ok)
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

    fn all_reduce_host(&self, data: FlexTensor, op: ReduceOp) -> Result<FlexTensor, Error> {
        reduce::check(op, data.dtype())?;
        self.host_in_place(Operation::AllReduce(op), data)
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

    fn host_in_place(&self, operation: Operation, data: FlexTensor) -> Result<FlexTensor, Error> {
        host::check_dtype(operation.name(), data.dtype())?;
        let mut data = host::exclusive(data);
        let call = Call::new(operation, Some(data.dtype()), host::extent(&data));
        self.in_place(&call, &mut [host::lend_mut(&mut data)])?;
        Ok(data)
    }

    /// A collective from an input into a new tensor.
    fn through(
        &self,
        operation: Operation,
        data: Option<FlexTensor>,
        expected: Option<DType>,
    ) -> Result<FlexTensor, Error> {
        self.through_agreed(operation, data, expected, 0)
    }

    /// [`through`](Self::through) with a number that must be the same on all ranks, where the shapes do not tell.
    fn through_agreed(
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
        let call = Call::new(operation, dtype, extent).agreeing(agreed);
        // SAFETY: nothing is read through a null place of length 0.
        let nothing = unsafe { BufferRef::from_raw(std::ptr::null(), 0, dtype.unwrap_or(DType::F32)) };
        let input = data.as_ref().map_or(nothing, host::lend);
        let mut output = TensorOutput::new(dtype);
        self.run(&call, |transport| transport.collective(&call, Transfer::Through { input, output: &mut output }))?;
        // A rank that receives nothing gets back a tensor of no use to anybody: its own input, or an empty one.
        Ok(output.into_tensor().or(data).unwrap_or_else(|| FlexTensor::zeros([0].into(), dtype.unwrap_or(DType::F32))))
    }

    fn in_place(&self, call: &Call, buffers: &mut [BufferMut<'_>]) -> Result<(), Error> {
        self.run(call, |transport| transport.collective(call, Transfer::InPlace(buffers)))
    }

    fn through_place<E: Element>(&self, call: &Call, input: &[E], output: &mut [E]) -> Result<(), Error> {
        let (input, output) = (BufferRef::new(input), &mut SliceOutput(output));
        self.run(call, |transport| transport.collective(call, Transfer::Through { input, output }))
    }

    fn check_root(&self, root: usize, operation: &'static str) -> Result<(), Error> {
        match root < self.size() {
            true => Ok(()),
            false => Err(Error::NoSuchRank { group: self.group().clone(), rank: root, size: self.size(), operation }),
        }
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
