//! Products and their collectives, chunk by chunk.
//!
//! Matrices have rows of `unit` to a position: positions are what the ranks divide among them, as `comm::part` does.

use std::ops::Range;

use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::Tensor;

use super::matrix::{Factor, Matrix, Real, packed_rows, product, room, transposed_product};
use super::window::windows;
use crate::Error;
use crate::comm::{Pending, part};
use crate::tensor_parallel::matmul::deal::{Deal, check_part, total_positions};
use crate::tensor_parallel::matmul::schedule::Size;
use crate::tensor_parallel::matmul::tape::{Form, Job};

/// The product, and what the backward pass needs of the left factor.
pub(super) fn forward<T: Real>(
    x: FlexTensor,
    weight: FlexTensor,
    job: &Job,
) -> Result<(FlexTensor, FlexTensor), Error> {
    let factor = Factor::new(Matrix::<T>::of(&weight));
    match job.form {
        Form::Column => Ok((product(Matrix::of(&x), &factor), x)),
        Form::Row => Ok((multiply_sum(&x, &factor, job, None::<fn()>)?.0, x)),
        Form::RowScatter => Ok((multiply_scatter(&x, &factor, job, None::<fn()>)?.0, x)),
        Form::GatherColumn => gather_multiply(&x, &factor, job),
    }
}

/// The gradients of both factors. What is reduced travels while the gradient of the weight is computed.
pub(super) fn backward<T: Real>(
    gradient: FlexTensor,
    x: FlexTensor,
    weight: FlexTensor,
    [wants_x, wants_weight]: [bool; 2],
    job: &Job,
) -> Result<[Option<FlexTensor>; 2], Error> {
    let turned = Factor::new(Matrix::<T>::of(&weight).transposed());
    let of_weight = |gradient: &FlexTensor| wants_weight.then(|| transposed_product::<T>(&x, gradient));
    match job.form {
        Form::Row => Ok([wants_x.then(|| product(Matrix::of(&gradient), &turned)), of_weight(&gradient)]),
        Form::RowScatter if wants_x => {
            let (of_x, whole) = gather_multiply(&gradient, &turned, job)?;
            Ok([Some(of_x), of_weight(&whole)])
        }
        Form::RowScatter => Ok([None, of_weight(&gather(&gradient, job)?)]),
        Form::Column | Form::GatherColumn if !wants_x => Ok([None, of_weight(&gradient)]),
        Form::Column => {
            let of_weight = wants_weight.then_some(|| transposed_product::<T>(&x, &gradient));
            let (of_x, of_weight) = multiply_sum(&gradient, &turned, job, of_weight)?;
            Ok([Some(of_x), of_weight])
        }
        Form::GatherColumn => {
            let of_weight = wants_weight.then_some(|| transposed_product::<T>(&x, &gradient));
            let (of_x, of_weight) = multiply_scatter(&gradient, &turned, job, of_weight)?;
            Ok([Some(of_x), of_weight])
        }
    }
}

/// `sum over r of left_r * right_r`, and what `beside` makes while the last chunk travels.
fn multiply_sum<T: Real, R>(
    left: &FlexTensor,
    right: &Factor<'_, T>,
    job: &Job,
    beside: Option<impl FnOnce() -> R>,
) -> Result<(FlexTensor, Option<R>), Error> {
    let (left, columns) = (Matrix::of(left), right.columns());
    let (row_bytes, row_work) = (columns * size_of::<T>(), columns * left.columns);
    let schedule =
        job.schedule(Size { rows: left.rows, row_bytes, row_work, beside: beside.is_some(), on_device: false });
    let mut sum = room::<T>(left.rows, columns);
    let dims = |rows: &Range<usize>| [rows.len(), columns];
    if !schedule.background {
        let mut rest: &mut [T] = sum.storage_mut();
        for rows in schedule.cut(left.rows) {
            let (chunk, behind) = rest.split_at_mut(rows.len() * columns);
            right.multiply(left.rows(rows.clone()), chunk);
            job.comm.all_reduce_matrix(chunk, dims(&rows))?;
            rest = behind;
        }
        return Ok((sum, beside.map(|make| make())));
    }
    let (frame, chunks) = windows::<T>(sum, schedule.cut(left.rows).map(|rows| rows.len() * columns));
    let mut flying = Vec::with_capacity(schedule.chunks);
    for (rows, mut chunk) in schedule.cut(left.rows).zip(chunks) {
        right.multiply(left.rows(rows.clone()), &mut chunk);
        let dims = dims(&rows);
        flying.push(job.comm.start(move |comm| comm.all_reduce_matrix(&mut chunk, dims)));
    }
    let made = beside.map(|make| make());
    flying.into_iter().try_for_each(Pending::wait)?;
    Ok((frame.tensor()?, made))
}

/// This rank's positions of `sum over r of left_r * right_r`, and what `beside` makes while the last chunk travels.
///
/// A chunk has some of the positions of every rank, so that each gets the next ones of its own.
fn multiply_scatter<T: Real, R>(
    left: &FlexTensor,
    right: &Factor<'_, T>,
    job: &Job,
    beside: Option<impl FnOnce() -> R>,
) -> Result<(FlexTensor, Option<R>), Error> {
    let (left, columns) = (Matrix::of(left), right.columns());
    let (row_bytes, row_work) = (columns * size_of::<T>(), columns * left.columns);
    let schedule =
        job.schedule(Size { rows: left.rows, row_bytes, row_work, beside: beside.is_some(), on_device: false });
    let deal = Deal::new(left.rows / job.unit, job.comm.size(), job.comm.rank(), schedule);
    let row = job.unit * columns;
    let mut scattered = room::<T>(deal.own() * job.unit, columns);
    let fill = |chunk: usize, partial: &mut [T]| {
        let mut rest = partial;
        for positions in deal.of_all(chunk) {
            let (slot, behind) = rest.split_at_mut(positions.len() * row);
            right.multiply(left.rows(positions.start * job.unit..positions.end * job.unit), slot);
            rest = behind;
        }
    };
    if !schedule.background {
        let mut partial = vec![T::default(); (0..schedule.chunks).map(|c| deal.total(c)).max().unwrap_or(0) * row];
        let mut rest: &mut [T] = scattered.storage_mut();
        for chunk in 0..schedule.chunks {
            let partial = &mut partial[..deal.total(chunk) * row];
            fill(chunk, partial);
            let (own, behind) = rest.split_at_mut(deal.of_own(chunk).len() * row);
            job.comm.reduce_scatter_matrix(partial, [deal.total(chunk), row], own)?;
            rest = behind;
        }
        return Ok((scattered, beside.map(|make| make())));
    }
    let (frame, owns) = windows::<T>(scattered, (0..schedule.chunks).map(|chunk| deal.of_own(chunk).len() * row));
    let mut flying = Vec::with_capacity(schedule.chunks);
    for (chunk, mut own) in owns.into_iter().enumerate() {
        let mut partial = vec![T::default(); deal.total(chunk) * row];
        fill(chunk, &mut partial);
        let dims = [deal.total(chunk), row];
        flying.push(job.comm.start(move |comm| comm.reduce_scatter_matrix(&partial, dims, &mut own)));
    }
    let made = beside.map(|make| make());
    flying.into_iter().try_for_each(Pending::wait)?;
    Ok((frame.tensor()?, made))
}

/// `[left_0, .., left_(n-1)] * right`, and the gathered left factor.
fn gather_multiply<T: Real>(
    left: &FlexTensor,
    right: &Factor<'_, T>,
    job: &Job,
) -> Result<(FlexTensor, FlexTensor), Error> {
    if !job.overlap.runs_in_background(&job.comm) {
        let whole = gather(left, job)?;
        return Ok((product(Matrix::of(&whole), right), whole));
    }
    let (width, unit, columns) = (left.shape()[1], job.unit, right.columns());
    let positions = total_positions(left.shape()[0] / unit, job)?;
    let (row_bytes, row_work) = (width * size_of::<T>(), columns * width);
    // Beside all of them there are the rows that this rank has.
    let schedule = job.schedule(Size { rows: positions * unit, row_bytes, row_work, beside: true, on_device: false });
    if !schedule.background {
        let whole = gather(left, job)?;
        return Ok((product(Matrix::of(&whole), right), whole));
    }
    let deal = Deal::new(positions, job.comm.size(), job.comm.rank(), schedule);
    let brought = left.to_contiguous();
    let mut flying = Vec::with_capacity(schedule.chunks);
    for chunk in 0..schedule.chunks {
        let (own, brought) = (deal.within_own(chunk), brought.clone());
        let (elements, dims) = (deal.total(chunk) * unit * width, [own.len(), unit * width]);
        flying.push(job.comm.start(move |comm| {
            let mut slots = vec![T::default(); elements];
            let rows = packed_rows::<T>(&brought);
            comm.all_gather_matrix(&rows[own.start * unit * width..own.end * unit * width], dims, &mut slots)?;
            Ok(slots)
        }));
    }
    let (mut whole, mut made) = (room::<T>(positions * unit, width), room::<T>(positions * unit, columns));
    let (gathered, out): (&mut [T], &mut [T]) = (whole.storage_mut(), made.storage_mut());
    let mut place = |positions: Range<usize>, rows: &[T]| {
        let rows_of = |width: usize| positions.start * unit * width..positions.end * unit * width;
        gathered[rows_of(width)].copy_from_slice(rows);
        right.multiply(Matrix::packed(rows, positions.len() * unit, width), &mut out[rows_of(columns)]);
    };
    // What this rank has needs no waiting.
    place(part(positions, job.comm.size(), job.comm.rank()), &packed_rows::<T>(&brought));
    for (chunk, slots) in flying.into_iter().enumerate() {
        let slots = slots.wait()?;
        let mut rest = slots.as_slice();
        for (rank, positions) in deal.of_all(chunk).enumerate() {
            let (slot, behind) = rest.split_at(positions.len() * unit * width);
            if rank != job.comm.rank() {
                place(positions, slot);
            }
            rest = behind;
        }
    }
    Ok((made, whole))
}

/// `[left_0, .., left_(n-1)]`.
fn gather(left: &FlexTensor, job: &Job) -> Result<FlexTensor, Error> {
    let (width, unit) = (left.shape()[1], job.unit);
    let positions = left.shape()[0] / unit;
    let brought = left.to_contiguous().reshape([positions, unit * width].into());
    let whole = job.comm.all_gather(Tensor::<2>::from_primitive::<Flex>(brought))?;
    let total = whole.dims()[0];
    check_part(job.comm.rank(), positions, total, job)?;
    let unreadable = |problem| Error::invalid(job.name, format!("what was gathered cannot be read: {problem:?}"));
    let whole = whole.try_into_primitive::<Flex>().map_err(unreadable)?;
    Ok(whole.reshape([total * unit, width].into()))
}
