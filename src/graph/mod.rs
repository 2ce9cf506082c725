//! Any burn module as data: one training step captured as a list of operations, rewritten, and executed.
//!
//! An eager wrapper cannot reach inside an unmodified `forward`. Here the step (forward, loss and backward) of an
//! ordinary [`Module`](burn::module::Module) is recorded once with [`capture_step`], or a forward alone with
//! [`capture_forward`], which yields a [`StepGraph`]: burn-ir operations with the parameters, inputs and results named.
//! Passes rewrite that list:
//!
//! - [`counter_based_rng`] has every rank draw the random numbers of one device,
//! - [`partition`](crate::partition::partition) splits the step over the ranks of a mesh axis,
//! - [`sync_batch_norm`](crate::data_parallel::sync_batch_norm) puts a collective after every batch statistic.
//!
//! An [`Executor`] then runs it on the model's device at each step with the current parameters and new inputs, without
//! a tape. On the host it runs groups of element-wise operations as one loop each ([`CustomOps::with_fusion`]).
//!
//! ```
//! use burn::{nn::{Linear, LinearConfig}, prelude::*};
//! use burn_parallel::graph::{CustomOps, Executor, capture_step};
//!
//! let device = Device::flex().autodiff();
//! let model: Linear = LinearConfig::new(4, 2).init(&device);
//! let x = Tensor::<2>::ones([3, 4], &device);
//!
//! let graph = capture_step(&model, x.clone(), |model, x| model.forward(x).powi_scalar(2).mean())?;
//! let mut executor = Executor::new(graph, CustomOps::new())?;
//! let step = executor.step(&model, x)?;
//! assert_eq!(step.loss.dims(), [1]);
//! assert_eq!(step.gradients.len(), 2);
//! # Ok::<(), burn_parallel::Error>(())
//! ```
//!
//! # What a graph fixes
//! Shapes, dtypes, trainable parameters, training flags, plain fields of the module (a dropout probability), tensors
//! of the module that are not parameters, and every decision that `forward` takes on the host are those of the moment
//! of capture. Parameters, running statistics, inputs and random numbers are new at each execution. A [`GraphCache`]
//! captures again when shapes, dtypes, flags or trainable parameters change.
//!
//! # What cannot be captured (each is an [`Error::Graph`])
//! A host read in `forward` (`into_scalar`, `into_data`), `to_device` of a float tensor in `forward`, one `BatchNorm`
//! called twice in one forward (burn 0.22 moves its running statistics with `to_device`), a `RunningState` that is not
//! a `BatchNorm`'s, quantized parameters.
//!
//! [`Error::Graph`]: crate::Error::Graph

mod assemble;
mod backend;
pub(crate) mod bind;
mod buffers;
mod cache;
pub(crate) mod capture;
mod checked_optimizers;
mod custom;
pub(crate) mod device;
mod different_updates;
pub(crate) mod edges;
mod engine;
mod execute;
mod forward;
pub(crate) mod fused;
mod gradient_layout;
mod input_comparison;
pub(crate) mod instruction;
pub(crate) mod interpret;
mod leaves;
mod listing;
pub(crate) mod liveness;
mod memory_plan;
pub(crate) mod module;
pub(crate) mod operation;
pub(crate) mod origin;
pub(crate) mod plan_memory;
pub(crate) mod random;
mod recent;
pub(crate) mod recording;
mod results;
mod same_inputs;
mod signature;
pub(crate) mod step;
pub(crate) mod step_memory;
mod updates;

pub use crate::tensor::{TensorMapper, TensorTree};
pub use bind::graph_tensors;
pub(crate) use bind::named_tensors;
/// burn's own description of operations and tensors, of which a [`StepGraph`] is made.
pub use burn_ir::{CustomOpIr, OperationIr, ScalarIr, TensorId, TensorIr};
pub use cache::GraphCache;
pub(crate) use cache::StepKey;
pub use capture::capture_step;
pub(crate) use checked_optimizers::CheckedOptimizers;
pub use custom::CustomOps;
pub(crate) use engine::{GradientSink, MicroBatchResult, ScaledGradients, SplitOver, SplitParam, StepEngine};
pub use execute::Executor;
pub use forward::{Forward, ForwardGraph, capture_forward};
pub(crate) use gradient_layout::{ClipRecord, GradientLayout};
pub use liveness::MemoryEstimate;
pub use module::gradients_params;
pub(crate) use module::{StepParams, found_gradients, read_found, read_params, same_buffer};
pub use random::{RandomSource, counter_based_rng, register_counter_based_rng};
pub(crate) use random::{RandomStart, RandomUse};
pub(crate) use recent::{GRAPHS, Recent};
pub use results::{StepObserver, StepOutputs, StepResult};
pub(crate) use same_inputs::{ComparedCall, SameInputs};
pub(crate) use signature::Signature;
pub use step::{BatchNormBinding, InputBinding, ParamBinding, StepGraph};
pub(crate) use updates::{Compared, Update, Updates};

use crate::Error;

pub(crate) fn graph_error(problem: impl Into<String>) -> Error {
    Error::Graph { problem: problem.into() }
}
