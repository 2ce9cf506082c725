//! Pipeline parallelism: a model's layers spread over ranks as stages, which work on several micro-batches at a time.

mod eager;
mod parcel;
mod pipeline;
pub mod schedule;
mod stage;

pub use eager::{EagerStage, Received, Sent};
pub use parcel::Parcel;
pub use pipeline::{Pipeline, PipelineRun, RunReport};
pub use stage::{Forwarded, LossSum, MicroBatch, Stage};

use crate::Error;

pub(crate) fn stage_error(problem: impl Into<String>) -> Error {
    Error::Pipeline { problem: problem.into() }
}
