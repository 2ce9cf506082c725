//! The norm of a gradient that is spread over ranks, and clipping by it.
//!
//! The gradient of a model is one long vector, whatever its parts lie on: a parameter that is split counts with every
//! part, one that several ranks hold (replicated, or tied between stages) counts once, padding is zeros and does not
//! count. So the norm of a split model is that of the same model on one device, but for rounding. Squares are summed in
//! `f64`.

mod by_hand;
mod clip;
mod combine;
mod options;

pub use by_hand::HandSplit;
pub use clip::Clipped;
pub(crate) use clip::{clip, clip_and_sum};
pub use options::{Clip, NonFinite};

pub use crate::tensor::Norm;

#[cfg(test)]
mod tests;
