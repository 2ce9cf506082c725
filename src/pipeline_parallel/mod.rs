//! Pipeline parallelism: a model's layers spread over ranks as stages, which work on several micro-batches at a time.

mod batch;
mod config;
mod eager;
mod engine;
mod graph_stage;
mod module;
mod parcel;
mod pipeline;
mod pipelined;
pub mod schedule;
mod stage;
mod tied;
mod wrap;

pub use config::PipelineConfig;
pub use eager::{EagerStage, Received, Sent};
pub use parcel::Parcel;
pub use pipeline::{Pipeline, PipelineRun, RunReport};
pub use pipelined::{Pipelined, Step};
pub use stage::{Forwarded, LossSum, MicroBatch, Stage};
pub use wrap::PipelineParallel;

use crate::Error;

pub(crate) fn stage_error(problem: impl Into<String>) -> Error {
    Error::Pipeline { problem: problem.into() }
}
