//! Pipeline parallelism: a model's layers spread over ranks as stages, which work on several micro-batches at a time.
//!
//! A [`Schedule`](schedule::Schedule) says in which order; written out for so many ranks and micro-batches it is a
//! [`Timetable`](schedule::Timetable), which can be read, printed, [validated](schedule::Timetable::validate) and
//! [simulated](schedule::Timetable::simulate) without running a model. A [`Pipeline`] runs it over the [`Stage`]s that the
//! ranks hold, whatever they are made of: [`EagerStage`] makes one of any module and a closure.

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
