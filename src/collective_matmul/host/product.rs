//! Products and their collectives, chunk by chunk.
//!
//! What travels has its positions first: of each position the rows of all outer places, one behind the other. Products
//! are written there by rows at even distances, and read from there likewise; nothing is brought into another order.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;

use super::disjoint::disjoint_slices;
use super::matrix::{Matrix, OutputRows, PreparedFactor, Real, empty_tensor, multiply};
use super::matrix_batch::{MatrixBatch, even};
use crate::Error;
use crate::collective_matmul::chunk_plan::ChunkPlan;
use crate::collective_matmul::schedule::Size;
use crate::collective_matmul::{PendingProduct, ProductCall};
use crate::comm::Pending;
use crate::tensor::Pool;

/// Pairs of factors whose products are added up, and the memory that this is done in.
struct Terms<'a, T: Real>(Vec<(MatrixBatch<'a, T>, PreparedFactor<'a, T>)>, &'a Arc<Pool>);

impl<'a, T: Real> Terms<'a, T> {
    fn of(terms: &'a [[FlexTensor; 2]], dim: usize, pool: &'a Arc<Pool>) -> Self {
        let pair =
            |[left, right]: &'a [FlexTensor; 2]| (MatrixBatch::of(left, dim), PreparedFactor::new(Matrix::of(right)));
        Self(terms.iter().map(pair).collect(), pool)
    }

    fn columns(&self) -> usize {
        self.0.first().map_or(0, |(_, right)| right.columns())
    }

    /// Features of all left factors.
    fn features(&self) -> usize {
        self.0.iter().map(|(left, _)| left.columns()).sum()
    }

    fn size(&self, rows: usize, beside: bool) -> Size {
        let across = self.columns();
        Size { rows, row_bytes: across * size_of::<T>(), across, split: self.features(), beside, on_device: false }
    }

    /// The rows of each factor as `rows` chooses them, multiplied.
    fn write(&self, place: OutputRows<'_, T>, rows: impl Fn(&MatrixBatch<'a, T>) -> Matrix<'a, T>) {
        let terms: Vec<_> = self.0.iter().map(|(left, right)| (rows(left), right)).collect();
        multiply(&terms, place, self.1);
    }

    /// Writes some positions, of `unit` rows of each outer place, one behind the other.
    fn write_positions(&self, positions: Range<usize>, unit: usize, out: &mut [T]) {
        let outer = self.0.first().map_or(0, |(left, _)| left.outer);
        let columns = self.columns();
        let rows = |positions: &Range<usize>| positions.start * unit..positions.end * unit;
        for place in 0..outer {
            // The first of the rows of this outer place, if there is any.
            let from = |position: usize| ((position - positions.start) * outer + place) * unit * columns;
            if outer == 1 || unit == 1 {
                let Some(out) = out.get_mut(from(positions.start)..) else { continue };
                let stride = if unit == 1 { outer * columns } else { columns };
                self.write(OutputRows::spread(out, stride), |left| left.matrix(place).rows(rows(&positions)));
            } else {
                for position in positions.clone() {
                    let out = &mut out[from(position)..][..unit * columns];
                    let rows = rows(&(position..position + 1));
                    self.write(OutputRows::packed(out, columns), |left| left.matrix(place).rows(rows.clone()));
                }
            }
        }
    }
}

/// The dims of a left factor, with others for the positions and the features.
pub(super) fn dims_of(left: &FlexTensor, dim: usize, positions: usize, columns: usize) -> Vec<usize> {
    let mut dims = left.shape().to_vec();
    dims[dim] = positions;
    if let Some(last) = dims.last_mut() {
        *last = columns;
    }
    dims
}

/// Rows of each outer place for a position.
pub(super) fn unit_of(left: &FlexTensor, dim: usize) -> usize {
    let shape = left.shape();
    shape.as_slice()[dim + 1..shape.num_dims() - 1].iter().product()
}

/// From positions first to the order of the dims, without a copy.
pub(super) fn positions_first(tensor: FlexTensor, mut dims: Vec<usize>, dim: usize) -> FlexTensor {
    let positions = dims.remove(dim);
    dims.insert(0, positions);
    let order: Vec<usize> = (1..=dim).chain([0]).chain(dim + 1..dims.len()).collect();
    tensor.reshape(Shape::from(dims)).permute(&order)
}

/// The other way round.
pub(super) fn with_positions_first(tensor: &FlexTensor, dim: usize) -> FlexTensor {
    let order: Vec<usize> = [dim].into_iter().chain(0..dim).chain(dim + 1..tensor.rank()).collect();
    tensor.permute(&order).to_contiguous()
}

pub(super) fn sum<T: Real>(
    terms: Vec<[FlexTensor; 2]>,
    call: &ProductCall,
    beside: bool,
) -> Result<PendingProduct<FlexTensor>, Error> {
    let terms: Vec<_> = terms.into_iter().map(|[left, right]| [even(left, 0), right]).collect();
    let first = &terms.first().ok_or_else(|| call.no_terms())?[0];
    let pool = Pool::of_thread();
    let factors = Terms::<T>::of(&terms, 0, &pool);
    let (rows, columns) = (factors.0[0].0.rows(), factors.columns());
    let schedule = call.schedule(factors.size(rows, beside))?;
    let mut dims = first.shape().to_vec();
    dims.splice(dims.len() - 1.., [columns]);
    let mut sum = empty_tensor::<T>(&dims, &pool);
    let dims = |rows: &Range<usize>| [rows.len(), columns];
    let write = |rows: Range<usize>, out: &mut [T]| {
        factors.write(OutputRows::packed(out, columns), |left| left.matrix(0).rows(rows.clone()));
    };
    if !schedule.background {
        let mut rest: &mut [T] = sum.storage_mut();
        for rows in schedule.cut(rows) {
            let (chunk, behind) = rest.split_at_mut(rows.len() * columns);
            write(rows.clone(), chunk);
            call.comm.all_reduce_matrix(chunk, dims(&rows))?;
            rest = behind;
        }
        return Ok(PendingProduct::Ready(sum));
    }
    let (whole, chunks) = disjoint_slices::<T>(sum, schedule.cut(rows).map(|rows| rows.len() * columns));
    let mut in_flight = Vec::with_capacity(schedule.chunks);
    for (rows, mut chunk) in schedule.cut(rows).zip(chunks) {
        write(rows.clone(), &mut chunk);
        let dims = dims(&rows);
        in_flight.push(call.comm.start(move |comm| comm.all_reduce_matrix(&mut chunk, dims)));
    }
    Ok(PendingProduct::Running(Box::new(move || {
        in_flight.into_iter().try_for_each(Pending::wait)?;
        whole.tensor()
    })))
}

/// A chunk has some of the positions of every rank, so that each gets the next ones of its own.
pub(super) fn scatter<T: Real>(
    terms: Vec<[FlexTensor; 2]>,
    call: &ProductCall,
    beside: bool,
) -> Result<PendingProduct<FlexTensor>, Error> {
    let dim = call.dim;
    let terms: Vec<_> = terms.into_iter().map(|[left, right]| [even(left, dim), right]).collect();
    let first = &terms.first().ok_or_else(|| call.no_terms())?[0];
    let (unit, positions) = (unit_of(first, dim), first.shape()[dim]);
    let pool = Pool::of_thread();
    let factors = Terms::<T>::of(&terms, dim, &pool);
    let (outer, columns) = (factors.0[0].0.outer, factors.columns());
    let schedule = call.schedule(factors.size(outer * positions * unit, beside))?;
    let plan = ChunkPlan::new(positions, call.comm.size(), call.comm.rank(), schedule);
    let width = outer * unit * columns;
    let dims = dims_of(first, dim, plan.own(), columns);
    let mut scattered = empty_tensor::<T>(&[plan.own(), width], &pool);
    let fill = |chunk: usize, partial: &mut [T]| {
        if schedule.chunks == 1 {
            return factors.write_positions(0..positions, unit, partial);
        }
        let mut rest = partial;
        for positions in plan.of_all(chunk) {
            let (slot, behind) = rest.split_at_mut(positions.len() * width);
            factors.write_positions(positions, unit, slot);
            rest = behind;
        }
    };
    if !schedule.background {
        let most = (0..schedule.chunks).map(|chunk| plan.total(chunk)).max().unwrap_or(0);
        let mut partial = empty_tensor::<T>(&[most, width], &pool);
        let partial: &mut [T] = partial.storage_mut();
        let mut rest: &mut [T] = scattered.storage_mut();
        for chunk in 0..schedule.chunks {
            let partial = &mut partial[..plan.total(chunk) * width];
            fill(chunk, partial);
            let (own, behind) = rest.split_at_mut(plan.of_own(chunk).len() * width);
            call.comm.reduce_scatter_matrix(partial, [plan.total(chunk), width], own)?;
            rest = behind;
        }
        return Ok(PendingProduct::Ready(positions_first(scattered, dims, dim)));
    }
    let (whole, owns) =
        disjoint_slices::<T>(scattered, (0..schedule.chunks).map(|chunk| plan.of_own(chunk).len() * width));
    let mut in_flight = Vec::with_capacity(schedule.chunks);
    for (chunk, mut own) in owns.into_iter().enumerate() {
        let dims = [plan.total(chunk), width];
        let mut partial = empty_tensor::<T>(&dims, &pool);
        fill(chunk, partial.storage_mut());
        in_flight.push(call.comm.start(move |comm| comm.reduce_scatter_matrix(partial.storage::<T>(), dims, &mut own)));
    }
    Ok(PendingProduct::Running(Box::new(move || {
        in_flight.into_iter().try_for_each(Pending::wait)?;
        Ok(positions_first(whole.tensor()?, dims, dim))
    })))
}

/// A product as a new tensor.
pub(super) fn multiply_own<T: Real>(left: FlexTensor, right: &FlexTensor) -> FlexTensor {
    let dim = left.rank() - 2;
    let left = even(left, dim);
    let (stack, factor) = (MatrixBatch::<T>::of(&left, dim), PreparedFactor::new(Matrix::of(right)));
    let (rows, columns) = (stack.rows(), factor.columns());
    let pool = Pool::of_thread();
    let mut out = empty_tensor::<T>(&dims_of(&left, dim, left.shape()[dim], columns), &pool);
    let all: &mut [T] = out.storage_mut();
    match stack.flat() {
        Some(left) => multiply(&[(left, &factor)], OutputRows::packed(all, columns), &pool),
        None => {
            for (place, out) in all.chunks_mut((rows * columns).max(1)).enumerate() {
                multiply(&[(stack.matrix(place), &factor)], OutputRows::packed(out, columns), &pool);
            }
        }
    }
    out
}

/// `left^T right`, summed over all rows.
pub(super) fn multiply_rows<T: Real>(left: FlexTensor, right: FlexTensor) -> FlexTensor {
    let (dim, of_right) = (left.rank() - 2, right.rank() - 2);
    let (left, right) = (even(left, dim), even(right, of_right));
    let (left, right) = (MatrixBatch::<T>::of(&left, dim), MatrixBatch::<T>::of(&right, of_right));
    let matrices: Vec<_> = match (left.flat(), right.flat()) {
        (Some(left), Some(right)) => vec![(left.transposed(), PreparedFactor::new(right))],
        _ => (0..left.outer)
            .map(|place| (left.matrix(place).transposed(), PreparedFactor::new(right.matrix(place))))
            .collect(),
    };
    let pool = Pool::of_thread();
    let mut out = empty_tensor::<T>(&[left.columns(), right.columns()], &pool);
    let terms: Vec<_> = matrices.iter().map(|(left, right)| (*left, right)).collect();
    multiply(&terms, OutputRows::packed(out.storage_mut(), right.columns()), &pool);
    out
}
