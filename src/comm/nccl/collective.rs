//! Runs the collectives as calls of NCCL.

use std::ffi::c_void;
use std::ops::Range;

use burn::tensor::{BoolStore, DType};
use cudarc::nccl::result::{self as nccl, NcclError, NcclStatus};
use cudarc::nccl::sys::{self, ncclDataType_t as DataType, ncclRedOp_t as RedOp};

use super::nccl_comm::NcclComm;
use crate::comm::{Operation, ReduceOp, part};
use crate::{Error, comm};

/// NCCL's name of a dtype, if it has one.
pub(super) const fn data_type(dtype: DType) -> Option<DataType> {
    Some(match dtype {
        DType::F64 => DataType::ncclFloat64,
        DType::F32 => DataType::ncclFloat32,
        DType::F16 => DataType::ncclFloat16,
        DType::BF16 => DataType::ncclBfloat16,
        DType::I64 => DataType::ncclInt64,
        DType::I32 => DataType::ncclInt32,
        DType::I8 => DataType::ncclInt8,
        DType::U64 => DataType::ncclUint64,
        DType::U32 => DataType::ncclUint32,
        DType::U8 | DType::Bool(BoolStore::Native | BoolStore::U8) => DataType::ncclUint8,
        DType::Bool(BoolStore::U32) => DataType::ncclUint32,
        _ => return None,
    })
}

/// The addresses that are read and written.
pub(super) type Addresses = (*const std::ffi::c_void, *mut std::ffi::c_void);

/// One collective on this rank: its elements, and those of each rank.
pub(super) struct Task<'a> {
    pub raw: &'a NcclComm,
    pub rank: usize,
    pub dtype: DType,
    /// First dims of the tensors of the ranks.
    pub rows: &'a [usize],
    /// Elements behind each entry of the first dim.
    pub width: usize,
    pub stream: sys::cudaStream_t,
}

impl Task<'_> {
    fn size(&self) -> usize {
        self.rows.len()
    }

    /// Enqueues `operation` from `input` into `output`.
    pub fn run(&self, operation: &Operation, input: *const c_void, output: *mut c_void) -> Result<(), Error> {
        let kind = data_type(self.dtype).ok_or(Error::UnsupportedDType { operation: "NCCL", dtype: self.dtype })?;
        let name = operation.name();
        match *operation {
            Operation::AllReduce(op) => {
                let op = NcclReduction::new(self.raw, op, self.dtype, kind)?;
                let count = self.elements(0..self.rows[self.rank]).len();
                // SAFETY: both buffers hold `count` elements and live until the stream has passed.
                let called = unsafe { nccl::all_reduce(input, output, count, kind, op.op, self.raw.comm, self.stream) };
                self.raw.finish(name, called)
            }
            Operation::Reduce { op, root } => {
                let op = NcclReduction::new(self.raw, op, self.dtype, kind)?;
                let count = self.elements(0..self.rows[self.rank]).len();
                // SAFETY: as above.
                let called =
                    unsafe { nccl::reduce(input, output, count, kind, op.op, root as i32, self.raw.comm, self.stream) };
                self.raw.finish(name, called)
            }
            Operation::Broadcast { root } => {
                let count = self.elements(0..self.rows[self.rank]).len();
                // SAFETY: as above.
                let called =
                    unsafe { nccl::broadcast(input, output, count, kind, root as i32, self.raw.comm, self.stream) };
                self.raw.finish(name, called)
            }
            Operation::ReduceScatter(op) => self.reduce_scatter(op, kind, input, output),
            Operation::AllGather => self.all_gather(kind, input, output),
            Operation::Gather { root } => {
                let mine = 0..self.rows[self.rank];
                let sends = [(root, mine)];
                let receives = if root == self.rank { self.rows.to_vec() } else { Vec::new() };
                self.exchange(name, kind, input, &sends, output, &receives)
            }
            Operation::Scatter { root } => {
                let parts = |rank| (rank, part(self.rows[root], self.size(), rank));
                let sends: Vec<_> = if root == self.rank { (0..self.size()).map(parts).collect() } else { Vec::new() };
                let mut receives = vec![0; self.size()];
                receives[root] = part(self.rows[root], self.size(), self.rank).len();
                self.exchange(name, kind, input, &sends, output, &receives)
            }
            Operation::AllToAll => {
                let sends: Vec<_> =
                    (0..self.size()).map(|to| (to, part(self.rows[self.rank], self.size(), to))).collect();
                let receives: Vec<usize> =
                    self.rows.iter().map(|rows| part(*rows, self.size(), self.rank).len()).collect();
                self.exchange(name, kind, input, &sends, output, &receives)
            }
            Operation::Barrier | Operation::Split | Operation::Send { .. } | Operation::Receive { .. } => {
                Err(Error::invalid("NCCL", format!("{name} is not a collective on device data")))
            }
        }
    }

    /// Enqueues an all-reduce of each of several buffers as one launch. `counts` are their elements.
    pub fn all_reduce_many(&self, op: ReduceOp, places: &[Addresses], counts: &[usize]) -> Result<(), Error> {
        let kind = data_type(self.dtype).ok_or(Error::UnsupportedDType { operation: "NCCL", dtype: self.dtype })?;
        let op = NcclReduction::new(self.raw, op, self.dtype, kind)?;
        self.grouped("all_reduce", || {
            places.iter().zip(counts).filter(|(_, count)| **count > 0).try_for_each(|((from, to), count)| {
                // SAFETY: both buffers hold `count` elements and live until the stream has passed.
                unsafe { nccl::all_reduce(*from, *to, *count, kind, op.op, self.raw.comm, self.stream).map(drop) }
            })
        })
    }

    fn reduce_scatter(
        &self,
        op: ReduceOp,
        kind: DataType,
        input: *const c_void,
        output: *mut c_void,
    ) -> Result<(), Error> {
        let op = NcclReduction::new(self.raw, op, self.dtype, kind)?;
        let rows = self.rows[self.rank];
        if rows.is_multiple_of(self.size()) {
            let count = self.elements(0..rows / self.size()).len();
            // SAFETY: the input holds `size` times the elements of the output.
            let called = unsafe { nccl::reduce_scatter(input, output, count, kind, op.op, self.raw.comm, self.stream) };
            return self.raw.finish("reduce_scatter", called);
        }
        // Parts of unequal lengths: each rank is the root of its own.
        self.grouped("reduce_scatter", || {
            (0..self.size()).try_for_each(|root| {
                let elements = self.elements(part(rows, self.size(), root));
                // SAFETY: the part lies within the input; only the root's output is written, which is as long.
                unsafe {
                    let place = self.offset(input, elements.start);
                    let (comm, stream) = (self.raw.comm, self.stream);
                    nccl::reduce(place, output, elements.len(), kind, op.op, root as i32, comm, stream).map(drop)
                }
            })
        })
    }

    fn all_gather(&self, kind: DataType, input: *const c_void, output: *mut c_void) -> Result<(), Error> {
        if self.rows.iter().all(|rows| *rows == self.rows[0]) {
            let count = self.elements(0..self.rows[0]).len();
            // SAFETY: the output holds `size` times the elements of the input.
            let called = unsafe { nccl::all_gather(input, output, count, kind, self.raw.comm, self.stream) };
            return self.raw.finish("all_gather", called);
        }
        self.grouped("all_gather", || {
            let mut first = 0;
            self.rows.iter().enumerate().try_for_each(|(root, rows)| {
                let elements = self.elements(first..first + rows);
                first += rows;
                // SAFETY: the window lies within the output; the input is read on its owner only.
                unsafe {
                    let place = self.offset(output, elements.start).cast_mut();
                    let (comm, stream) = (self.raw.comm, self.stream);
                    nccl::broadcast(input, place, elements.len(), kind, root as i32, comm, stream).map(drop)
                }
            })
        })
    }

    /// Sends rows of the input to ranks, and receives as many rows as said from each, one behind the other.
    fn exchange(
        &self,
        name: &'static str,
        kind: DataType,
        input: *const c_void,
        sends: &[(usize, Range<usize>)],
        output: *mut c_void,
        receives: &[usize],
    ) -> Result<(), Error> {
        let (comm, stream) = (self.raw.comm, self.stream);
        self.grouped(name, || {
            for (to, rows) in sends.iter().filter(|(_, rows)| !rows.is_empty()) {
                let elements = self.elements(rows.clone());
                // SAFETY: the rows lie within the input.
                unsafe {
                    nccl::send(self.offset(input, elements.start), elements.len(), kind, *to as i32, comm, stream)?
                };
            }
            let mut first = 0;
            for (from, rows) in receives.iter().enumerate() {
                let elements = self.elements(first..first + rows);
                first += rows;
                if !elements.is_empty() {
                    // SAFETY: the output has room for all that is received.
                    unsafe {
                        let place = self.offset(output, elements.start).cast_mut();
                        nccl::recv(place, elements.len(), kind, from as i32, comm, stream)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Makes NCCL take several calls as one, so that none waits for another.
    fn grouped(&self, name: &'static str, calls: impl FnOnce() -> Result<(), NcclError>) -> Result<(), Error> {
        self.raw.finish(name, nccl::group_start())?;
        let called = calls();
        // Closed in any case: groups nest.
        let closed = nccl::group_end();
        self.raw.finish(name, called.map(|()| NcclStatus::Success))?;
        self.raw.finish(name, closed)
    }

    fn elements(&self, rows: Range<usize>) -> Range<usize> {
        rows.start * self.width..rows.end * self.width
    }

    /// # Safety
    /// The buffer must have that many elements.
    unsafe fn offset(&self, buffer: *const c_void, elements: usize) -> *const c_void {
        // SAFETY: passed on.
        unsafe { buffer.cast::<u8>().add(elements * self.dtype.size()).cast() }
    }
}

/// A reduction as NCCL knows it. One with factors is made for the call.
struct NcclReduction<'a> {
    op: RedOp,
    made_by: Option<&'a NcclComm>,
}

impl<'a> NcclReduction<'a> {
    fn new(raw: &'a NcclComm, op: ReduceOp, dtype: DType, kind: DataType) -> Result<Self, Error> {
        comm::reduce::check(op, dtype)?;
        let plain = |op| Ok(Self { op, made_by: None });
        let factor = match op {
            ReduceOp::Sum => return plain(RedOp::ncclSum),
            ReduceOp::Mean => return plain(RedOp::ncclAvg),
            ReduceOp::Max => return plain(RedOp::ncclMax),
            ReduceOp::Min => return plain(RedOp::ncclMin),
            ReduceOp::Product => return plain(RedOp::ncclProd),
            ReduceOp::PreMulSum(factor) => factor,
        };
        // The factor in the dtype of the data, read before the call returns.
        let mut bytes = [0u8; 8];
        match dtype {
            DType::F64 => bytes.copy_from_slice(&factor.to_ne_bytes()),
            DType::F32 => bytes[..4].copy_from_slice(&(factor as f32).to_ne_bytes()),
            DType::F16 => bytes[..2].copy_from_slice(&half::f16::from_f64(factor).to_ne_bytes()),
            DType::BF16 => bytes[..2].copy_from_slice(&half::bf16::from_f64(factor).to_ne_bytes()),
            _ => return Err(Error::UnsupportedReduction { op, dtype, advice: "use a float dtype" }),
        }
        let mut made = RedOp::ncclSum;
        let immediate = sys::ncclScalarResidence_t::ncclScalarHostImmediate;
        // SAFETY: NCCL reads the factor at once.
        let called = unsafe {
            nccl::reduce_op_create_pre_mul_sum(&mut made, bytes.as_mut_ptr().cast(), kind, immediate, raw.comm)
        };
        raw.finish("making a reduction with factors", called)?;
        Ok(Self { op: made, made_by: Some(raw) })
    }
}

impl Drop for NcclReduction<'_> {
    fn drop(&mut self) {
        if let Some(raw) = self.made_by {
            // SAFETY: made by this communicator. NCCL keeps it until the calls that use it are over.
            let _ = unsafe { nccl::reduce_op_destroy(self.op, raw.comm) };
        }
    }
}
