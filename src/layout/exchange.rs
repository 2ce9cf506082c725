//! From parts along one dim to parts along another: the all-to-all of DeepSpeed-Ulysses (arXiv:2309.14509).
//!
//! Rank `r` holds all of dim `split` and its part of dim `join`; afterwards it holds its part of `split` and all of `join`.
//! With `n` ranks, `w` elements along `split`, and `j_r` along `join`, it lays out one block for every rank:
//!
//! ```text
//! x: [.., w, .., j_r, ..]  ->  [n * j_r, ceil(w / n), rest..]
//! ```
//!
//! The first dim, which the collective cuts into `n`, so is a multiple of `n` on every rank although the `j_r` may differ,
//! and the dims behind it are the same on all. When `n` does not divide `w`, the blocks of the shorter parts end in a slice
//! of zeros. What arrives lies in the order of `join`:
//!
//! ```text
//! [j_0 + j_1 + .., ceil(w / n), rest..]
//! ```

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::ops::FloatTensorOps;
use burn::tensor::Shape;

use super::moves::{check_part, first, inverse};
use crate::Error;
use crate::comm::{Communicator, Operation, part};

pub(super) fn exchange(
    name: &'static str,
    tensor: FlexTensor,
    split: usize,
    join: usize,
    comm: &Communicator,
) -> Result<FlexTensor, Error> {
    let order = first([join, split], tensor.layout().num_dims());
    let turned = tensor.permute(&order);
    drop(tensor);
    let dims = turned.shape().to_vec();
    let (brought, width, size) = (dims[0], dims[1], comm.size());
    let blocks = if width % size == 0 { cut_evenly(turned, size) } else { cut_padded(&turned, size) };
    // The blocks tell the width only up to padding; `agreed` tells the rest.
    let arrived = comm.through_agreed(Operation::AllToAll, Some(blocks), None, width as u64)?;
    check_part(name, comm, join, brought, arrived.shape()[0])?;
    let own = part(width, size, comm.rank()).len();
    let own = if arrived.shape()[1] == own { arrived } else { arrived.narrow(1, 0, own).to_contiguous() };
    Ok(own.permute(&inverse(&order)))
}

/// `[j, n * share, rest..]` to `[n * j, share, rest..]`, in one pass over the elements.
fn cut_evenly(turned: FlexTensor, size: usize) -> FlexTensor {
    let layout = turned.layout().clone();
    let (dims, strides) = (layout.shape().to_vec(), layout.strides());
    let share = dims[1] / size;
    let shape = [size, dims[0], share].into_iter().chain(dims[2..].iter().copied()).collect::<Vec<_>>();
    let steps = [strides[1] * share as isize, strides[0], strides[1]].into_iter().chain(strides[2..].iter().copied());
    let view = Layout::new(Shape::from(shape), steps.collect(), layout.start_offset());
    join_first_two(turned.with_layout(view).to_contiguous())
}

/// `[j, w, rest..]` to `[n * j, ceil(w / n), rest..]`, with a slice of zeros behind the parts that are one shorter.
fn cut_padded(turned: &FlexTensor, size: usize) -> FlexTensor {
    let mut dims = turned.shape().to_vec();
    let (width, share) = (dims[1], dims[1].div_ceil(size));
    dims[1] = 1;
    let zeros = FlexTensor::zeros(Shape::from(dims), turned.dtype());
    let blocks = (0..size).map(|rank| {
        let part = part(width, size, rank);
        let block = turned.narrow(1, part.start, part.len());
        match part.len() == share {
            true => block,
            false => Flex::float_cat(vec![block, zeros.clone()], 1),
        }
    });
    Flex::float_cat(blocks.collect(), 0)
}

/// `[a, b, rest..]` to `[a * b, rest..]` of a contiguous tensor.
fn join_first_two(tensor: FlexTensor) -> FlexTensor {
    let dims = tensor.shape().to_vec();
    let joined = [dims[0] * dims[1]].into_iter().chain(dims[2..].iter().copied()).collect::<Vec<_>>();
    tensor.with_layout(Layout::contiguous(Shape::from(joined)))
}
