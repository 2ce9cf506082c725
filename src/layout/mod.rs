//! How a logical tensor lies over the ranks of a group, and the moves between layouts that gradients flow through.
//!
//! For models written with parallelism in mind: they hold a [`Communicator`] for each axis and call these functions
//! where a tensor changes its [`Layout`]. Every function is a *conjugate pair*: it moves the tensor now, and its
//! gradient the other way in the backward pass.
//!
//! | function | value | formula on rank `r` of `n` | gradient | formula |
//! |---|---|---|---|---|
//! | [`copy_to_group`], Megatron's *f* | replicated, stays so | `y = x` | partial to replicated | `dx = sum_i dy_i` |
//! | [`reduce_from_group`], Megatron's *g* | partial to replicated | `y = sum_i x_i` | replicated, stays so | `dx = dy` |
//! | [`scatter_to_group`] | replicated to sharded | `y = part_r(x)` | sharded to replicated | `dx = [dy_0, .., dy_(n-1)]` |
//! | [`gather_from_group`] | sharded to replicated | `y = [x_0, .., x_(n-1)]` | replicated to sharded | `dx = part_r(dy)` |
//! | [`gather_and_copy_to_group`] | sharded to replicated | `y = [x_0, .., x_(n-1)]` | partial to sharded | `dx = part_r(sum_i dy_i)` |
//! | [`reduce_scatter_to_group`] | partial to sharded | `y = part_r(sum_i x_i)` | sharded to replicated | `dx = [dy_0, .., dy_(n-1)]` |
//! | [`all_to_all`] | sharded along `d` to sharded along `e` | all-to-all | sharded along `e` to sharded along `d` | all-to-all |
//!
//! [`redistribute`] chooses among them by the two layouts. [`scatter_from_root`] and [`gather_to_root`] tie a group to
//! one of its ranks. The moves compose: over the dims of a tensor, and over the axes of a [`Mesh`](crate::mesh::Mesh).
//!
//! # Which layout a gradient has
//!
//! Every rank computes the same loss, each its own copy of it, and runs the same backward. The gradient of a sharded
//! tensor is sharded like it; that of a partial tensor is replicated. The gradient of a *replicated* tensor is
//! replicated as long as all ranks do the same with it. Where they begin to do different things (multiply it by their
//! own columns of a weight, add it to their own rows of a sharded tensor) each rank sees only its own contribution, and
//! the true gradient is the sum over the ranks: put [`copy_to_group`] there. That holds for activations, and for
//! replicated parameters that meet sharded activations, as the weight of a layer norm in a sequence-parallel region
//! does.
//!
//! A loss that each rank computes on its own part of the data is partial: make it whole with [`reduce_from_group`].
//!
//! # Rules
//!
//! - Every rank takes the same moves in the same order, and so does its backward: a tensor that needs a gradient on one
//!   rank needs it on all. The order of burn's backward is the same for identical graphs.
//! - **Ranks never share autodiff leaves.** A `model.clone()` on each of two threads is one graph behind one lock, in
//!   which they wait for each other for ever, beyond the reach of any time-out. Give each rank leaves of its own:
//!   `model.clone().fork(&device)`, or a model that the rank has made itself. Between ranks tensors travel as payloads
//!   of the [`Communicator`], which takes them off the graph.
//! - A tensor that `n` ranks share is divided as [`part`](crate::comm::part) does, in parts as equal as can be, also
//!   when `n` does not divide it; a part may be empty.
//! - burn's `backward()` can't return an error. When a move fails there, the world fails, the gradients that depend on
//!   it are zeros, and [`Communicator::failure`] holds the error: call [`backward`], which looks, in its place.
//! - A tape holds the communicators of its moves, and burn keeps the tape of a forward that was not followed by a
//!   backward until the next backward in the process. Evaluate with tensors that are not tracked, as those of
//!   `model.valid()`.
//! - A tensor that is not tracked, because it is on a device without autodiff or is a constant, costs nothing on the
//!   tape. Nor does a group of one rank cost anything: there, all functions return their input.
//! - Gradients flow on [`Device::flex`](burn::tensor::Device::flex) and, with the feature `cuda` or `wgpu`, on the
//!   devices of burn's CubeCL backends, with or without gradient checkpointing, which repeats no collective. Untracked
//!   tensors move on any device.
//!
//! # Sources
//!
//! *f* and *g*: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3. Gather and reduce-scatter
//! along the sequence: Korthikanti et al., [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2.
//! All-to-all between sequence and heads: DeepSpeed-Ulysses, [arXiv:2309.14509](https://arxiv.org/abs/2309.14509).
//!
//! # Example
//!
//! The MLP of Megatron-LM: columns of the first weight, then rows of the second.
//!
//! ```
//! use burn::tensor::{Tensor, activation::gelu};
//! use burn_parallel::prelude::*;
//!
//! fn mlp(x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, tp: &Communicator) -> Result<Tensor<2>, Error> {
//!     let x = layout::copy_to_group(x, tp)?; // each rank goes on with columns of its own
//!     let y = gelu(x.matmul(a)).matmul(b); // partial: still to be summed
//!     layout::reduce_from_group(y, tp)
//! }
//!
//! launch::threads(2).run(|rank| {
//!     let device = rank.device().autodiff();
//!     let a = Tensor::<2>::ones([4, 8], &device).require_grad();
//!     let b = Tensor::<2>::ones([8, 4], &device).require_grad();
//!     let x = Tensor::<2>::ones([3, 4], &device).require_grad();
//!     // Weights are cut once, outside the step; here it is done on the tape as an example.
//!     let columns = layout::scatter_to_group(a, 1, &rank)?;
//!     let rows = layout::scatter_to_group(b, 0, &rank)?;
//!     assert_eq!((columns.dims(), rows.dims()), ([4, 4], [4, 4]));
//!
//!     let loss = mlp(x.clone(), columns, rows, &rank)?.sum();
//!     let grads = layout::backward(&loss, &rank)?;
//!     assert_eq!(x.grad(&grads).map(|dx| dx.dims()), Some([3, 4]));
//!     Ok(())
//! })?;
//! # Ok::<(), Error>(())
//! ```
//!
//! [`Communicator`]: crate::comm::Communicator
//! [`Communicator::failure`]: crate::comm::Communicator::failure

mod checks;
mod dim_order;
mod exchange;
mod kind;
mod moves;
mod pairs;
mod redistribute;
mod root;
mod tape;

pub use kind::Layout;
pub(crate) use moves::MoveOp;
pub use pairs::{
    all_to_all, copy_to_group, gather_and_copy_to_group, gather_from_group, reduce_from_group, reduce_scatter_to_group,
    scatter_to_group,
};
pub use redistribute::redistribute;
pub use root::{gather_to_root, scatter_from_root};
pub use tape::backward;
