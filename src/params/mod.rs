//! Parameters of any module by path and id: agreed on by the ranks, outlined without
//! memory, and read from a store a part at a time.

mod agree;
mod buffers;
mod device;
mod ids;
mod leaf;
mod load;
mod meta_module;
mod pad;
mod retain;
mod shard;
mod source;
mod sweep;
mod unknown_params;

pub use source::SliceSource;

pub(crate) use agree::{agree, share_text};
pub(crate) use buffers::own_buffers;
pub(crate) use device::one_device;
pub(crate) use ids::{Renamed, share_ids};
pub(crate) use leaf::{LazyParam, LeafKind, leaf, with_autodiff};
#[doc(hidden)]
pub use load::ParamSlice;
pub(crate) use load::{Dims, load};
pub(crate) use meta_module::{NewDims, meta_module};
pub(crate) use pad::{padded, without_padding};
pub(crate) use retain::{lazy_params, replace_values, retain};
pub(crate) use shard::{SHARD, ShardedIds, is_shard};
pub(crate) use sweep::sweep_leaves;
pub(crate) use unknown_params::{check_params_known, unknown_params};
