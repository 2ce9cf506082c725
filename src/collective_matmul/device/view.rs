//! Buffers of a device as matrices: views without copies where the device permits them.

use std::ops::Range;

use burn::backend::tensor::FloatTensor;
use burn::tensor::{Shape, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::ops::numeric::zeros_client;
use burn_cubecl::ops::permute;
use burn_cubecl::{Cube, CubeBackend};

use crate::Error;
use crate::comm::DeviceTensor;
use crate::comm::device::{from_device, to_device};

/// The buffer behind a tensor. Operations that burn has delayed are enqueued; the strides stay as they are.
pub(super) fn resolved(tensor: FloatTensor<Cube>) -> DeviceTensor {
    let client = tensor.client.clone();
    client.resolve_tensor_float::<CubeBackend>(tensor)
}

/// The way back.
pub(super) fn fused(tensor: DeviceTensor) -> FloatTensor<Cube> {
    let tensor: Tensor<2> = from_device(tensor);
    tensor.try_into_primitive::<Cube>().expect("it was made of this backend's primitive")
}

/// Rows and columns.
pub(super) fn dims(matrix: &DeviceTensor) -> [usize; 2] {
    let shape = matrix.meta.shape();
    [shape[0], shape[1]]
}

pub(super) fn add(a: DeviceTensor, b: DeviceTensor) -> DeviceTensor {
    burn_cubecl::ops::numeric::add(a, b)
}

pub(super) fn transposed(matrix: DeviceTensor) -> DeviceTensor {
    permute(matrix, &[1, 0])
}

/// A matrix whose values are not set.
pub(super) fn empty_matrix(like: &DeviceTensor, [rows, columns]: [usize; 2]) -> DeviceTensor {
    let buffer = like.client.empty((rows * columns * like.dtype.size()).max(1));
    let shape = Shape::from([rows, columns]);
    DeviceTensor::new_contiguous(like.client.clone(), like.device.clone(), shape, buffer, like.dtype)
}

/// Some rows of a matrix: a view if it begins and ends on the alignment of the device, else a copy.
pub(super) fn rows(matrix: &DeviceTensor, rows: Range<usize>) -> DeviceTensor {
    let [all, columns] = dims(matrix);
    match rows {
        rows if rows.len() == all => matrix.clone(),
        rows if rows.is_empty() => empty_matrix(matrix, [0, columns]),
        rows => burn_cubecl::kernel::slice(matrix.clone(), &[rows, 0..columns]),
    }
}

/// Whether [`rows`] of a contiguous matrix are a view, so that what is written to them is written to the matrix.
fn is_window(matrix: &DeviceTensor, rows: &Range<usize>) -> bool {
    let [all, columns] = dims(matrix);
    let alignment = matrix.client.properties().memory.alignment as usize;
    let aligned = |rows: usize| (rows * columns * matrix.dtype.size()).is_multiple_of(alignment);
    rows.len() == all || aligned(rows.start) && aligned(all - rows.end)
}

/// `left * right`, written to `out` if there is one.
fn multiply_into(left: DeviceTensor, right: DeviceTensor, out: Option<DeviceTensor>) -> Result<DeviceTensor, Error> {
    let ([m, k], [_, n]) = (dims(&left), dims(&right));
    let dtype = left.dtype;
    matmul(left, right, out, MatmulStrategy::default(), dtype).map_err(|problem| {
        Error::invalid("a sharded product", format!("no kernel of this device multiplies {m} x {k} x {n}: {problem:?}"))
    })
}

/// `left * right` as a new matrix.
pub(super) fn multiply(left: DeviceTensor, right: &DeviceTensor) -> Result<DeviceTensor, Error> {
    let ([m, k], [_, n]) = (dims(&left), dims(right));
    if m * n == 0 {
        return Ok(empty_matrix(&left, [m, n]));
    }
    if k == 0 {
        return Ok(zeros_client(left.client, left.device, Shape::from([m, n]), left.dtype));
    }
    multiply_into(left, right.clone(), None)
}

/// The products of several matrices, one behind the other: each in its window of one buffer, if all windows can be
/// written.
pub(super) fn multiply_all(lefts: Vec<DeviceTensor>, right: &DeviceTensor) -> Result<DeviceTensor, Error> {
    let (columns, inner) = (dims(right)[1], dims(right)[0]);
    let mut places = Vec::with_capacity(lefts.len());
    let mut total = 0;
    for left in &lefts {
        places.push(total..total + dims(left)[0]);
        total += dims(left)[0];
    }
    let out = empty_matrix(right, [total, columns]);
    if inner == 0 || columns == 0 || !places.iter().all(|place| place.is_empty() || is_window(&out, place)) {
        let made = lefts.into_iter().map(|left| multiply(left, right)).collect::<Result<Vec<_>, _>>()?;
        return stacked(made);
    }
    for (left, place) in lefts.into_iter().zip(places).filter(|(_, place)| !place.is_empty()) {
        multiply_into(left, right.clone(), Some(rows(&out, place)))?;
    }
    Ok(out)
}

/// Matrices one behind the other.
pub(super) fn stacked(mut matrices: Vec<DeviceTensor>) -> Result<DeviceTensor, Error> {
    let mut filled: Vec<_> = matrices.iter().filter(|matrix| dims(matrix)[0] > 0).cloned().collect();
    match filled.len() {
        0 => matrices.pop().ok_or_else(|| Error::invalid("a sharded product", "it has no chunk")),
        1 => Ok(into_contiguous(filled.remove(0))),
        _ => to_device(Tensor::cat(filled.into_iter().map(from_device::<2, burn::tensor::Float>).collect(), 0)),
    }
}
