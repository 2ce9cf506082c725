//! Multiplications by a weight that is split over the ranks, in chunks that overlap with their collectives.
//!
//! `x` has rows of features, `A` is this rank's part of a weight, `[d_input, d_output]`; `n` ranks. Each function is
//! differentiable, and its backward overlaps as well:
//!
//! | function | weight | value | collective | gradients | collective |
//! |---|---|---|---|---|---|
//! | [`column_parallel`] | columns | `y_r = x A_r` | none | `dx = sum_i dy_i A_i^T`, `dA_r = x^T dy_r` | all-reduce, beside `dA_r` |
//! | [`all_gather_matmul`] | columns | `y_r = [x_0, .., x_(n-1)] A_r` | all-gather | `dx_r = part_r(sum_i dy_i A_i^T)`, `dA_r = x^T dy_r` | reduce-scatter, beside `dA_r` |
//! | [`row_parallel`] | rows | `y = sum_i x_i A_i` | all-reduce | `dx_r = dy A_r^T`, `dA_r = x_r^T dy` | none |
//! | [`matmul_reduce_scatter`] | rows | `y_r = part_r(sum_i x_i A_i)` | reduce-scatter | `dx_r = [dy_0, .., dy_(n-1)] A_r^T`, `dA_r = x_r^T [dy_0, .., dy_(n-1)]` | all-gather |
//!
//! [`column_parallel_each`] and [`all_gather_matmul_each`] multiply one input by several weights, with one collective
//! in each direction.
//!
//! # How they overlap
//!
//! The rows are cut into chunks ([`Overlap`]). Before an all-reduce or a reduce-scatter, a chunk is multiplied and sent
//! on its way while the next is multiplied; the last travels beside the gradient of the weight. Behind an all-gather, a
//! rank first multiplies the rows that it has, then those of the others, chunk by chunk as they come. Where the
//! collective is the work of the ranks' own threads, as over `local`, there is nothing to wait for: a chunk is reduced
//! right behind its multiplication, while it is in the cache. Small products are one chunk: multiplied, then reduced.
//! The order of the summands of an element never depends on the chunks.
//!
//! On `Device::flex()` chunks are views of the input, multiplied by the kernels of Flex into their place in the output:
//! nothing is copied. On the devices of CubeCL (features `wgpu`, `cuda`) they are views of the buffer, multiplied by
//! cubek's kernels; where a view does not begin and end on the alignment of the device, a buffer of its own takes its
//! place. On other devices a product and a move of [`layout`](crate::layout) do the same, one after the other.
//!
//! # Sources
//!
//! The splits: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3; along the sequence:
//! Korthikanti et al., [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2. Cutting a product to hide
//! its collective: Wang et al., *Overlap Communication with Dependent Computation via Decomposition in Large Deep
//! Learning Models*, ASPLOS 2023; in PyTorch the asynchronous tensor parallelism of torchtitan,
//! [arXiv:2410.06511](https://arxiv.org/abs/2410.06511).

mod activation;
mod columns;
mod failed;
mod products;
mod rows;
mod tensor_list;

pub use crate::collective_matmul::Overlap;
pub use activation::{Activation, bias_activation};
pub use products::{
    all_gather_matmul, all_gather_matmul_each, column_parallel, column_parallel_each, matmul_reduce_scatter,
    row_parallel,
};
