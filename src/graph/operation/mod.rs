//! What each of burn's operations is, in one table; what it takes; the form that rules ask for, and the fields that
//! passes look for; how operations are made, changed and taken apart.
//!
//! Modules above ask here: the enums of burn's operations are matched on in these files, in `graph/fused/work.rs`,
//! which says what a kernel does for each, and no others, so that operations which a new version of burn renames or
//! adds touch few files.

mod apart;
pub(crate) mod build;
mod class;
mod cost;
mod edit;
mod effect;
mod fields;
mod form;
mod in_place;
mod name;

pub(crate) use apart::taken_apart;
pub(crate) use class::{Class, is_cheap, is_elementwise, is_linear, is_view, only_moves};
pub(crate) use cost::{bytes, elements, multiplications};
pub(crate) use edit::{mean_output_mut, ranges_mut, renumber_dims, replace_tensors, sum_of_mean, without_bias};
pub(crate) use effect::{Effect, keeps_zero};
pub(crate) use fields::{
    SumOrMean, batch_norm, cast, cat, difference, drawn, embedding_gradient, is_filled, is_zeros, linear_step, matmul,
    mean_dim, permute, plain_product, product, reads_at, reciprocal, reduces_last, reshape, scaled, shifted,
    slice_assign, slices_or_casts, square_root, sum, sum_dim, sum_or_mean, swap_dims, writes_at,
};
pub(crate) use form::{
    AlongDim, AlongDimKind, Convolution, ConvolutionPass, Form, Reduction, ReductionDims, ReductionKind,
};
pub(crate) use in_place::{passing_bytes, written_over};
pub(crate) use name::op_name;
