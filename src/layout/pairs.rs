//! The conjugate pairs, under the names that Megatron-LM gave them.
//!
//! In the formulas `x_i` is what rank `i` of `n` brings and `y_i` what it gets; `dx_i`, `dy_i` are the gradients of the
//! loss by them; `part_r` is the [part](crate::comm::part) of rank `r` along the dim, `[a, b]` is concatenation along
//! it.

use burn::tensor::Tensor;

use super::checks::check_dim;
use super::moves::MoveOp;
use super::tape::MovePair;
use crate::Error;
use crate::comm::Communicator;

/// Enters a region where every rank does something else with a replicated tensor: Megatron's *f*.
///
/// ```text
/// forward    y_r = x                      replicated
/// backward   dx_r = dy_0 + .. + dy_(n-1)  partial to replicated: all-reduce
/// ```
///
/// The forward communicates nothing. `x` has any shape, the same on all ranks. The conjugate of [`reduce_from_group`];
/// after one another the two are an all-reduce in both directions.
///
/// Source: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), figure 3.
///
/// # Errors
/// [`Error::UnsupportedDType`] for quantized tensors. In the backward pass those of [`Communicator`], see
/// [`backward`](super::backward).
pub fn copy_to_group<const D: usize>(tensor: Tensor<D>, comm: &Communicator) -> Result<Tensor<D>, Error> {
    MovePair { name: "copy_to_group", forward: MoveOp::Keep, backward: MoveOp::Sum }.apply(tensor, comm)
}

/// Leaves a region where every rank holds a summand of the tensor: Megatron's *g*.
///
/// ```text
/// forward    y_r = x_0 + .. + x_(n-1)     partial to replicated: all-reduce
/// backward   dx_r = dy                    replicated
/// ```
///
/// The sum is made in rank order, bit-identical on all ranks, in place when `x` has no other owner; `f16` and `bf16`
/// are added in `f32`. `x` has any shape, the same on all ranks. The conjugate of [`copy_to_group`].
///
/// Source: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), figure 3.
///
/// # Errors
/// [`Error::UnsupportedDType`] for quantized tensors; those of [`Communicator`].
pub fn reduce_from_group<const D: usize>(tensor: Tensor<D>, comm: &Communicator) -> Result<Tensor<D>, Error> {
    MovePair { name: "reduce_from_group", forward: MoveOp::Sum, backward: MoveOp::Keep }.apply(tensor, comm)
}

/// Takes this rank's part of a replicated tensor along `dim`.
///
/// ```text
/// forward    y_r = part_r(x)              replicated to sharded
/// backward   dx_r = [dy_0, .., dy_(n-1)]  sharded to replicated: all-gather
/// ```
///
/// The forward communicates nothing. `x` is `[.., w, ..]`, `y_r` is `[.., part(w, n, r).len(), ..]`, which is 0 for the
/// last ranks if `w < n`. The conjugate of [`gather_from_group`].
///
/// Source: `_ScatterToModelParallelRegion` of Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053).
///
/// # Errors
/// [`Error::InvalidArgument`] if the tensor has no dim of that number; [`Error::UnsupportedDType`] for quantized
/// tensors. In the backward pass those of [`Communicator`], see [`backward`](super::backward).
pub fn scatter_to_group<const D: usize>(
    tensor: Tensor<D>,
    dim: usize,
    comm: &Communicator,
) -> Result<Tensor<D>, Error> {
    const NAME: &str = "scatter_to_group";
    check_dim(NAME, dim, D)?;
    MovePair { name: NAME, forward: MoveOp::Slice { dim }, backward: MoveOp::Gather { dim } }.apply(tensor, comm)
}

/// Puts the parts of a tensor together along `dim`, for ranks that go on to do **the same** with it.
///
/// ```text
/// forward    y_r = [x_0, .., x_(n-1)]     sharded to replicated: all-gather
/// backward   dx_r = part_r(dy)            replicated to sharded
/// ```
///
/// The backward communicates nothing: each rank has all of `dy` and takes its part. That is right when `dy` is
/// replicated, as when the ranks compute the same loss from the whole output. If they do different things with `y`,
/// each has only its own contribution to `dy`: take [`gather_and_copy_to_group`].
///
/// `x_r` is `[.., part(w, n, r).len(), ..]`, `y` is `[.., w, ..]`. The conjugate of [`scatter_to_group`].
///
/// Source: `_GatherFromModelParallelRegion` of Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053).
///
/// # Errors
/// [`Error::InvalidArgument`] if the tensor has no dim of that number or what this rank brings is not its part;
/// [`Error::UnsupportedDType`] for quantized tensors; those of [`Communicator`].
pub fn gather_from_group<const D: usize>(
    tensor: Tensor<D>,
    dim: usize,
    comm: &Communicator,
) -> Result<Tensor<D>, Error> {
    const NAME: &str = "gather_from_group";
    check_dim(NAME, dim, D)?;
    MovePair { name: NAME, forward: MoveOp::Gather { dim }, backward: MoveOp::Slice { dim } }.apply(tensor, comm)
}

/// Puts the parts of a tensor together along `dim`, for ranks that go on to do **different things** with it: enters a
/// tensor-parallel region from a sequence-parallel one.
///
/// ```text
/// forward    y_r = [x_0, .., x_(n-1)]                sharded to replicated: all-gather
/// backward   dx_r = part_r(dy_0 + .. + dy_(n-1))     partial to sharded: reduce-scatter
/// ```
///
/// It equals [`copy_to_group`] after [`gather_from_group`], with a reduce-scatter in place of an all-reduce. If all
/// ranks do the same with `y`, the gradient comes out `n` times too large: take [`gather_from_group`].
///
/// `x_r` is `[.., part(w, n, r).len(), ..]`, `y` is `[.., w, ..]`. The conjugate of [`reduce_scatter_to_group`].
///
/// Source: *g* of Korthikanti et al., [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2.
///
/// # Errors
/// Those of [`gather_from_group`].
pub fn gather_and_copy_to_group<const D: usize>(
    tensor: Tensor<D>,
    dim: usize,
    comm: &Communicator,
) -> Result<Tensor<D>, Error> {
    const NAME: &str = "gather_and_copy_to_group";
    check_dim(NAME, dim, D)?;
    MovePair { name: NAME, forward: MoveOp::Gather { dim }, backward: MoveOp::SumSlice { dim } }.apply(tensor, comm)
}

/// Sums a tensor of which every rank holds a summand, and leaves each rank its part along `dim`: goes from a
/// tensor-parallel region to a sequence-parallel one.
///
/// ```text
/// forward    y_r = part_r(x_0 + .. + x_(n-1))        partial to sharded: reduce-scatter
/// backward   dx_r = [dy_0, .., dy_(n-1)]             sharded to replicated: all-gather
/// ```
///
/// It equals [`scatter_to_group`] after [`reduce_from_group`] at half the traffic. `x_r` is `[.., w, ..]` on all ranks,
/// `y_r` is `[.., part(w, n, r).len(), ..]`. The conjugate of [`gather_and_copy_to_group`].
///
/// Source: *g-bar* of Korthikanti et al., [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2.
///
/// # Errors
/// [`Error::InvalidArgument`] if the tensor has no dim of that number; [`Error::UnsupportedDType`] for quantized
/// tensors; those of [`Communicator`].
pub fn reduce_scatter_to_group<const D: usize>(
    tensor: Tensor<D>,
    dim: usize,
    comm: &Communicator,
) -> Result<Tensor<D>, Error> {
    const NAME: &str = "reduce_scatter_to_group";
    check_dim(NAME, dim, D)?;
    MovePair { name: NAME, forward: MoveOp::SumSlice { dim }, backward: MoveOp::Gather { dim } }.apply(tensor, comm)
}

/// Turns a tensor sharded along dim `from` into one sharded along dim `to`.
///
/// ```text
/// forward    y_r = part_r along `to` of [x_0, .., x_(n-1)] along `from`       all-to-all
/// backward   dx_r = part_r along `from` of [dy_0, .., dy_(n-1)] along `to`    all-to-all
/// ```
///
/// It equals [`scatter_to_group`] along `to` after [`gather_from_group`] along `from`, at `1/n` of the traffic. `x_r`
/// is `[.., part(a, n, r).len(), .., b, ..]`, `y_r` is `[.., a, .., part(b, n, r).len(), ..]`. Its own conjugate with
/// the dims exchanged; equal dims leave the tensor as it is.
///
/// Source: DeepSpeed-Ulysses, [arXiv:2309.14509](https://arxiv.org/abs/2309.14509), section 3, from sequence to heads
/// and back.
///
/// # Errors
/// [`Error::InvalidArgument`] if the tensor has no dim of that number or what this rank brings is not its part;
/// [`Error::UnsupportedDType`] for quantized tensors; those of [`Communicator`].
pub fn all_to_all<const D: usize>(
    tensor: Tensor<D>,
    from: usize,
    to: usize,
    comm: &Communicator,
) -> Result<Tensor<D>, Error> {
    const NAME: &str = "all_to_all";
    check_dim(NAME, from, D)?;
    check_dim(NAME, to, D)?;
    if from == to {
        return Ok(tensor);
    }
    let (forward, backward) = (MoveOp::Exchange { split: to, join: from }, MoveOp::Exchange { split: from, join: to });
    MovePair { name: NAME, forward, backward }.apply(tensor, comm)
}
