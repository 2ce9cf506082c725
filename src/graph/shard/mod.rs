//! Splitting a captured step over the ranks of a group: sharding propagation.
//!
//! [`partition`] takes the layouts of the parameters and the inputs, walks the operations once, forward and backward
//! alike, and gives every tensor a [`Layout`]. For each operation it weighs the ways in which ranks can run it on what
//! they hold, takes the one that moves least, and puts in the collectives that it needs: [`ALL_REDUCE`],
//! [`ALL_GATHER`] and [`REDUCE_SCATTER`], custom operations that [`register_collectives`] runs over a [`Communicator`].
//!
//! - A tensor that was moved once is kept in both layouts, and one that was reduced is never reduced again.
//! - Partial tensors stay partial through sums, scalings and moves, so that the gradients of the query, key and value
//!   projections are reduced as one. They are not where that would reduce twice: where another reader needs the whole.
//! - In a sum of partial and whole terms the whole ones wait until the partial ones are added up and reduced.
//! - An operation without a fitting rule gathers its inputs and runs whole on every rank: slow, but right. The
//!   [`ShardReport`] tells which.
//!
//! Every rank gets the same operations but for the places of slices, hence the same sequence of collectives
//! ([`StepGraph::collective_fingerprint`]).
//!
//! # Not split yet
//! Random operations (dropout) are refused: ranks that are threads draw from one generator of burn's, so that a tensor that
//! must be equal on all ranks would not be. Convolutions, attention as one operation, and reductions other than sums and
//! means over a split dim run whole.
//!
//! [`Communicator`]: crate::comm::Communicator
//! [`Layout`]: crate::layout::Layout
//! [`StepGraph::collective_fingerprint`]: crate::graph::StepGraph::collective_fingerprint

mod collectives;
mod held;
mod pass;
mod report;
mod rules;

pub use collectives::{ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, register_collectives};
pub use pass::partition;
pub use report::{Collective, CollectiveKind, Fallback, ShardReport};
