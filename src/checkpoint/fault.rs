//! The points of a save of a checkpoint at which tests end the process; and one of a restore, at which they do
//! something else.

pub(super) use crate::tensor_file::fault::point;

#[cfg(test)]
pub(super) use crate::tensor_file::fault::{NO_EXCHANGE, STALL, STALL_MS, at};

/// Those of a save, in their order.
#[cfg(test)]
pub(super) const POINTS: [&str; 7] =
    ["planned", "draft made", "half written", "tensors written", "index written", "committed", "removing"];
