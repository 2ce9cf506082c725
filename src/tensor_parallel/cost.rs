//! Computes the cost of a plan from the captured step.

use burn::module::Module;
use burn_ir::TensorIr;

use crate::Error;
use crate::distribution::split_step;
use crate::graph::operation::bytes;
use crate::graph::{StepGraph, TensorTree, capture_step, counter_based_rng};
use crate::params;
use crate::partition::{CollectiveKind, CollectiveOp, PartitionOptions, flops};
use crate::plan::{DEFAULT_AXIS, Plan, PlanCost};
use crate::step::Loss;

impl Plan {
    /// What this plan costs in a training step: `loss` on `inputs`, which give shapes and dtypes only. Nothing is run,
    /// and no lazy parameter is made. Everything that the plan says counts: inputs that it splits, padding, sequence
    /// parallelism.
    ///
    /// Collectives are those of [`ShardReport`](crate::partition::ShardReport); some of the small ones become one when
    /// a step runs.
    ///
    /// # Errors
    /// [`Error::Plan`] as [`table`](Self::table), and if an input cannot be split as planned; [`Error::Graph`] if the
    /// step cannot be captured or split.
    pub fn cost<M, I, F, R>(&self, model: &M, degree: usize, inputs: I, loss: F) -> Result<PlanCost, Error>
    where
        M: Module,
        I: TensorTree,
        F: FnOnce(&M, I) -> R,
        R: Into<Loss>,
    {
        self.cost_over(model, &[(DEFAULT_AXIS, degree)], inputs, loss)
    }

    /// As [`cost`](Self::cost), over several axes, given by names and sizes: the plan's own axis, then others, of
    /// which it speaks by [`on`](Self::on) or which split nothing. The collectives are those over all axes.
    ///
    /// ```
    /// use burn::{nn::{Linear, LinearConfig}, prelude::*};
    /// use burn_parallel::plan::Plan;
    ///
    /// let device = Device::flex().autodiff();
    /// let model: Linear = LinearConfig::new(8, 4).init(&device);
    /// let x = Tensor::<2>::zeros([6, 8], &device);
    /// let plan = Plan::new().shard("weight", 0).on("dp", Plan::new().shard_input("", 0));
    /// let loss = |model: &Linear, x: Tensor<2>| model.forward(x).tanh().mean();
    /// let cost = plan.cost_over(&model, &[("tp", 2), ("dp", 3)], x, loss)?;
    /// // The partial product over `tp`; the loss and two gradients over `dp`.
    /// assert_eq!(cost.collectives, 4);
    /// # Ok::<(), burn_parallel::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`cost`](Self::cost), and as [`table_over`](Self::table_over).
    pub fn cost_over<M, I, F, R>(
        &self,
        model: &M,
        axes: &[(&str, usize)],
        inputs: I,
        loss: F,
    ) -> Result<PlanCost, Error>
    where
        M: Module,
        I: TensorTree,
        F: FnOnce(&M, I) -> R,
        R: Into<Loss>,
    {
        let table = self.table_over(model, axes)?;
        let plans = self.over(axes.iter().map(|axis| axis.0))?;
        let mut graph = capture(model, inputs, loss)?;
        let options = axes.iter().map(|(name, degree)| PartitionOptions::new(*name, *degree, 0));
        split_step(&mut graph, &table, &options.zip(plans).collect::<Vec<_>>())?;
        Ok(cost_of(&graph, axes))
    }
}

/// The step of a model of which only lazy parameters become meta tensors.
pub(super) fn capture<M, I, F, R>(model: &M, inputs: I, loss: F) -> Result<StepGraph, Error>
where
    M: Module,
    I: TensorTree,
    F: FnOnce(&M, I) -> R,
    R: Into<Loss>,
{
    let mut graph = capture_step(&params::meta_module(model, &|_, _| None), inputs, loss)?;
    counter_based_rng(&mut graph);
    Ok(graph)
}

/// What a rank runs, split over these axes.
pub(super) fn cost_of(local: &StepGraph, axes: &[(&str, usize)]) -> PlanCost {
    let collectives = local.operations.iter().filter_map(CollectiveOp::of);
    let sent = collectives.clone().map(|(op, ir)| {
        let ranks = axes.iter().find(|axis| axis.0 == op.axis).map_or(1, |axis| axis.1) as f64;
        let of = |tensors: &[TensorIr]| tensors.iter().map(bytes).sum::<u64>() as f64;
        sent(op.kind, of(&ir.inputs), of(&ir.outputs), ranks)
    });
    PlanCost {
        collective_bytes: sent.sum(),
        collectives: collectives.count(),
        parameter_bytes: local.params.iter().map(|param| bytes(&param.tensor) as f64).sum(),
        work: local.operations.iter().map(|op| flops(op) as f64).sum(),
    }
}

/// Bytes that each of `n` ranks sends in a collective of local tensors of these bytes.
fn sent(kind: CollectiveKind, input: f64, output: f64, n: f64) -> f64 {
    (n - 1.0) / n
        * match kind {
            CollectiveKind::AllGather => output,
            CollectiveKind::ReduceScatter | CollectiveKind::AllToAll => input,
            _ => 2.0 * input,
        }
}
