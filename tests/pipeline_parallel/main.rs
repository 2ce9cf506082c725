//! Pipeline parallelism: schedules, the cut of a step into stages, the executor, and models that train in a pipeline.

#[path = "../common/mod.rs"]
mod common;

mod awkward;
mod bounded;
mod compare;
mod cut;
mod evaluated;
mod executor;
mod holding;
mod parity;
mod schedules;
