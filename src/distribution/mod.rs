//! Distributes the parameters of a model over the ranks of an axis, and assembles them again.
//!
//! Rank 0's values count. A parameter that is lazy on rank 0 stays lazy everywhere: whoever needs its value first makes
//! all ranks meet. If it is split, rank 0 makes a piece of it at a time and sends each rank what is its own of that: no
//! rank ever holds the whole.

mod assemble;
mod distribute;
mod initializer;
mod lazy;
mod model_split;
mod param_part;
mod row_shards;

pub(crate) use model_split::{ModelSplit, split_step};
pub(crate) use row_shards::RowShards;
