//! Training steps whose batch norms take their statistics over the whole group.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::module::Module;
use burn::tensor::Tensor;

use super::rewrite::sync_batch_norm;
use super::statistics::register_sync_batch_norm;
use crate::Error;
use crate::comm::{Communicator, Counters, ReduceOp};
use crate::data_parallel::hook::GradientListener;
use crate::data_parallel::loss_weight::LossWeight;
use crate::data_parallel::reducer::Reducer;
use crate::graph::{CustomOps, GraphCache, Signature, TensorTree};
use crate::params::FoundParams;
use crate::step::{Loss, StepFn};

/// Captured steps with collectives in them, and the communicator of those collectives: they run on the thread that
/// computes, in between buckets that are reduced in the background.
#[derive(Debug)]
pub(in crate::data_parallel) struct SyncBatchNorm {
    graphs: GraphCache,
    group: Communicator,
    /// Weight of the micro-batch at hand, as the bits of an `f64`.
    weight: Arc<AtomicU64>,
}

impl SyncBatchNorm {
    /// # Errors
    /// Those of [`Communicator::split`].
    pub fn new(group: &Communicator) -> Result<Self, Error> {
        let group = group.split_named("batch_norm", 0, group.rank() as i64)?;
        let weight = Arc::new(AtomicU64::new(1f64.to_bits()));
        let (comm, of_micro_batch) = (group.clone(), weight.clone());
        let mut ops = CustomOps::new();
        register_sync_batch_norm(
            &mut ops,
            move |sums| comm.all_reduce(sums, ReduceOp::Sum),
            move || f64::from_bits(of_micro_batch.load(Ordering::Relaxed)),
        );
        let graphs = GraphCache::new(ops, |graph| sync_batch_norm(graph).map(|_| ()));
        Ok(Self { graphs, group, weight })
    }

    pub fn counters(&self) -> Counters {
        self.group.counters()
    }

    /// Runs the micro-batches, handing gradients to the reducer, which it opens before the last one. Returns the mean
    /// losses, each with its weight.
    pub fn run<M: Module, I: TensorTree + Clone, F: FnMut(&M, I) -> Tensor<1>>(
        &mut self,
        module: &M,
        reducer: &Reducer,
        params: &FoundParams,
        micro_batches: Vec<(I, f64)>,
        mut forward: F,
    ) -> Result<Vec<(Tensor<1>, f64)>, Error> {
        self.agree(&micro_batches)?;
        let mut call = |module: &M, input: I| Loss::from(forward(module, input));
        let mut step = StepFn::new::<F>(&mut call);
        let mut loss_weight = LossWeight::default();
        let mut losses = Vec::new();
        let last = micro_batches.len().saturating_sub(1);
        for (number, (input, weight)) in micro_batches.into_iter().enumerate() {
            self.weight.store(weight.to_bits(), Ordering::Relaxed);
            let signature = Signature::of_step(params, &|_, _| None);
            let executor = self.graphs.executor_of(signature, &input, step.again(), || module.clone())?;
            // The capture has used parameters; what counts is what the graph has gradients for.
            reducer.forget_uses();
            let trained = executor.graph().params.iter().filter(|param| param.gradient.is_some());
            trained.filter_map(|param| reducer.index_of(param.id)).for_each(|param| {
                reducer.used(param);
            });
            loss_weight.add(weight, weight);
            let unit = loss_weight.unit;
            if number == last {
                reducer.begin(loss_weight);
            }
            let step = executor.step_with(module, input, |id, gradient| {
                if let Some(param) = reducer.index_of(id) {
                    reducer.arrived(param, gradient.scale(weight / unit));
                }
                Ok(())
            })?;
            losses.push((step.loss, weight));
        }
        reducer.forget_uses();
        Ok(losses)
    }

    /// Demands that all ranks will call the same collectives.
    fn agree<I>(&self, micro_batches: &[(I, f64)]) -> Result<(), Error> {
        let weightless = micro_batches.iter().any(|(_, weight)| !(weight.is_finite() && *weight > 0.0));
        let mine = if weightless { 0 } else { micro_batches.len() as u64 };
        let counts = self.group.all_gather(vec![mine])?;
        if counts[0] > 0 && counts.iter().all(|count| *count == counts[0]) {
            return Ok(());
        }
        let problem = format!(
            "synchronised batch norm needs the same number of micro-batches of positive weight on every rank, at least \
             1, but the ranks bring {counts:?} (0 also for one with a weight that is not positive): drop the rest of the \
             data or pad it"
        );
        Err(Error::invalid("step_sync_batch_norm", problem))
    }
}
