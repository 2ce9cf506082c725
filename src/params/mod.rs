//! Parameters of any module by path and id: agreed on by the ranks, outlined without
//! memory, and read from a store a part at a time.

mod agree;
mod buffers;
mod device;
mod hold;
mod ids;
mod leaf;
mod load;
mod outline;
mod pad;
mod safetensors;
mod source;
mod strangers;
mod sweep;

pub use self::safetensors::Safetensors;
pub use source::SliceSource;

pub(crate) use agree::{agree, share_text};
pub(crate) use buffers::own_buffers;
pub(crate) use device::one_device;
pub(crate) use hold::{hold, lazy, put};
pub(crate) use ids::{Renamed, share_ids};
pub(crate) use leaf::{Kind, Lazy, leaf, with_autodiff};
pub(crate) use load::{Dims, Held, load};
pub(crate) use outline::{NewDims, outline};
pub(crate) use pad::{padded, without_padding};
pub(crate) use strangers::{no_strangers, strangers};
pub(crate) use sweep::sweep_leaves;
