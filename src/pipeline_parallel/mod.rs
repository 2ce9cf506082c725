//! Pipeline parallelism: a model's layers spread over ranks as stages, which work on several micro-batches at a time.

mod parcel;
pub mod schedule;
mod stage;

pub use parcel::Parcel;
pub use stage::{Forwarded, LossSum, MicroBatch, Stage};

use crate::Error;

pub(crate) fn stage_error(problem: impl Into<String>) -> Error {
    Error::Pipeline { problem: problem.into() }
}
