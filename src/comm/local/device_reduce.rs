//! Reduces the tensors of the ranks on a device, with one kernel.
//!
//! A unit has one element: it reads that of every rank, in rank order, and writes the result. So every buffer is read
//! once and only the result is written. Floats of 16 bits are reduced in `f32` and rounded once: bit for bit as in
//! `comm::reduce` on the host.

use std::ops::Range;

use burn::backend::cubecl::dtype_to_storage_type;
use burn::tensor::{BoolStore, DType, Shape};
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use crate::Error;
use crate::comm::{DeviceTensor, ReduceOp};

/// Folds the same elements of contiguous tensors of one dtype, which are all on the device of the first, into elements
/// of `dtype`: that of the tensors, or of 16 bits where they are of `f32`. Factors have been applied.
///
/// # Errors
/// [`Error::InvalidArgument`] if there is no tensor.
pub(super) fn fold(
    shards: &[DeviceTensor],
    elements: Range<usize>,
    op: ReduceOp,
    dtype: DType,
) -> Result<DeviceTensor, Error> {
    let none = || Error::invalid("a reduction on a device", "there is nothing to reduce");
    let like = shards.first().ok_or_else(none)?;
    // The bindings that a kernel has beside its result, the partial reduction and its own arguments. The partial result
    // of so many tensors goes to the next kernel in the wide dtype.
    let most = like.client.properties().hardware.max_bindings.clamp(5, 64) as usize - 3;
    let ends = number(like.dtype);
    let between = match ends {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    };
    let mut total: Option<DeviceTensor> = None;
    for (round, some) in shards.chunks(most).enumerate() {
        let last = (round + 1) * most >= shards.len();
        let folded = empty_buffer(like, elements.len(), if last { number(dtype) } else { between });
        if !elements.is_empty() {
            let ranks = if last && op == ReduceOp::Mean { shards.len() as u32 } else { 0 };
            launch(total.take(), some, &folded, elements.start, [between, ends], op, ranks);
        }
        total = Some(folded);
    }
    total.map(|total| with_dtype(total, dtype)).ok_or_else(none)
}

/// The dtype that kernels compute in: bools are numbers.
fn number(dtype: DType) -> DType {
    match dtype {
        DType::Bool(BoolStore::U32) => DType::U32,
        DType::Bool(_) => DType::U8,
        dtype => dtype,
    }
}

fn with_dtype(tensor: DeviceTensor, dtype: DType) -> DeviceTensor {
    let shape = Shape::from(tensor.meta.shape().to_vec());
    DeviceTensor::new_contiguous(tensor.client, tensor.device, shape, tensor.handle, dtype)
}

/// A buffer whose values are not set.
fn empty_buffer(like: &DeviceTensor, elements: usize, dtype: DType) -> DeviceTensor {
    let buffer = like.client.empty((elements * dtype.size()).max(1));
    DeviceTensor::new_contiguous(like.client.clone(), like.device.clone(), Shape::from([elements]), buffer, dtype)
}

#[allow(clippy::too_many_arguments)]
fn launch(
    before: Option<DeviceTensor>,
    shards: &[DeviceTensor],
    folded: &DeviceTensor,
    first: usize,
    [between, ends]: [DType; 2],
    op: ReduceOp,
    ranks: u32,
) {
    let elements = folded.meta.shape()[0];
    let (client, dim) = (&folded.client, CubeDim::new(&folded.client, elements));
    let count = calculate_cube_count_elemwise(client, elements, dim);
    let flat = |tensor: &DeviceTensor| crate::comm::device::flat(tensor.clone()).into_tensor_arg();
    let (before, shards) = (before.iter().map(flat), shards.iter().map(flat));
    let (out, op) = (folded.clone().into_tensor_arg(), operator(op));
    let [wide, narrow, result] = [between, ends, folded.dtype].map(dtype_to_storage_type);
    match ends.is_float() {
        true => {
            let (before, shards) = (before.collect(), shards.collect());
            floats::launch(client, count, dim, before, shards, out, first, op, ranks, wide, narrow, result);
        }
        false => {
            let (before, shards) = (before.collect(), shards.collect());
            integers::launch(client, count, dim, before, shards, out, first, op, narrow);
        }
    }
}

// The numbers of the reductions in the kernels.
const SUM: u32 = 0;
const PRODUCT: u32 = 1;
const MAX: u32 = 2;
const MIN: u32 = 3;

fn operator(op: ReduceOp) -> u32 {
    match op {
        ReduceOp::Product => PRODUCT,
        ReduceOp::Max => MAX,
        ReduceOp::Min => MIN,
        ReduceOp::Sum | ReduceOp::Mean | ReduceOp::PreMulSum(_) => SUM,
    }
}

#[cube]
fn combine<A: Numeric>(total: A, next: A, #[comptime] op: u32) -> A {
    if comptime!(op == PRODUCT) {
        total * next
    } else if comptime!(op == MAX) {
        select(total > next, total, next)
    } else if comptime!(op == MIN) {
        select(total < next, total, next)
    } else {
        total + next
    }
}

/// Reduces inputs of `E` in `A`, from element `first` on, after the partial reduction, of which there is one or none.
/// Divides by `ranks`, if that is not 0.
#[cube(launch)]
#[allow(clippy::too_many_arguments)]
fn floats<A: Float, E: Float, O: Float>(
    before: &Sequence<OwnedTensor<A>>,
    shards: &Sequence<OwnedTensor<E>>,
    folded: &mut Tensor<O>,
    first: usize,
    #[comptime] op: u32,
    #[comptime] ranks: u32,
    #[define(A)] _wide: ElemType,
    #[define(E)] _narrow: ElemType,
    #[define(O)] _result: ElemType,
) {
    if ABSOLUTE_POS >= folded.len() {
        terminate!();
    }
    let place = first + ABSOLUTE_POS;
    let mut total = if comptime!(before.len() == 1) {
        before[0].as_slice()[ABSOLUTE_POS]
    } else {
        A::cast_from(shards[0].as_slice()[place])
    };
    let from = comptime!(1usize - before.len());
    #[unroll]
    for rank in from..comptime!(shards.len()) {
        let next = A::cast_from(shards[rank].as_slice()[place]);
        let combined = combine::<A>(total, next, op);
        // As on the host: a NaN in the total stays, and one in an input replaces it. A NaN in `f64` is one in `f32`.
        total = select(f32::cast_from(total).is_nan(), total, combined);
    }
    if comptime!(ranks > 0) {
        total /= A::cast_from(ranks);
    }
    folded[ABSOLUTE_POS] = O::cast_from(total);
}

/// The same of integers, which wrap around.
#[cube(launch)]
fn integers<E: Int>(
    before: &Sequence<OwnedTensor<E>>,
    shards: &Sequence<OwnedTensor<E>>,
    folded: &mut Tensor<E>,
    first: usize,
    #[comptime] op: u32,
    #[define(E)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= folded.len() {
        terminate!();
    }
    let place = first + ABSOLUTE_POS;
    let mut total =
        if comptime!(before.len() == 1) { before[0].as_slice()[ABSOLUTE_POS] } else { shards[0].as_slice()[place] };
    let from = comptime!(1usize - before.len());
    #[unroll]
    for rank in from..comptime!(shards.len()) {
        let next = shards[rank].as_slice()[place];
        total = combine::<E>(total, next, op);
    }
    folded[ABSOLUTE_POS] = total;
}
