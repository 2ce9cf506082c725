//! A rank's share of a committed collective, directly on the memory of all ranks.

use std::ops::Range;

use super::barrier;
use super::group::CallDescriptor;
use crate::Error;
use crate::comm::reduce::{Contribution, fold};
use crate::comm::{Call, CallShape, Operation, OutputAllocator, ReduceOp, part};

pub(super) type Descriptors<'a> = barrier::Descriptors<'a, CallDescriptor>;

/// The share of a collective that works in place. Returns the bytes moved.
#[inline]
pub(super) fn in_place(operation: &Operation, rank: usize, descriptors: &Descriptors<'_>) -> u64 {
    match *operation {
        Operation::AllReduce(op) => fold_share(op, rank, descriptors, None),
        Operation::Reduce { op, root } => fold_share(op, rank, descriptors, Some(root)),
        Operation::Broadcast { root } => copy_from_root(root, rank, descriptors),
        _ => unreachable!("{operation:?} is not done in place"),
    }
}

/// The share of a collective that reads inputs and fills an output. Returns the bytes moved.
pub(super) fn out_of_place(
    operation: &Operation,
    rank: usize,
    descriptors: &Descriptors<'_>,
    output: &mut dyn OutputAllocator,
) -> Result<u64, Error> {
    let everything = |_: usize, shape: &CallShape| 0..shape.rows();
    let my_part = |_: usize, shape: &CallShape| part(shape.rows(), descriptors.len(), rank);
    match *operation {
        Operation::ReduceScatter(op) => fold_part(op, rank, descriptors, output),
        Operation::AllGather => collect(rank, descriptors, output, everything),
        Operation::Gather { root } if root == rank => collect(rank, descriptors, output, everything),
        Operation::Gather { .. } => Ok(0),
        Operation::Scatter { root } => {
            collect(rank, descriptors, output, |from, shape| if from == root { my_part(from, shape) } else { 0..0 })
        }
        Operation::AllToAll => collect(rank, descriptors, output, my_part),
        _ => unreachable!("{operation:?} is done in place"),
    }
}

/// Reduces this rank's share of the elements of all buffers and writes it into those of all, or of the root.
fn fold_share(op: ReduceOp, rank: usize, descriptors: &Descriptors<'_>, root: Option<usize>) -> u64 {
    let size = descriptors.len();
    if size == 1 && !matches!(op, ReduceOp::PreMulSum(_)) {
        return 0;
    }
    let own = descriptors.get(rank).buffers();
    let total: usize = own.iter().map(|buffer| buffer.elements).sum();
    let share = part(total, size, rank);
    let mut inputs = [Contribution { data: std::ptr::null(), factor: 1.0 }; FEW];
    let mut outputs = [std::ptr::null_mut(); FEW];
    let (mut many_inputs, mut many_outputs) = (Vec::new(), Vec::new());
    let (inputs, outputs): (&mut [Contribution], &mut [*mut u8]) = if size <= FEW {
        (&mut inputs[..size], &mut outputs[..size])
    } else {
        many_inputs.resize(size, inputs[0]);
        many_outputs.resize(size, outputs[0]);
        (&mut many_inputs, &mut many_outputs)
    };
    let scaled = matches!(op, ReduceOp::PreMulSum(_));
    let mut passed = 0;
    for (piece, buffer) in own.iter().enumerate() {
        // The share is a range of the concatenated buffers.
        let overlap =
            share.start.clamp(passed, passed + buffer.elements)..share.end.clamp(passed, passed + buffer.elements);
        if !overlap.is_empty() {
            for (other, descriptor) in descriptors.iter().enumerate() {
                let bytes = (overlap.start - passed) * buffer.dtype.size();
                // SAFETY: all ranks have buffers of the same lengths, and `overlap` lies within this one.
                let place = unsafe { descriptor.place(piece, own.len()).add(bytes) };
                let factor = if scaled { factor(&descriptor.call().operation) } else { 1.0 };
                inputs[other] = Contribution { data: place, factor };
                outputs[other] = place;
            }
            let into = match root {
                None => &*outputs,
                Some(root) => &outputs[root..=root],
            };
            // SAFETY: the shares of the ranks do not overlap, and the owners wait until all have departed.
            unsafe { fold(buffer.dtype, op, inputs, into, overlap.len()) };
        }
        passed += buffer.elements;
    }
    let bytes = (share.len() * own.first().map_or(0, |buffer| buffer.dtype.size())) as u64;
    let read = bytes * (size as u64 - 1);
    let written = match root {
        None => bytes * (size as u64 - 1),
        Some(root) => bytes * u64::from(root != rank),
    };
    read + written
}

/// Worlds up to this size need no allocation for an all-reduce.
const FEW: usize = 8;

fn copy_from_root(root: usize, rank: usize, descriptors: &Descriptors<'_>) -> u64 {
    if rank == root {
        return 0;
    }
    let mut moved = 0;
    for (from, to) in descriptors.get(root).buffers().iter().zip(descriptors.get(rank).buffers()) {
        let bytes = from.elements * from.dtype.size();
        // SAFETY: equal lengths were checked; the root only waits, and this rank alone writes its own buffer.
        unsafe { from.data.copy_to_nonoverlapping(to.data, bytes) };
        moved += bytes as u64;
    }
    moved
}

/// Reduces this rank's part of all inputs into its output.
fn fold_part(
    op: ReduceOp,
    rank: usize,
    descriptors: &Descriptors<'_>,
    output: &mut dyn OutputAllocator,
) -> Result<u64, Error> {
    let Call { dtype: Some(dtype), shape, .. } = *descriptors.get(rank).call() else { return Ok(0) };
    let rows = part(shape.rows(), descriptors.len(), rank);
    let (skipped, elements) = (rows.start * shape.width(), rows.len() * shape.width());
    let target = output.allocate(&shape.with_rows(rows.len()), dtype)?;
    let source = |descriptor: CallDescriptor| Contribution {
        // SAFETY: every input is as long as this rank's, and its owner waits.
        data: unsafe { descriptor.input.add(skipped * dtype.size()) },
        factor: factor(&descriptor.call().operation),
    };
    let sources: Vec<Contribution> = descriptors.iter().map(source).collect();
    // SAFETY: the output is this rank's own.
    unsafe { fold(dtype, op, &sources, &[target.data], elements) };
    Ok((elements * dtype.size() * (descriptors.len() - 1)) as u64)
}

/// Copies some rows of every rank's input, in rank order, into the output.
fn collect(
    rank: usize,
    descriptors: &Descriptors<'_>,
    output: &mut dyn OutputAllocator,
    wanted: impl Fn(usize, &CallShape) -> Range<usize>,
) -> Result<u64, Error> {
    let Some((dtype, shape)) = descriptors
        .iter()
        .find(|descriptor| !descriptor.input.is_null())
        .and_then(|descriptor| Some((descriptor.call().dtype?, descriptor.call().shape)))
    else {
        return Ok(0);
    };
    // More than there are addresses for is more than there is memory for.
    let lens = descriptors.iter().enumerate().map(|(from, descriptor)| wanted(from, &descriptor.call().shape).len());
    let rows = lens.fold(0, usize::saturating_add);
    let mut target = output.allocate(&shape.with_rows(rows), dtype)?.data;
    let row_bytes = shape.width() * dtype.size();
    let mut moved = 0;
    for (from, descriptor) in descriptors.iter().enumerate() {
        let range = wanted(from, &descriptor.call().shape);
        let bytes = range.len() * row_bytes;
        if bytes > 0 {
            // SAFETY: the rows lie within the sender's input, whose owner waits; the output has room for all of them.
            // This rank's own may be where they go already.
            unsafe {
                let rows = descriptor.input.add(range.start * row_bytes);
                if rows != target.cast_const() {
                    rows.copy_to_nonoverlapping(target, bytes);
                }
                target = target.add(bytes);
            }
        }
        moved += if from == rank { 0 } else { bytes as u64 };
    }
    Ok(moved)
}

/// Whether two matching descriptors have buffers of the same lengths. Memory safety depends on it, so it does not trust
/// the fingerprint in the calls.
pub(super) fn same_lengths(own: &CallDescriptor, other: &CallDescriptor) -> bool {
    own.call().buffers == 1 || {
        let lens = |descriptor: &CallDescriptor| descriptor.buffers().iter().map(|buffer| buffer.elements);
        lens(own).eq(lens(other))
    }
}

fn factor(operation: &Operation) -> f64 {
    match operation {
        Operation::AllReduce(ReduceOp::PreMulSum(factor))
        | Operation::ReduceScatter(ReduceOp::PreMulSum(factor))
        | Operation::Reduce { op: ReduceOp::PreMulSum(factor), .. } => *factor,
        _ => 1.0,
    }
}
