//! Splitting a captured step over the ranks of a mesh axis: sharding propagation.
//!
//! [`partition`] takes the layouts of the parameters and the inputs, walks the operations once, forward and backward
//! alike, and gives every tensor a [`Layout`]. For each operation it weighs the ways in which ranks can run it on what
//! they hold, takes the one that moves least, and puts in the collectives that it needs, custom operations that
//! [`register_collectives`] runs over a [`Communicator`]. [`CollectiveKind`] lists them.
//!
//! - A tensor that was moved once is kept in both layouts, and one that was reduced is never reduced again.
//! - Partial tensors stay partial through sums, scalings and moves, so that the gradients of the query, key and value
//!   projections are reduced as one. They are not where that would reduce twice: where another reader needs the whole.
//! - In a sum of partial and whole terms the whole ones wait until the partial ones are added up and reduced.
//! - What can be made from nothing, masks and ones and zeros, is made when it is read, in the layout that is asked for.
//! - What is read or written by index along a split dim is so by each rank in its part, so that an embedding split by
//!   rows and a loss over split classes never gather either. Indices beyond the dim, at which one device panics, are an
//!   error.
//! - Dims that are merged for a while, as batch and heads are in burn's `RotaryEncoding`, are taken apart first, so
//!   that a split of any of them can follow.
//! - An operation without a fitting rule gathers its inputs and runs whole on every rank: slow, but right. The
//!   [`ShardReport`] tells which.
//!
//! With [`with_sequence_dim`](PartitionOptions::with_sequence_dim) activations stay split along the sequence between
//! the layers that are split otherwise; linear layers that burn computes on flattened rows are taken as they were
//! before, which a split sequence can follow.
//!
//! Several axes are partitioned one after another: the collectives of the first are operations with rules like any
//! other, for the second. Every rank of an axis gets the same operations but for the places of slices, hence the same
//! sequence of collectives ([`StepGraph::axis_fingerprint`]).
//!
//! [`fuse_products`] then has products run together with their collective, chunk by chunk, [`bucket_reductions`] makes
//! one collective of many small ones, and [`overlap`] has operations run beside collectives.
//!
//! # Not split
//! Arg-max, a maximum whose gradient is asked for (it comes with indices), top-k, sorting and cumulative reductions
//! over a split dim, and convolutions in groups over split channels, run whole.
//!
//! [`Communicator`]: crate::comm::Communicator
//! [`Layout`]: crate::layout::Layout
//! [`StepGraph::axis_fingerprint`]: crate::graph::StepGraph::axis_fingerprint

mod buckets;
mod checked_indices;
mod collectives;
mod cost;
mod exchange;
mod flops;
mod fuse;
mod indices;
mod logical_tensor;
mod merged;
mod moves;
mod options;
mod order;
mod overlap;
mod padding;
mod pass;
mod planned;
mod products;
mod propagation;
mod register;
mod report;
mod rows;
mod rules;
mod sharded;
mod sums;

pub use buckets::bucket_reductions;
pub use collectives::CollectiveKind;
pub(crate) use collectives::CollectiveOp;
pub(crate) use exchange::{Exchange, Exchanges, exchanged};
pub(crate) use flops::{flops, multiplications};
pub use fuse::fuse_products;
pub use options::PartitionOptions;
pub use overlap::overlap;
pub(crate) use padding::{Larger, pad};
pub use products::{FusedProduct, ProductKind};
pub use propagation::partition;
pub use register::register_collectives;
pub use report::{Collective, Fallback, ShardReport};
pub(crate) use sharded::{
    Gathering, InRows, Parts, START_GATHER, START_SCATTER, WAIT_GATHER, WAIT_SCATTER, rewrite, shard_parameters, tokens,
};
