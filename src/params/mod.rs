//! Parameters of any module by path and id: agreed on by the ranks, spread over them, put together again, and outlined
//! without memory.

mod agree;
mod distribute;
mod hold;
mod leaf;
mod outline;

pub(crate) use agree::agree;
pub(crate) use distribute::{agree_on_layouts, assemble, distribute};
pub(crate) use hold::{hold, put};
pub(crate) use leaf::with_autodiff;
pub(crate) use outline::outline;
