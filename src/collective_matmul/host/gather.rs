//! Products of a left factor that is gathered: of this rank's rows at once, of other ranks' rows as they arrive.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::Tensor;

use super::matrix::{Matrix, OutputRows, PreparedFactor, Real, elements_of, empty_tensor, multiply};
use super::product::{dims_of, multiply_own, positions_first, unit_of, with_positions_first};
use crate::Error;
use crate::collective_matmul::ProductCall;
use crate::collective_matmul::chunk_plan::{ChunkPlan, check_positions, total_positions};
use crate::collective_matmul::schedule::Size;
use crate::comm::part;
use crate::tensor::Pool;

pub(super) fn gather<T: Real>(
    left: FlexTensor,
    rights: &[FlexTensor],
    call: &ProductCall,
) -> Result<(Vec<FlexTensor>, FlexTensor), Error> {
    let together = || {
        let whole = whole(&left, call)?;
        let made = rights.iter().map(|right| multiply_own::<T>(whole.clone(), right)).collect();
        Ok((made, whole))
    };
    if !call.overlap.runs_in_background(&call.comm) {
        return together();
    }
    let (dim, shape) = (call.dim, left.shape());
    let unit = unit_of(&left, dim);
    let (outer, features) = (shape.as_slice()[..dim].iter().product::<usize>(), shape[shape.num_dims() - 1]);
    let positions = total_positions(shape[dim], call)?;
    let factors: Vec<PreparedFactor<'_, T>> =
        rights.iter().map(|right| PreparedFactor::new(Matrix::of(right))).collect();
    let split = factors.iter().map(PreparedFactor::columns).sum();
    let (rows, row_bytes) = (outer * positions * unit, features * size_of::<T>());
    // Beside all of them there are the rows that this rank has.
    let schedule = call.schedule(Size { rows, row_bytes, across: features, split, beside: true, on_device: false })?;
    if !schedule.background {
        return together();
    }
    let (size, rank) = (call.comm.size(), call.comm.rank());
    let plan = ChunkPlan::new(positions, size, rank, schedule);
    let (brought, width) = (with_positions_first(&left, dim), outer * unit * features);
    let pool = Pool::of_thread();
    let mut in_flight = Vec::with_capacity(schedule.chunks);
    for chunk in 0..schedule.chunks {
        let (own, brought) = (plan.within_own(chunk), brought.clone());
        let dims = [own.len(), width];
        let mut slots = empty_tensor::<T>(&[plan.total(chunk), width], &pool);
        in_flight.push(call.comm.start(move |comm| {
            let rows = elements_of::<T>(&brought);
            comm.all_gather_matrix(&rows[own.start * width..own.end * width], dims, slots.storage_mut())?;
            Ok(slots)
        }));
    }
    let mut whole = empty_tensor::<T>(&[positions, width], &pool);
    let dims_of_made = |right: &PreparedFactor<'_, T>| dims_of(&left, dim, positions, right.columns());
    let mut made: Vec<_> = factors.iter().map(|right| empty_tensor::<T>(&dims_of_made(right), &pool)).collect();
    {
        let gathered: &mut [T] = whole.storage_mut();
        let mut outs: Vec<&mut [T]> = made.iter_mut().map(|made| made.storage_mut()).collect();
        let mut place = |at: Range<usize>, slot: &[T]| {
            gathered[at.start * width..at.end * width].copy_from_slice(slot);
            for (right, out) in factors.iter().zip(&mut outs) {
                write_slot(slot, [outer, unit, features], right, out, (at.clone(), positions), &pool);
            }
        };
        // What this rank has needs no waiting.
        let own = part(positions, size, rank);
        place(own.clone(), &elements_of::<T>(&brought)[..own.len() * width]);
        for (chunk, slots) in in_flight.into_iter().enumerate() {
            let slots = slots.wait()?;
            let mut rest = slots.storage::<T>();
            for (from, positions) in plan.of_all(chunk).enumerate() {
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

/// Multiplies gathered positions, which are `at` of `positions`, into their places among the outer ones.
fn write_slot<T: Real>(
    slot: &[T],
    [outer, unit, features]: [usize; 3],
    right: &PreparedFactor<'_, T>,
    out: &mut [T],
    (at, positions): (Range<usize>, usize),
    pool: &Arc<Pool>,
) {
    let columns = right.columns();
    // Of them, since without features the slot is empty, and what is made still zeros.
    let count = at.len();
    for place in 0..outer {
        let Some(out) = out.get_mut((place * positions + at.start) * unit * columns..) else { continue };
        if outer == 1 || unit == 1 {
            let stride = if unit == 1 { outer * features } else { features };
            let rows = slot.get(place * unit * features..).unwrap_or_default();
            let left = Matrix::spread(rows, count * unit, features, stride);
            multiply(&[(left, right)], OutputRows::packed(out, columns), pool);
        } else {
            for position in 0..count {
                let rows = &slot[(position * outer + place) * unit * features..][..unit * features];
                let out = &mut out[position * unit * columns..];
                multiply(&[(Matrix::packed(rows, unit, features), right)], OutputRows::packed(out, columns), pool);
            }
        }
    }
}

/// `[left_0, .., left_(n-1)]`.
fn whole(left: &FlexTensor, call: &ProductCall) -> Result<FlexTensor, Error> {
    let (dim, shape) = (call.dim, left.shape());
    let brought = with_positions_first(left, dim);
    let width: usize = shape.iter().enumerate().filter(|(place, _)| *place != dim).map(|(_, size)| size).product();
    let brought = brought.reshape([shape[dim], width].into());
    let whole = call.comm.all_gather(Tensor::<2>::from_primitive::<Flex>(brought))?;
    let total = whole.dims()[0];
    check_positions(call.comm.rank(), shape[dim], total, call)?;
    let unreadable = |problem| Error::invalid(call.name, format!("what was gathered cannot be read: {problem:?}"));
    let whole = whole.try_into_primitive::<Flex>().map_err(unreadable)?;
    Ok(positions_first(whole, dims_of(left, dim, total, shape[shape.num_dims() - 1]), dim))
}
