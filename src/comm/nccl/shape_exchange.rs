//! Exchanges the shapes of the ranks' tensors before a collective in which they may differ.

use burn::tensor::DType;

use crate::Error;
use crate::comm::device::{DeviceTensor, rows_received};
use crate::comm::{BufferMut, Call, CallShape, Operation, ReduceOp, Transfer, Transport};

/// The shapes of the ranks' tensors in a collective.
pub(super) struct Shapes {
    /// The first dims of all.
    pub rows: Vec<usize>,
    /// The dims of one; those behind the first are the same on all.
    pub dims: Vec<usize>,
}

impl Shapes {
    /// Dims of a tensor that can be scattered.
    const MOST: usize = 15;

    /// The shapes if they are known without an exchange: those of this rank.
    pub fn alike(call: &Call, tensor: &DeviceTensor, size: usize) -> Option<Self> {
        match call.operation {
            Operation::AllGather | Operation::Gather { .. } | Operation::AllToAll | Operation::Scatter { .. } => None,
            _ => Some(Self { rows: vec![call.shape.rows(); size], dims: tensor.meta.shape().to_vec() }),
        }
    }

    /// Exchanges the shapes of all ranks, for a call in which they may differ.
    pub fn ask(host: &dyn Transport, call: &Call, tensor: &DeviceTensor) -> Result<Self, Error> {
        let (size, rank) = (host.size(), host.rank());
        let mut dims = tensor.meta.shape().to_vec();
        if let Operation::Scatter { root } = call.operation {
            // Only the tensor of the root counts.
            let mut told = [0u64; 1 + Self::MOST];
            if rank == root && dims.len() <= Self::MOST {
                told[0] = 1 + dims.len() as u64;
                told[1..].iter_mut().zip(&dims).for_each(|(to, dim)| *to = *dim as u64);
            }
            let own = told;
            reduce(host, ReduceOp::Sum, &mut told)?;
            if rank == root && told != own {
                return Err(garbled(call));
            }
            let Some(len) = told[0].checked_sub(1).filter(|len| *len <= Self::MOST as u64) else {
                let problem = format!("rank {root} passes a tensor of more than {} dims", Self::MOST);
                return Err(Error::invalid("scatter", problem));
            };
            dims = told[1..].iter().take(len as usize).map(|dim| *dim as usize).collect();
            return Self { rows: vec![dims.first().copied().unwrap_or(1); size], dims }.checked(call, tensor.dtype, 1);
        }
        let mut rows = vec![0u64; size];
        rows[rank] = call.shape.rows() as u64;
        reduce(host, ReduceOp::Sum, &mut rows)?;
        // This rank's buffer is read by these.
        if rows[rank] != call.shape.rows() as u64 {
            return Err(garbled(call));
        }
        Self { rows: rows.into_iter().map(|rows| rows as usize).collect(), dims }.checked(call, tensor.dtype, size)
    }

    /// Refuses sizes beyond the address space: the rows of the first `together` ranks are received together.
    fn checked(self, call: &Call, dtype: DType, together: usize) -> Result<Self, Error> {
        let rows = self.rows.iter().take(together).try_fold(0usize, |sum, rows| sum.checked_add(*rows));
        let row = self.dims.iter().skip(1).try_fold(dtype.size(), |bytes, dim| bytes.checked_mul(*dim));
        let bytes = rows.zip(row).and_then(|(rows, row)| rows.checked_mul(row));
        match bytes.filter(|bytes| *bytes <= isize::MAX as usize) {
            Some(_) => Ok(self),
            None => {
                let (name, rows) = (call.operation.name(), &self.rows);
                Err(Error::invalid(name, format!("{rows:?} rows of the ranks are more than there is memory for")))
            }
        }
    }

    pub fn width(&self) -> usize {
        self.dims.iter().skip(1).product()
    }

    pub fn dims_received(&self, operation: &Operation, rank: usize) -> Vec<usize> {
        let (mut dims, rows) = (self.dims.clone(), rows_received(operation, &self.rows, rank));
        match dims.first_mut() {
            Some(first) => *first = rows,
            None => debug_assert_eq!(rows, 1),
        }
        dims
    }
}

fn garbled(call: &Call) -> Error {
    let problem = "another rank reports the shape of this one: do all ranks run this program?";
    Error::invalid(call.operation.name(), problem)
}

/// Reduces a few numbers of the transport's own over the host transport.
pub(super) fn reduce(host: &dyn Transport, op: ReduceOp, values: &mut [u64]) -> Result<(), Error> {
    let call = Call::new(Operation::AllReduce(op), Some(DType::U64), CallShape::flat(values.len()));
    host.collective(&call, Transfer::InPlace(&mut [BufferMut::new(values)])).map(drop)
}
