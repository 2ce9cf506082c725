//! The collectives of a communicator.

use std::ops::Range;
use std::sync::Arc;

use super::communicator::Communicator;
use super::transport::BufferMut;
use super::{Call, CallShape, Element, Operation, Payload, ReduceOp, reduce};
use crate::Error;
use crate::tensor::{PlainTensor, Pool};

impl Communicator {
    /// Every rank gets the reduction over all ranks, bit-identical everywhere. All pass the same shape and dtype.
    ///
    /// # Errors
    /// [`Error::UnsupportedReduction`].
    pub fn all_reduce<P: Payload>(&self, payload: P, op: ReduceOp) -> Result<P, Error> {
        self.all_reduce_agreed(payload, op, 0)
    }

    /// [`all_reduce`](Self::all_reduce) with a number that must be the same on all ranks, where the shapes do not tell.
    pub(crate) fn all_reduce_agreed<P: Payload>(&self, payload: P, op: ReduceOp, agreed: u64) -> Result<P, Error> {
        self.dispatch_agreed(Operation::AllReduce(op), payload, agreed, |data| {
            reduce::check(op, data.dtype())?;
            self.host_in_place(Operation::AllReduce(op), data, agreed)
        })
    }

    /// [`all_reduce`](Self::all_reduce) on a slice, in place.
    pub fn all_reduce_in_place<E: Element>(&self, slice: &mut [E], op: ReduceOp) -> Result<(), Error> {
        reduce::check(op, E::DTYPE)?;
        let call = Call::new(Operation::AllReduce(op), Some(E::DTYPE), CallShape::flat(slice.len()));
        self.in_place(&call, &mut [BufferMut::new(slice)])
    }

    /// Every rank gets its [part](super::part) of the first dim of the reduction over all ranks. All pass the same
    /// shape and dtype; ranks whose part has no rows get an empty payload.
    ///
    /// # Errors
    /// [`Error::UnsupportedReduction`].
    pub fn reduce_scatter<P: Payload>(&self, payload: P, op: ReduceOp) -> Result<P, Error> {
        self.reduce_scatter_in(None, payload, op, 0)
    }

    /// [`reduce_scatter`](Self::reduce_scatter) with a number that must be the same on all ranks, where the shapes do
    /// not tell. With a pool the result is made in memory that is used again, where it is large and in host memory.
    pub(crate) fn reduce_scatter_in<P: Payload>(
        &self,
        pool: Option<&Arc<Pool>>,
        payload: P,
        op: ReduceOp,
        agreed: u64,
    ) -> Result<P, Error> {
        let operation = Operation::ReduceScatter(op);
        self.dispatch_agreed(operation, payload, agreed, |data| {
            reduce::check(op, data.dtype())?;
            self.out_of_place_in(pool, operation, Some(data), None, agreed)
        })
    }

    /// Every rank gets the payloads of all, one behind the other along the first dim in rank order. First dims may
    /// differ; the other dims and the dtype may not.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] on every rank, if one has no memory for the result.
    pub fn all_gather<P: Payload>(&self, payload: P) -> Result<P, Error> {
        self.dispatch(Operation::AllGather, payload, |data| self.out_of_place(Operation::AllGather, Some(data), None))
    }

    /// [`all_gather`](Self::all_gather) with a number that must be the same on all ranks, where the shapes do not tell.
    pub(crate) fn all_gather_agreed<P: Payload>(&self, payload: P, agreed: u64) -> Result<P, Error> {
        let operation = Operation::AllGather;
        self.dispatch_agreed(operation, payload, agreed, |data| {
            self.out_of_place_agreed(operation, Some(data), None, agreed)
        })
    }

    /// [`all_gather_agreed`](Self::all_gather_agreed) into memory that is used again, where the result is large and in
    /// host memory.
    pub(crate) fn all_gather_in<P: Payload>(&self, pool: &Arc<Pool>, payload: P, agreed: u64) -> Result<P, Error> {
        let operation = Operation::AllGather;
        self.dispatch_agreed(operation, payload, agreed, |data| {
            self.out_of_place_in(Some(pool), operation, Some(data), None, agreed)
        })
    }

    /// [`all_gather_agreed`](Self::all_gather_agreed) of `own` elements of a tensor in host memory, from which they go
    /// to the other ranks, into that tensor: they lie in it where the result has them. In place, if nobody else holds
    /// it. The call is that of a rank that brings them flat, as a tensor of their own.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on a rank whose tensor has another length than the result; the world fails with it.
    pub(crate) fn all_gather_around(
        &self,
        whole: PlainTensor,
        own: Range<usize>,
        agreed: u64,
    ) -> Result<PlainTensor, Error> {
        self.out_of_own_place(Operation::AllGather, whole.into_flex()?, own, agreed).map(PlainTensor::from_flex)
    }

    /// [`all_gather`](Self::all_gather) of equal shares in place: each rank has its own in a slice for all of them,
    /// where the result has it, and those of the others come to lie around it. It is copied once for a transport that
    /// does not [gather in place](super::Transport::gathers_in_place).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the number of ranks does not divide the length; the world fails with it.
    pub fn all_gather_in_place<E: Element>(&self, slice: &mut [E]) -> Result<(), Error> {
        let (len, ranks) = (slice.len(), self.size());
        if !len.is_multiple_of(ranks) {
            let problem = format!("{len} elements are no equal shares of {ranks} ranks");
            return Err(self.fail_with(Error::invalid("all_gather_in_place", problem)));
        }
        let (share, agreed) = (len / ranks, len as u64);
        // With the same length everywhere each share lies where the result has it.
        let own = self.rank() * share..(self.rank() + 1) * share;
        self.out_of_own_part(Operation::AllGather, BufferMut::new(slice), own, agreed)
    }

    /// [`all_gather`](Self::all_gather) from a slice into a slice, whose length is the sum over the ranks.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on a rank whose output has another length; the world fails with it.
    /// [`Error::OutOfMemory`].
    pub fn all_gather_into<E: Element>(&self, input: &[E], output: &mut [E]) -> Result<(), Error> {
        self.out_of_place_slices(
            &Call::new(Operation::AllGather, Some(E::DTYPE), CallShape::flat(input.len())),
            input,
            output,
        )
    }

    /// [`all_reduce`](Self::all_reduce) of a matrix with [`ReduceOp::Sum`], in place.
    pub(crate) fn all_reduce_matrix<E: Element>(&self, rows: &mut [E], dims: [usize; 2]) -> Result<(), Error> {
        let call = Call::new(Operation::AllReduce(ReduceOp::Sum), Some(E::DTYPE), CallShape::new(&dims));
        self.in_place(&call, &mut [BufferMut::new(rows)])
    }

    /// [`reduce_scatter`](Self::reduce_scatter) of a matrix with [`ReduceOp::Sum`] into this rank's rows.
    pub(crate) fn reduce_scatter_matrix<E: Element>(
        &self,
        rows: &[E],
        dims: [usize; 2],
        own: &mut [E],
    ) -> Result<(), Error> {
        let call = Call::new(Operation::ReduceScatter(ReduceOp::Sum), Some(E::DTYPE), CallShape::new(&dims));
        self.out_of_place_slices(&call, rows, own)
    }

    /// [`all_gather`](Self::all_gather) of the rows of matrices, `dims` being those of this rank's.
    pub(crate) fn all_gather_matrix<E: Element>(
        &self,
        own: &[E],
        dims: [usize; 2],
        rows: &mut [E],
    ) -> Result<(), Error> {
        self.out_of_place_slices(&Call::new(Operation::AllGather, Some(E::DTYPE), CallShape::new(&dims)), own, rows)
    }

    /// Every rank gets the payload of `root`. All pass the same shape and dtype; what the others pass is overwritten.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`].
    pub fn broadcast<P: Payload>(&self, payload: P, root: usize) -> Result<P, Error> {
        self.check_root(root, "broadcast")?;
        let operation = Operation::Broadcast { root };
        self.dispatch(operation, payload, |data| self.host_in_place(operation, data, 0))
    }

    /// [`broadcast`](Self::broadcast) on a slice, in place.
    pub fn broadcast_in_place<E: Element>(&self, slice: &mut [E], root: usize) -> Result<(), Error> {
        self.check_root(root, "broadcast")?;
        let call = Call::new(Operation::Broadcast { root }, Some(E::DTYPE), CallShape::flat(slice.len()));
        self.in_place(&call, &mut [BufferMut::new(slice)])
    }

    /// `root` gets the reduction over all ranks, the others `None`. All pass the same shape and dtype.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`], [`Error::UnsupportedReduction`].
    pub fn reduce<P: Payload>(&self, payload: P, op: ReduceOp, root: usize) -> Result<Option<P>, Error> {
        self.check_root(root, "reduce")?;
        let reduced = self.dispatch(Operation::Reduce { op, root }, payload, |data| {
            reduce::check(op, data.dtype())?;
            self.host_in_place(Operation::Reduce { op, root }, data, 0)
        })?;
        Ok((root == self.rank()).then_some(reduced))
    }

    /// `root` gets the payloads of all as in [`all_gather`](Self::all_gather), the others `None`.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`]; [`Error::OutOfMemory`] on every rank, if the root has no memory for the result.
    pub fn gather<P: Payload>(&self, payload: P, root: usize) -> Result<Option<P>, Error> {
        self.gather_agreed(payload, root, 0)
    }

    /// [`gather`](Self::gather) with a number that must be the same on all ranks.
    pub(crate) fn gather_agreed<P: Payload>(&self, payload: P, root: usize, agreed: u64) -> Result<Option<P>, Error> {
        self.check_root(root, "gather")?;
        let operation = Operation::Gather { root };
        let gathered = self.dispatch_agreed(operation, payload, agreed, |data| {
            self.out_of_place_agreed(operation, Some(data), None, agreed)
        })?;
        Ok((root == self.rank()).then_some(gathered))
    }

    /// Every rank gets its [part](super::part) of the first dim of the payload of `root`; the others pass `None`.
    /// Tensors arrive on the CPU device [`Device::flex`](burn::tensor::Device::flex) of ranks that pass none.
    ///
    /// # Errors
    /// [`Error::NoSuchRank`]; [`Error::InvalidArgument`] if the root passes nothing, or a tensor of another kind than a
    /// receiver expects; the world fails with it. [`Error::OutOfMemory`] on every rank, if one has no memory for its
    /// part.
    pub fn scatter<P: Payload>(&self, payload: Option<P>, root: usize) -> Result<P, Error> {
        self.check_root(root, "scatter")?;
        if root == self.rank() && payload.is_none() {
            let problem = format!("rank {root} is the root and passes nothing to scatter");
            return Err(self.fail_with(Error::invalid("scatter", problem)));
        }
        let (data, origin) = match payload.filter(|_| root == self.rank()).map(P::into_host).transpose()? {
            Some((data, origin)) => (Some(data), origin),
            None => (None, P::Origin::default()),
        };
        let data = self.out_of_place(Operation::Scatter { root }, data, P::fixed_dtype())?;
        // Only a receiver of a scatter can find another kind than it expects: it passed nothing for the others to
        // compare with.
        P::from_host(data, &origin).map_err(|error| self.fail_with(error))
    }

    /// [`scatter`](Self::scatter) where every rank passes a payload. Of the payloads of the others only kind, dtype and
    /// device count, which must be the root's: on a device that the transport supports, the parts stay there.
    pub(crate) fn scatter_alike<P: Payload>(&self, payload: P, root: usize) -> Result<P, Error> {
        self.check_root(root, "scatter")?;
        let operation = Operation::Scatter { root };
        self.dispatch(operation, payload, |data| {
            let dtype = data.dtype();
            self.out_of_place(operation, (root == self.rank()).then_some(data), Some(dtype))
        })
    }

    /// Part `j` of this rank's first dim goes to rank `j`; the rank gets its part of every rank, in rank order.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] on every rank, if one has no memory for the result.
    pub fn all_to_all<P: Payload>(&self, payload: P) -> Result<P, Error> {
        self.all_to_all_agreed(payload, 0)
    }

    /// [`all_to_all`](Self::all_to_all) with a number that all ranks must agree on.
    pub(crate) fn all_to_all_agreed<P: Payload>(&self, payload: P, agreed: u64) -> Result<P, Error> {
        let operation = Operation::AllToAll;
        self.dispatch_agreed(operation, payload, agreed, |data| {
            self.out_of_place_agreed(operation, Some(data), None, agreed)
        })
    }

    fn check_root(&self, root: usize, operation: &'static str) -> Result<(), Error> {
        match root < self.size() {
            true => Ok(()),
            false => Err(Error::NoSuchRank { group: self.group().clone(), rank: root, size: self.size(), operation }),
        }
    }
}
