//! What each of burn's operations is, in one table; what it takes; and the fields that passes look for.
//!
//! Modules above ask here. Those files that give an operation another form (the rules of a
//! [partition](crate::partition): `rules`, `padding`, `merged`, `rows`, `fuse`) or make kernels of them
//! (`graph/fused`) match on burn's own types, and no others do.

mod build;
mod class;
mod cost;
mod fields;
mod name;

pub(crate) use build::add;
pub(crate) use class::{Class, is_cheap, is_elementwise, is_linear, is_view, only_moves};
pub(crate) use cost::{bytes, elements, multiplications};
pub(crate) use fields::{
    Reduced, batch_norm, cast, difference, is_filled, is_zeros, linear_step, matmul, mean_dim, product, reciprocal,
    reduced, reduces_last, reshape, scaled, shifted, square_root, sum, swap_dims, writes_at,
};
pub(crate) use name::op_name;
