//! What a training step takes and gives, whatever the model is spread over.
//!
//! The closure of a step returns a [`Loss`], or whatever becomes one.
//! [`ParallelModule::step`](crate::train::ParallelModule::step) gives a [`Step`].

mod closure;
mod counters;
mod loss;
mod noise;
mod report;
#[expect(clippy::module_inception)]
mod step;

pub use counters::StepCounters;
pub use loss::{Count, Loss};
pub use noise::{GradientNoise, NoNoise};
pub use report::RunReport;
pub use step::{LossValue, NotFinite, Step};

pub(crate) use closure::{ClosureIdentity, StepFn};
pub(crate) use loss::{LossParts, Weight};
pub(crate) use noise::{NoisePart, NoiseState};
