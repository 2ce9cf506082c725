//! The parameters of any module: one way to visit them (`visit_params`), to look at them again (`FoundParams`) and one
//! to change them (`map_params`); agreed on by the ranks, replaced by meta tensors, read from a store a part at a time.

mod agree;
mod any_param;
mod buffers;
mod device;
mod found;
mod gradients;
mod ids;
mod leaf;
mod load;
mod map;
mod meta_module;
mod pad;
mod retain;
mod shard;
mod source;
mod statistics;
mod sweep;
mod together;
mod unknown_params;
mod walk;

pub use source::SliceSource;

pub(crate) use agree::{agree, share_text};
pub(crate) use buffers::own_buffers;
pub(crate) use device::one_device;
pub(crate) use found::FoundParams;
pub(crate) use gradients::{scale_gradients, take_gradients};
pub(crate) use ids::{Renamed, share_ids};
pub(crate) use leaf::{LazyParam, LeafKind, leaf, stand_in, with_autodiff};
#[doc(hidden)]
pub use load::ParamSlice;
pub(crate) use load::{dims_of, load};
pub(crate) use map::{MapParams, MappedParam, map_params};
pub(crate) use meta_module::{NewDims, meta_module};
pub(crate) use pad::{padded, without_padding};
pub(crate) use retain::{lazy_params, replace_values, retain};
pub(crate) use shard::{SHARD, ShardedIds, is_shard};
pub(crate) use statistics::{average_statistics, is_statistic};
pub(crate) use sweep::sweep_leaves;
pub(crate) use together::{attempt, together};
pub(crate) use unknown_params::{check_params_known, unknown_params};
pub(crate) use walk::{ModulePath, ParamRef, visit_floats, visit_params, visit_params_and_flags};
