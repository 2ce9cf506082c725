//! Products and their collectives, chunk by chunk.
//!
//! What travels has its positions first: of each position the rows of all outer places, one behind the other. Products are
//! written there by rows at even distances, and read from there likewise; nothing is brought into another order.

use std::ops::Range;

use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{Shape, Tensor};

use super::matrix::{Factor, Matrix, Place, Real, elements_of, multiply, room};
use super::stack::{Stack, even};
use super::window::windows;
use crate::Error;
use crate::comm::{Pending, part};
use crate::matmul::deal::{Deal, check_part, total_positions};
use crate::matmul::schedule::Size;
use crate::matmul::{Flight, Job};

/// Pairs of factors whose products are added up.
struct Terms<'a, T: Real>(Vec<(Stack<'a, T>, Factor<'a, T>)>);

impl<'a, T: Real> Terms<'a, T> {
    fn of(terms: &'a [[FlexTensor; 2]], dim: usize) -> Self {
        Self(terms.iter().map(|[left, right]| (Stack::of(left, dim), Factor::new(Matrix::of(right)))).collect())
    }

    fn columns(&self) -> usize {
        self.0.first().map_or(0, |(_, right)| right.columns())
    }

    /// Multiplications for each row.
    fn row_work(&self) -> usize {
        self.0.iter().map(|(left, right)| left.columns() * right.columns()).sum()
    }

    /// The rows of each factor as `rows` chooses them, multiplied.
    fn write(&self, place: Place<'_, T>, rows: impl Fn(&Stack<'a, T>) -> Matrix<'a, T>) {
        let terms: Vec<_> = self.0.iter().map(|(left, right)| (rows(left), right)).collect();
        multiply(&terms, place);
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
                self.write(Place::spread(out, stride), |left| left.matrix(place).rows(rows(&positions)));
            } else {
                for position in positions.clone() {
                    let out = &mut out[from(position)..][..unit * columns];
                    let rows = rows(&(position..position + 1));
                    self.write(Place::packed(out, columns), |left| left.matrix(place).rows(rows.clone()));
                }
            }
        }
    }
}

/// The dims of a left factor, with others for the positions and the features.
fn dims_of(left: &FlexTensor, dim: usize, positions: usize, columns: usize) -> Vec<usize> {
    let mut dims = left.shape().to_vec();
    dims[dim] = positions;
    if let Some(last) = dims.last_mut() {
        *last = columns;
    }
    dims
}

/// Rows of each outer place for a position.
fn unit_of(left: &FlexTensor, dim: usize) -> usize {
    let shape = left.shape();
    shape.as_slice()[dim + 1..shape.num_dims() - 1].iter().product()
}

/// From positions first to the order of the dims, without a copy.
fn positions_first(tensor: FlexTensor, mut dims: Vec<usize>, dim: usize) -> FlexTensor {
    let positions = dims.remove(dim);
    dims.insert(0, positions);
    let order: Vec<usize> = (1..=dim).chain([0]).chain(dim + 1..dims.len()).collect();
    tensor.reshape(Shape::from(dims)).permute(&order)
}

/// The other way round.
fn with_positions_first(tensor: &FlexTensor, dim: usize) -> FlexTensor {
    let order: Vec<usize> = [dim].into_iter().chain(0..dim).chain(dim + 1..tensor.rank()).collect();
    tensor.permute(&order).to_contiguous()
}

pub(super) fn sum<T: Real>(terms: Vec<[FlexTensor; 2]>, job: &Job, beside: bool) -> Result<Flight<FlexTensor>, Error> {
    let terms: Vec<_> = terms.into_iter().map(|[left, right]| [even(left, 0), right]).collect();
    let first = &terms.first().ok_or_else(|| job.no_terms())?[0];
    let factors = Terms::<T>::of(&terms, 0);
    let (rows, columns) = (factors.0[0].0.rows(), factors.columns());
    let (row_bytes, row_work) = (columns * size_of::<T>(), factors.row_work());
    let schedule = job.schedule(Size { rows, row_bytes, row_work, beside, on_device: false });
    let mut dims = first.shape().to_vec();
    dims.splice(dims.len() - 1.., [columns]);
    let mut sum = room::<T>(&dims);
    let dims = |rows: &Range<usize>| [rows.len(), columns];
    let write = |rows: Range<usize>, out: &mut [T]| {
        factors.write(Place::packed(out, columns), |left| left.matrix(0).rows(rows.clone()));
    };
    if !schedule.background {
        let mut rest: &mut [T] = sum.storage_mut();
        for rows in schedule.cut(rows) {
            let (chunk, behind) = rest.split_at_mut(rows.len() * columns);
            write(rows.clone(), chunk);
            job.comm.all_reduce_matrix(chunk, dims(&rows))?;
            rest = behind;
        }
        return Ok(Flight::There(sum));
    }
    let (frame, chunks) = windows::<T>(sum, schedule.cut(rows).map(|rows| rows.len() * columns));
    let mut flying = Vec::with_capacity(schedule.chunks);
    for (rows, mut chunk) in schedule.cut(rows).zip(chunks) {
        write(rows.clone(), &mut chunk);
        let dims = dims(&rows);
        flying.push(job.comm.start(move |comm| comm.all_reduce_matrix(&mut chunk, dims)));
    }
    Ok(Flight::Flying(Box::new(move || {
        flying.into_iter().try_for_each(Pending::wait)?;
        frame.tensor()
    })))
}

/// A chunk has some of the positions of every rank, so that each gets the next ones of its own.
pub(super) fn scatter<T: Real>(
    terms: Vec<[FlexTensor; 2]>,
    job: &Job,
    beside: bool,
) -> Result<Flight<FlexTensor>, Error> {
    let dim = job.dim;
    let terms: Vec<_> = terms.into_iter().map(|[left, right]| [even(left, dim), right]).collect();
    let first = &terms.first().ok_or_else(|| job.no_terms())?[0];
    let (unit, positions) = (unit_of(first, dim), first.shape()[dim]);
    let factors = Terms::<T>::of(&terms, dim);
    let (outer, columns) = (factors.0[0].0.outer, factors.columns());
    let (row_bytes, row_work) = (columns * size_of::<T>(), factors.row_work());
    let rows = outer * positions * unit;
    let schedule = job.schedule(Size { rows, row_bytes, row_work, beside, on_device: false });
    let deal = Deal::new(positions, job.comm.size(), job.comm.rank(), schedule);
    let width = outer * unit * columns;
    let dims = dims_of(first, dim, deal.own(), columns);
    let mut scattered = room::<T>(&[deal.own(), width]);
    let fill = |chunk: usize, partial: &mut [T]| {
        if schedule.chunks == 1 {
            return factors.write_positions(0..positions, unit, partial);
        }
        let mut rest = partial;
        for positions in deal.of_all(chunk) {
            let (slot, behind) = rest.split_at_mut(positions.len() * width);
            factors.write_positions(positions, unit, slot);
            rest = behind;
        }
    };
    if !schedule.background {
        let mut partial = vec![T::default(); (0..schedule.chunks).map(|c| deal.total(c)).max().unwrap_or(0) * width];
        let mut rest: &mut [T] = scattered.storage_mut();
        for chunk in 0..schedule.chunks {
            let partial = &mut partial[..deal.total(chunk) * width];
            fill(chunk, partial);
            let (own, behind) = rest.split_at_mut(deal.of_own(chunk).len() * width);
            job.comm.reduce_scatter_matrix(partial, [deal.total(chunk), width], own)?;
            rest = behind;
        }
        return Ok(Flight::There(positions_first(scattered, dims, dim)));
    }
    let (frame, owns) = windows::<T>(scattered, (0..schedule.chunks).map(|chunk| deal.of_own(chunk).len() * width));
    let mut flying = Vec::with_capacity(schedule.chunks);
    for (chunk, mut own) in owns.into_iter().enumerate() {
        let mut partial = vec![T::default(); deal.total(chunk) * width];
        fill(chunk, &mut partial);
        let dims = [deal.total(chunk), width];
        flying.push(job.comm.start(move |comm| comm.reduce_scatter_matrix(&partial, dims, &mut own)));
    }
    Ok(Flight::Flying(Box::new(move || {
        flying.into_iter().try_for_each(Pending::wait)?;
        Ok(positions_first(frame.tensor()?, dims, dim))
    })))
}

pub(super) fn gather<T: Real>(
    left: FlexTensor,
    rights: &[FlexTensor],
    job: &Job,
) -> Result<(Vec<FlexTensor>, FlexTensor), Error> {
    let together = || {
        let whole = whole(&left, job)?;
        let made = rights.iter().map(|right| multiply_own::<T>(whole.clone(), right)).collect();
        Ok((made, whole))
    };
    if !job.overlap.runs_in_background(&job.comm) {
        return together();
    }
    let (dim, shape) = (job.dim, left.shape());
    let unit = unit_of(&left, dim);
    let (outer, features) = (shape.as_slice()[..dim].iter().product::<usize>(), shape[shape.num_dims() - 1]);
    let positions = total_positions(shape[dim], job)?;
    let factors: Vec<Factor<'_, T>> = rights.iter().map(|right| Factor::new(Matrix::of(right))).collect();
    let row_work = features * factors.iter().map(Factor::columns).sum::<usize>();
    let (rows, row_bytes) = (outer * positions * unit, features * size_of::<T>());
    // Beside all of them there are the rows that this rank has.
    let schedule = job.schedule(Size { rows, row_bytes, row_work, beside: true, on_device: false });
    if !schedule.background {
        return together();
    }
    let (size, rank) = (job.comm.size(), job.comm.rank());
    let deal = Deal::new(positions, size, rank, schedule);
    let (brought, width) = (with_positions_first(&left, dim), outer * unit * features);
    let mut flying = Vec::with_capacity(schedule.chunks);
    for chunk in 0..schedule.chunks {
        let (own, brought) = (deal.within_own(chunk), brought.clone());
        let (elements, dims) = (deal.total(chunk) * width, [own.len(), width]);
        flying.push(job.comm.start(move |comm| {
            let mut slots = vec![T::default(); elements];
            let rows = elements_of::<T>(&brought);
            comm.all_gather_matrix(&rows[own.start * width..own.end * width], dims, &mut slots)?;
            Ok(slots)
        }));
    }
    let mut whole = room::<T>(&[positions, width]);
    let mut made: Vec<_> =
        factors.iter().map(|right| room::<T>(&dims_of(&left, dim, positions, right.columns()))).collect();
    {
        let gathered: &mut [T] = whole.storage_mut();
        let mut outs: Vec<&mut [T]> = made.iter_mut().map(|made| made.storage_mut()).collect();
        let mut place = |at: Range<usize>, slot: &[T]| {
            gathered[at.start * width..at.end * width].copy_from_slice(slot);
            for (right, out) in factors.iter().zip(&mut outs) {
                write_slot(slot, [outer, unit, features], right, out, [at.start, positions]);
            }
        };
        // What this rank has needs no waiting.
        let own = part(positions, size, rank);
        place(own.clone(), &elements_of::<T>(&brought)[..own.len() * width]);
        for (chunk, slots) in flying.into_iter().enumerate() {
            let slots = slots.wait()?;
            let mut rest = slots.as_slice();
            for (from, positions) in deal.of_all(chunk).enumerate() {
                let (slot, behind) = rest.split_at(positions.len() * width);
                if from != rank {
                    place(positions, slot);
                }
                rest = behind;
            }
        }
    }
    Ok((made, positions_first(whole, dims_of(&left, dim, positions, features), dim)))
}

/// Multiplies gathered positions, of which the first is number `at` of `positions`, into their places among the outer ones.
fn write_slot<T: Real>(
    slot: &[T],
    [outer, unit, features]: [usize; 3],
    right: &Factor<'_, T>,
    out: &mut [T],
    [at, positions]: [usize; 2],
) {
    let columns = right.columns();
    let count = slot.len().checked_div(outer * unit * features).unwrap_or(0);
    for place in 0..outer {
        let Some(out) = out.get_mut((place * positions + at) * unit * columns..) else { continue };
        if outer == 1 || unit == 1 {
            let stride = if unit == 1 { outer * features } else { features };
            let rows = slot.get(place * unit * features..).unwrap_or_default();
            let left = Matrix::spread(rows, count * unit, features, stride);
            multiply(&[(left, right)], Place::packed(out, columns));
        } else {
            for position in 0..count {
                let rows = &slot[(position * outer + place) * unit * features..][..unit * features];
                let out = &mut out[position * unit * columns..];
                multiply(&[(Matrix::packed(rows, unit, features), right)], Place::packed(out, columns));
            }
        }
    }
}

/// `[left_0, .., left_(n-1)]`.
fn whole(left: &FlexTensor, job: &Job) -> Result<FlexTensor, Error> {
    let (dim, shape) = (job.dim, left.shape());
    let brought = with_positions_first(left, dim);
    let width: usize = shape.iter().enumerate().filter(|(place, _)| *place != dim).map(|(_, size)| size).product();
    let brought = brought.reshape([shape[dim], width].into());
    let whole = job.comm.all_gather(Tensor::<2>::from_primitive::<Flex>(brought))?;
    let total = whole.dims()[0];
    check_part(job.comm.rank(), shape[dim], total, job)?;
    let unreadable = |problem| Error::invalid(job.name, format!("what was gathered cannot be read: {problem:?}"));
    let whole = whole.try_into_primitive::<Flex>().map_err(unreadable)?;
    Ok(positions_first(whole, dims_of(left, dim, total, shape[shape.num_dims() - 1]), dim))
}

/// A product as a new tensor.
pub(super) fn multiply_own<T: Real>(left: FlexTensor, right: &FlexTensor) -> FlexTensor {
    let dim = left.rank() - 2;
    let left = even(left, dim);
    let (stack, factor) = (Stack::<T>::of(&left, dim), Factor::new(Matrix::of(right)));
    let (rows, columns) = (stack.rows(), factor.columns());
    let mut out = room::<T>(&dims_of(&left, dim, left.shape()[dim], columns));
    let all: &mut [T] = out.storage_mut();
    match stack.flat() {
        Some(left) => multiply(&[(left, &factor)], Place::packed(all, columns)),
        None => {
            for (place, out) in all.chunks_mut((rows * columns).max(1)).enumerate() {
                multiply(&[(stack.matrix(place), &factor)], Place::packed(out, columns));
            }
        }
    }
    out
}

/// `left^T right`, summed over all rows.
pub(super) fn multiply_rows<T: Real>(left: FlexTensor, right: FlexTensor) -> FlexTensor {
    let (dim, of_right) = (left.rank() - 2, right.rank() - 2);
    let (left, right) = (even(left, dim), even(right, of_right));
    let (left, right) = (Stack::<T>::of(&left, dim), Stack::<T>::of(&right, of_right));
    let matrices: Vec<_> = match (left.flat(), right.flat()) {
        (Some(left), Some(right)) => vec![(left.transposed(), Factor::new(right))],
        _ => (0..left.outer).map(|place| (left.matrix(place).transposed(), Factor::new(right.matrix(place)))).collect(),
    };
    let mut out = room::<T>(&[left.columns(), right.columns()]);
    let terms: Vec<_> = matrices.iter().map(|(left, right)| (*left, right)).collect();
    multiply(&terms, Place::packed(out.storage_mut(), right.columns()));
    out
}
