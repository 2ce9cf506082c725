//! Sharded replicas (ZeRO; Rajbhandari et al. 2020, arXiv:1910.02054): replicas that divide among themselves what each
//! of them would otherwise hold whole.
//!
//! [`Sharding`] says what is divided. How is the same everywhere, whatever runs the model: a parameter, its gradient
//! and the state of its optimizer are divided by rows ([`Rows`]), and never flattened. A shard has the rank of its
//! parameter, so norms, optimizers and checkpoints see rows of a matrix. Collectives carry the shards of several
//! parameters together: those of a block, of one dtype (`groups`).

mod brought;
mod comms;
mod group;
mod keep;
mod level;
mod owner;
mod pack;
mod params;
mod ranked;
mod rows;

pub use keep::Keep;
pub use level::Sharding;
pub use rows::Rows;

pub(crate) use brought::Brought;
pub(crate) use comms::ShardComms;
pub(crate) use group::{Member, groups};
pub(crate) use owner::owners;
pub(crate) use pack::Pack;
pub(crate) use params::{ShardParam, ShardParams, UpdatedShards};
pub(crate) use ranked::RankedParam;
