//! Operations that move elements about.

use burn::tensor::{Shape, Slice};
use burn_ir::{OperationIr, TensorIr};

use super::option::{ShardingOption, each_dim};
use crate::graph::operation::{Form, ranges_mut};
use crate::layout::Layout::{Partial, Sharded};

pub(super) fn sharding_options(form: Form<'_>, degree: usize) -> Vec<ShardingOption> {
    let moved = |input: &TensorIr, to: &dyn Fn(usize) -> Option<usize>| {
        let mut found =
            each_dim(&input.shape, |dim| to(dim).map(|to| ShardingOption::new([Sharded(dim)], Sharded(to))));
        if !input.dtype.is_bool() {
            found.push(ShardingOption::new([Partial], Partial));
        }
        found
    };
    match form {
        Form::Reshape(op) => moved(&op.input, &|dim| reshaped(&op.input.shape, &op.out.shape, dim, degree)),
        Form::SwapDims(op) => moved(&op.input, &|dim| {
            Some(if dim == op.dim1 {
                op.dim2
            } else if dim == op.dim2 {
                op.dim1
            } else {
                dim
            })
        }),
        Form::Permute(op) => moved(&op.input, &|dim| op.axes.iter().position(|axis| *axis == dim)),
        Form::Expand(op) => {
            let before = op.out.shape.num_dims().saturating_sub(op.input.shape.num_dims());
            moved(&op.input, &|dim| (op.input.shape[dim] == op.out.shape[dim + before]).then_some(dim + before))
        }
        Form::Flip(op) => moved(&op.input, &|dim| (!op.axes.contains(&dim)).then_some(dim)),
        Form::Slice(op) => moved(&op.tensor, &|dim| whole(&op.ranges, &op.tensor.shape, dim).then_some(dim)),
        Form::SliceAssign(op) => each_dim(&op.tensor.shape, |dim| {
            whole(&op.ranges, &op.tensor.shape, dim).then(|| ShardingOption::new([Sharded(dim); 2], Sharded(dim)))
        }),
        Form::RepeatDim(op) => moved(&op.tensor, &|dim| (dim != op.dim).then_some(dim)),
        Form::Cat(op) => each_dim(&op.out.shape, |dim| {
            (dim != op.dim).then(|| ShardingOption::of(vec![Sharded(dim); op.tensors.len()], Sharded(dim)))
        }),
        _ => Vec::new(),
    }
}

/// Where a split dim goes in a reshape: to the dim that begins at the same place and can be split too, as the `d` of
/// `[b, s, d]` goes to the heads of `[b, s, h, d / h]`.
fn reshaped(from: &Shape, to: &Shape, dim: usize, degree: usize) -> Option<usize> {
    let before: usize = from.as_slice()[..dim].iter().product();
    let mut product = 1;
    for (place, size) in to.as_slice().iter().enumerate() {
        if product == before && size.is_multiple_of(degree) {
            return Some(place);
        }
        product *= size;
    }
    None
}

/// Whether the ranges take all of a dim, in order.
pub(in super::super) fn whole(ranges: &[Slice], shape: &Shape, dim: usize) -> bool {
    let size = shape[dim] as isize;
    ranges.get(dim).is_none_or(|range| range.step == 1 && range.start == 0 && range.end.is_none_or(|end| end == size))
}

/// Makes the ranges over a split dim, which take all of it, take all of the local one.
pub(in super::super) fn take_all(op: &mut OperationIr, dim: usize) {
    if let Some((ranges, shape)) = ranges_mut(op)
        && let Some(range) = ranges.get_mut(dim)
    {
        *range = Slice::new(0, Some(shape[dim] as isize), 1);
    }
}
