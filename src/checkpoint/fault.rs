//! Points at which the tests end a process in the middle of a save.

pub(super) use crate::tensor_file::fault::point;

#[cfg(test)]
pub(super) use crate::tensor_file::fault::{STALL, VARIABLE};

/// All points, in their order.
#[cfg(test)]
pub(super) const POINTS: [&str; 7] =
    ["planned", "draft made", "half written", "tensors written", "index written", "committed", "removing"];
