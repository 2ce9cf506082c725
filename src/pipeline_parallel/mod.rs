//! Pipeline parallelism: a model's layers spread over ranks as stages, which work on several micro-batches at a time.
//!
//! Any [`Module`](burn::module::Module), unedited: [`PipelineParallel::pipeline_parallel`] leaves each rank the
//! parameters of its stages, and [`ParallelModule::step`](crate::train::ParallelModule::step) runs a training step,
//! [cut] into those stages, in the order of a [schedule]. Where shapes change from one micro-batch to the next, or a
//! step cannot be captured, a stage is written by hand: [`EagerStage`], or a [`Stage`] of one's own, for the same
//! executor ([`Pipeline`]).
//!
//! A [`Schedule`](schedule::Schedule) says in which order; written out for so many ranks and micro-batches it is a
//! [`Timetable`](schedule::Timetable), which can be read, printed, [validated](schedule::Timetable::validate) and
//! [simulated](schedule::Timetable::simulate) without running a model. A [`Pipeline`] runs it over the [`Stage`]s that
//! the ranks hold, whatever they are made of: [`EagerStage`] makes one of any module and a closure.
//!
//! ```
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::{AdamWConfig, ModuleOptimizer};
//! use burn::prelude::*;
//! use burn_parallel::prelude::*;
//!
//! let losses = launch::threads(2).run(|rank| {
//!     let device = rank.device().autodiff();
//!     let model: Vec<Linear> = (0..4).map(|_| LinearConfig::new(8, 8).init(&device)).collect(); // any burn module
//!     let config = PipelineConfig::new(4).with_schedule(Schedule::OneForwardOneBackward);
//!     let mut model = model.pipeline_parallel(&rank, config)?;
//!     let mut optim: ModuleOptimizer = AdamWConfig::new().init();
//!     let mut losses = Vec::new();
//!     for _ in 0..3 {
//!         let batch = Tensor::<2>::ones([16, 8], &device); // the whole batch on every rank: 4 micro-batches of 4 rows
//!         let step = model.step(batch, |model, rows| {
//!             model.iter().fold(rows, |x, layer| layer.forward(x).tanh()).powi_scalar(2).mean()
//!         })?;
//!         model = optim.step(0.01, model, step.grads); // each rank steps the parameters of its stage
//!         losses.push(step.loss.item());
//!     }
//!     assert_eq!(model.report().cut.map(|cut| cut.stages.len()), Some(2));
//!     Ok(losses)
//! })?;
//! assert_eq!(losses[0], losses[1]);
//! # Ok::<(), Error>(())
//! ```

mod batch;
mod by_rows;
mod captured;
mod captured_step;
mod config;
pub mod cut;
mod eager;
mod engine;
mod evaluate;
mod graph_stage;
mod loaded;
mod memory;
mod module_impl;
mod output_join;
mod pipeline;
mod pipelined;
pub mod schedule;
mod stage;
mod stage_error;
mod stage_message;
mod state;
mod step;
mod tied;
mod wrap;

pub use config::PipelineConfig;
pub use eager::{EagerStage, Received, Sent};
pub use pipeline::{Pipeline, PipelineRun};
pub use pipelined::Pipelined;
pub use stage::{Forwarded, LossSum, MicroBatch, Stage};
pub(crate) use stage_error::stage_error;
pub use stage_message::StageMessage;
pub use wrap::PipelineParallel;
