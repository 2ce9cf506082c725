//! All-to-all from parts along one dim to parts along another, as DeepSpeed-Ulysses does it (arXiv:2309.14509).
//!
//! Rank `r` holds all of dim `split` and its part of dim `join`; afterwards it holds its part of `split` and all of
//! `join`. With `n` ranks, `w` elements along `split`, and `j_r` along `join`, it lays out one block for every rank:
//!
//! ```text
//! x: [.., w, .., j_r, ..]  ->  [n * j_r, ceil(w / n), rest..]
//! ```
//!
//! The first dim, which the collective cuts into `n`, so is a multiple of `n` on every rank although the `j_r` may
//! differ, and the dims behind it are the same on all. When `n` does not divide `w`, the blocks of the shorter parts
//! end in a slice of zeros. What arrives lies in the order of `join`:
//!
//! ```text
//! [j_0 + j_1 + .., ceil(w / n), rest..]
//! ```

use super::dim_order::{first, inverse};
use crate::Error;
use crate::comm::{Communicator, check_part, part};
use crate::tensor::PlainTensor;

pub(super) fn exchange(
    name: &'static str,
    tensor: PlainTensor,
    split: usize,
    join: usize,
    comm: &Communicator,
) -> Result<PlainTensor, Error> {
    let order = first([join, split], tensor.rank());
    let turned = tensor.permute(&order);
    let dims = turned.shape().to_vec();
    let (brought, width, size) = (dims[0], dims[1], comm.size());
    let blocks = if width % size == 0 { cut_evenly(turned, size)? } else { cut_padded(turned, size)? };
    // The blocks tell the width only up to padding; `agreed` tells the rest.
    let arrived = comm.all_to_all_agreed(blocks, width as u64)?;
    check_part(name, comm, comm.rank(), (brought, arrived.shape()[0]), format_args!("dim {join}"))?;
    let own = part(width, size, comm.rank()).len();
    let own = if arrived.shape()[1] == own { arrived } else { arrived.narrow(1, 0..own).packed()? };
    Ok(own.permute(&inverse(&order)))
}

/// `[j, n * share, rest..]` to `[n * j, share, rest..]`, in one pass over the elements.
fn cut_evenly(turned: PlainTensor, size: usize) -> Result<PlainTensor, Error> {
    let mut dims = turned.shape().to_vec();
    let order = first([1, 0], dims.len() + 1);
    (dims[0], dims[1]) = (dims[0] * size, dims[1] / size);
    Ok(turned.split_dim(1, size)?.permute(&order).reshape(dims))
}

/// `[j, w, rest..]` to `[n * j, ceil(w / n), rest..]`, with a slice of zeros behind the parts that are one shorter.
fn cut_padded(turned: PlainTensor, size: usize) -> Result<PlainTensor, Error> {
    let mut dims = turned.shape().to_vec();
    let (width, share) = (dims[1], dims[1].div_ceil(size));
    dims[1] = 1;
    let zeros = PlainTensor::zeros(dims, turned.dtype(), &turned.device());
    let blocks = (0..size).map(|rank| {
        let part = part(width, size, rank);
        let (len, block) = (part.len(), turned.clone().narrow(1, part));
        match len {
            len if len == share => Ok(block),
            0 => Ok(zeros.clone()),
            _ => PlainTensor::cat(vec![block, zeros.clone()], 1),
        }
    });
    PlainTensor::cat(blocks.collect::<Result<_, Error>>()?, 0)
}
