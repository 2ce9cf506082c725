//! What training needs on a rank, whatever the model is spread over.

use crate::Error;
use crate::comm::{Communicator, ReduceOp};
use crate::graph::TensorTree;
use crate::sharding::Sharding;
use crate::step::Loss;
use crate::train::ParallelModule;

use super::fit::{bisect, held};

/// What training needs on a rank, in bytes, as far as it is known before a step has run. A rank needs as much or more:
/// eager steps keep tensors that captured ones free, and collectives, libraries and allocators need room of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankMemory {
    /// What the rank holds of the parameters.
    pub parameters: usize,
    /// What it holds of the moments of the optimizer.
    pub optimizer: usize,
    /// The most that is alive beside these in a step: activations, gradients, gathered parameters.
    pub step: usize,
}

impl RankMemory {
    /// Of this rank, for micro-batches of such inputs and an optimizer with so many moments for each parameter (Adam
    /// has 2, SGD with momentum 1). The step is captured, partitioned, cut and scheduled as it will be, and not run:
    /// see [`ParallelModule::step_memory`]. Collective.
    ///
    /// ```
    /// use burn::{nn::LinearConfig, prelude::*};
    /// use burn_parallel::batch::RankMemory;
    /// use burn_parallel::prelude::*;
    ///
    /// let strategy = Strategy::new().with_tp(2, Plan::new().shard("weight", 1).shard("bias", 0));
    /// let all = launch::threads(2).run(|rank| {
    ///     let device = rank.device().autodiff();
    ///     let mut model = LinearConfig::new(100, 10).init(&device).parallelize(&rank, &strategy)?;
    ///     let x = Tensor::<2>::zeros([64, 100], &device);
    ///     RankMemory::of(&mut model, 2, x, |model, x| model.forward(x).powi_scalar(2).mean())
    /// })?;
    /// assert_eq!(all[0].parameters, 4 * 101 * 5); // half of the weight and of the bias
    /// assert_eq!(all[0].optimizer, 2 * all[0].parameters);
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`ParallelModule::step_memory`].
    pub fn of<P, I, F, R>(model: &mut P, moments: usize, inputs: I, loss: F) -> Result<Self, Error>
    where
        P: ParallelModule,
        I: TensorTree + Clone,
        F: FnMut(&P::Model, I) -> R,
        R: Into<Loss>,
    {
        // Afterwards a pipeline holds its stages only.
        let step = model.step_memory(inputs, loss)?;
        let [parameters, trained] = held(model.local());
        // Where the replicas divide the parameters, rows of them are all that there is here.
        let divided_by = match model.report().sharding {
            Sharding::None | Sharding::Parameters => 1,
            Sharding::Optimizer | Sharding::Gradients => model.shards().map_or(1, |shards| shards.ranks()),
        };
        Ok(Self { parameters, optimizer: (moments * trained).div_ceil(divided_by), step })
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.parameters + self.optimizer + self.step
    }
}

/// As [`rows_within`](super::rows_within), on all ranks of a group with one answer: the largest number of rows that is
/// known to need no more than its budget on any rank. `memory` is asked about the same numbers on all ranks, so that it
/// may be collective ([`RankMemory::of`] is). Ranks that share a memory have one budget, and `memory` gives the sum
/// over them.
///
/// ```
/// use burn_parallel::batch::rows_within_on_all;
/// use burn_parallel::prelude::*;
///
/// // One rank needs 2 bytes a row, the other 3.
/// let rows = launch::threads(2).run(|rank| {
///     rows_within_on_all(100, 64, &rank, |rows| Ok((2 + rank.rank()) * rows))
/// })?;
/// assert_eq!(rows, [33, 33]);
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// Those of `memory`, and the error of the world.
pub fn rows_within_on_all(
    budget: u64,
    most: usize,
    group: &Communicator,
    mut memory: impl FnMut(usize) -> Result<usize, Error>,
) -> Result<usize, Error> {
    bisect(most, |rows| {
        let fits = memory(rows)? as u64 <= budget;
        Ok(group.all_reduce(vec![u64::from(fits)], ReduceOp::Min)?[0] == 1)
    })
}
