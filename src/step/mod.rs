//! What a training step takes and gives, whatever the model is spread over.
//!
//! The closure of a step returns a [`Loss`], or whatever becomes one.
//! [`ParallelModule::step`](crate::train::ParallelModule::step) gives a [`Step`].
//!
//! ```
//! use burn::nn::LinearConfig;
//! use burn::prelude::*;
//! use burn_parallel::prelude::*;
//!
//! launch::threads(2).run(|rank| {
//!     let device = rank.device().autodiff();
//!     let model = LinearConfig::new(4, 1).init(&device);
//!     let mut model = model.data_parallel(&rank, DataParallelConfig::new())?;
//!     let rows = 2 + rank.rank(); // two on one rank, three on the other
//!     let x = Tensor::<2>::ones([rows, 4], &device);
//!     let step = model.step(x, |model, x| Loss::sum(model.forward(x).powi_scalar(2).sum(), rows))?;
//!     assert_eq!(step.weight, 5.0); // the mean is over the rows of both
//!     println!("{}", step.loss.item());
//!     Ok(())
//! })?;
//! # Ok::<(), Error>(())
//! ```

mod carried_norm;
mod closure;
mod counters;
mod loss;
mod noise;
mod report;
#[expect(clippy::module_inception)]
mod step;

#[doc(hidden)]
pub use carried_norm::AskedNorm;
pub use counters::StepCounters;
pub use loss::{Count, Loss};
pub use noise::{GradientNoise, NoNoise};
pub use report::RunReport;
pub use step::{LossValue, NotFinite, Step};

pub(crate) use carried_norm::CarriedNorm;
pub(crate) use closure::{ClosureIdentity, StepFn};
pub(crate) use loss::{LossParts, Weight};
pub(crate) use noise::{NoisePart, NoiseState};
