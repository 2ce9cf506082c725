//! Batch norm over the whole group: a collective after every batch statistic of the captured step.
//!
//! In eager burn a batch norm in training is one autodiff operation over the local batch, so ranks that split a batch
//! normalise with different statistics than one device would. In a captured step the statistics are tensors of their
//! own:
//!
//! - forward: `mean` and the biased `variance`, each a `mean_dim` over `[channels, n]`, that feed the normalisation,
//!   the running statistics and the backward pass;
//! - backward: `mean_grad` and `mean_normalized_grad`, the means over `[channels, n]` of `dy` and of `dy * x_hat` in
//!   `dx = gamma / std * (dy - mean(dy) - x_hat * mean(dy * x_hat))` (Ioffe and Szegedy 2015, section 3).
//!
//! The pass renames the output of each such `mean_dim` and puts an [`OperationIr::Custom`] after it that makes the old
//! tensor, so every later reader sees the group's value.

use std::collections::BTreeMap;

use burn_ir::{BatchNormOpIr, CustomOpIr, OperationIr, ScalarIr, TensorId, TensorIr};

use crate::Error;
use crate::graph::operation::{self, difference, product};
use crate::graph::step::{Rename, Uses};
use crate::graph::{BatchNormBinding, StepGraph, graph_error};

/// Id of the custom operation on forward statistics; [`sync_batch_norm`] tells its contract.
pub(super) const SYNC_BATCH_NORM_MEAN: &str = "sync_batch_norm_mean";
/// Id of the custom operation on backward means; [`sync_batch_norm`] tells its contract.
pub(super) const SYNC_BATCH_NORM_GRAD: &str = "sync_batch_norm_grad";

/// What [`sync_batch_norm`] rewrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchNormSync {
    /// Batch norms in training mode that the step calls.
    pub modules: usize,
    /// Collectives put in: two in the forward and, where gradients flow, two in the backward of each.
    pub collectives: usize,
}

/// Makes every burn `BatchNorm` of the module that is in training mode normalise over the whole group.
///
/// Batch norms that are frozen or that the step does not call are left alone. After every batch statistic, in the
/// forward and in the backward pass, a custom operation is put in that takes the local value and gives the group's.
///
/// # Contract of the custom operations
/// Both have one input and one output, float `[channels, 1]`, and one scalar: `n`, the number of samples per channel
/// that the local mean was taken over (batch times spatial size). Of rank `r`, let `n_r` be that number and `m_r` the
/// input. Every rank must make the same calls in the same order; `n_r` may differ.
///
/// - `sync_batch_norm_mean` gives `sum(n_r m_r) / sum(n_r)`. For the variance that is exact too, since every rank has
///   centred with the group's mean already.
/// - `sync_batch_norm_grad` gives, on rank `q`, `sum(w_r n_r m_r) / (w_q sum(n_r))`, where `w_r` is the weight with
///   which rank `r`'s loss (and so each of its parameter gradients) enters the group's loss. If every rank's loss is a
///   *mean* over its own samples and gradients are combined sample-exactly, `w_r` is the local number of samples; if
///   losses are sums, or ranks are averaged with equal weight, all `w_r` are equal and the formula is that of the
///   forward. Only ratios of weights matter. (The gradient of the group's loss with respect to rank `r`'s activation is
///   `w_r dy_r`: the mean must be taken over those, and be divided by `w_q` again because `q`'s gradients are weighted
///   later.)
///
/// [`register_sync_batch_norm`](super::register_sync_batch_norm) implements both over an all-reduce.
///
/// # Errors
/// [`Error::Graph`] if the statistics of a batch norm in training mode cannot be found. The graph is unchanged then.
pub fn sync_batch_norm(graph: &mut StepGraph) -> Result<BatchNormSync, Error> {
    let finder = Finder { graph, uses: Uses::of(&graph.operations) };
    let mut report = BatchNormSync::default();
    // By index of the `mean_dim`.
    let mut means: BTreeMap<usize, &'static str> = BTreeMap::new();
    for norm in graph.batch_norms.iter().filter(|norm| norm.training) {
        let calls = finder.calls(norm)?;
        report.modules += usize::from(!calls.is_empty());
        for call in calls {
            let lost = |what: &str| {
                graph_error(format!(
                    "cannot find the {what} of batch norm `{}` in the captured step, so it cannot be synchronised: this \
                     burn release computes batch norm in another way than 0.22. Freeze the batch norm, or train without \
                     synchronising it",
                    norm.path
                ))
            };
            means.insert(finder.mean_dim(call.mean.id).ok_or_else(|| lost("mean"))?, SYNC_BATCH_NORM_MEAN);
            means.insert(finder.mean_dim(call.variance.id).ok_or_else(|| lost("variance"))?, SYNC_BATCH_NORM_MEAN);
            if let Some(reshaped) = finder.backward_start(call) {
                let found = finder.backward(call, reshaped).ok_or_else(|| lost("backward means"))?;
                means.extend(found.map(|mean| (mean, SYNC_BATCH_NORM_GRAD)));
            }
        }
    }
    report.collectives = means.len();
    insert(graph, means);
    Ok(report)
}

struct Finder<'a> {
    graph: &'a StepGraph,
    uses: Uses,
}

impl<'a> Finder<'a> {
    fn op(&self, index: usize) -> &'a OperationIr {
        &self.graph.operations[index]
    }

    fn maker(&self, tensor: TensorId) -> Option<&'a OperationIr> {
        self.uses.maker(tensor).map(|index| self.op(index))
    }

    fn readers(&self, tensor: TensorId) -> impl Iterator<Item = &'a OperationIr> {
        self.uses.readers(tensor).iter().map(|index| self.op(*index))
    }

    fn forward_readers(&self, tensor: TensorId) -> impl Iterator<Item = &'a OperationIr> {
        let forward = self.uses.readers(tensor).iter().filter(|index| **index < self.graph.forward_len);
        forward.map(|index| self.op(*index))
    }

    /// The calls of one batch norm with batch statistics, told by its gamma.
    fn calls(&self, norm: &BatchNormBinding) -> Result<Vec<&'a BatchNormOpIr>, Error> {
        // Training reads running statistics only to scale them by `1 - momentum`.
        let scaled = |op| operation::scaled(op).is_some();
        if !self.forward_readers(norm.running_mean).chain(self.forward_readers(norm.running_var)).all(scaled) {
            return Err(graph_error(format!(
                "batch norm `{}` is in training mode but was called on a tensor without autodiff, so it used its running \
                 statistics: compute its input from the inputs or parameters of the step, or freeze it",
                norm.path
            )));
        }
        let calls = self.forward_readers(norm.gamma).filter_map(operation::batch_norm);
        let calls: Vec<_> = calls.filter(|call| call.gamma.id == norm.gamma).collect();
        if calls.is_empty() && self.forward_readers(norm.gamma).next().is_some() {
            return Err(graph_error(format!(
                "batch norm `{}` is in training mode and its gamma is used, but not in a batch normalisation that can be \
                 synchronised: freeze it, or train without synchronising it",
                norm.path
            )));
        }
        Ok(calls)
    }

    /// Index of the mean over `[channels, n]` that a statistic is, reshapes aside.
    fn mean_dim(&self, statistic: TensorId) -> Option<usize> {
        let index = self.uses.maker(self.before_reshapes(statistic))?;
        self.is_channel_mean(self.op(index)).then_some(index)
    }

    fn is_channel_mean(&self, op: &OperationIr) -> bool {
        operation::mean_dim(op).is_some_and(|mean| mean.axis == 1 && mean.input.shape.num_dims() == 2)
    }

    fn before_reshapes(&self, mut tensor: TensorId) -> TensorId {
        while let Some(reshape) = self.maker(tensor).and_then(operation::reshape) {
            tensor = reshape.input.id;
        }
        tensor
    }

    /// The backward pass reshapes the forward's mean once; without gradients it is not there.
    fn backward_start(&self, call: &BatchNormOpIr) -> Option<TensorId> {
        let readers = self.uses.readers(call.mean.id).iter().filter(|index| **index >= self.graph.forward_len);
        readers.map(|index| self.op(*index)).find_map(|op| op.outputs().next().map(|out| out.id))
    }

    /// Follows `batch_norm_train_backward` of burn-backend from the reshaped mean to its two means.
    fn backward(&self, call: &BatchNormOpIr, mean: TensorId) -> Option<[usize; 2]> {
        let centred = self.readers(mean).find_map(|op| difference(op).filter(|s| s.rhs.id == mean))?;
        let normalized = self.readers(centred.out.id).find_map(|op| {
            product(op).filter(|p| p.lhs.id == centred.out.id && self.is_inverse_std(p.rhs.id, call.variance.id))
        })?;
        let x_hat = normalized.out.id;
        // dy * x_hat, averaged, times x_hat again.
        let weighted = self.readers(x_hat).find_map(|op| product(op).filter(|p| p.rhs.id == x_hat))?;
        let mean_weighted = self.flat_mean(weighted.out.id)?;
        let projected = self.readers(x_hat).find_map(|op| {
            product(op).filter(|p| p.lhs.id == x_hat && self.mean_dim(p.rhs.id) == Some(mean_weighted))
        })?;
        // (dy - mean(dy)) - projected. Another batch norm with the same dy, as in a residual block, has a mean(dy) of
        // its own, so the mean is looked for from here and not among the readers of dy.
        let whole =
            self.readers(projected.out.id).find_map(|op| difference(op).filter(|s| s.rhs.id == projected.out.id))?;
        let centred_grad = difference(self.maker(whole.lhs.id)?).filter(|s| s.lhs.id == weighted.lhs.id)?;
        Some([self.mean_dim(centred_grad.rhs.id)?, mean_weighted])
    }

    /// Whether a tensor is `1 / sqrt(variance + epsilon)`, reshapes aside.
    fn is_inverse_std(&self, tensor: TensorId, variance: TensorId) -> bool {
        let made = |tensor: &TensorIr| self.maker(self.before_reshapes(tensor.id));
        let inverse = self.maker(self.before_reshapes(tensor)).and_then(operation::reciprocal);
        let root = inverse.and_then(|inverse| made(&inverse.input)).and_then(operation::square_root);
        let shifted = root.and_then(|root| made(&root.input)).and_then(operation::shifted);
        shifted.is_some_and(|shifted| shifted.lhs.id == variance)
    }

    /// Index of the one mean of `tensor` over `[channels, n]`: the first two dims swapped, flattened, averaged.
    fn flat_mean(&self, tensor: TensorId) -> Option<usize> {
        let swapped = self.readers(tensor).filter_map(operation::swap_dims);
        let swapped = swapped.filter(|swap| (swap.dim1, swap.dim2) == (0, 1)).map(|swap| swap.out.id);
        let flattened = swapped.flat_map(|t| self.readers(t)).filter_map(operation::reshape);
        let flattened = flattened.map(|reshape| reshape.out.id);
        let means = flattened.flat_map(|t| self.uses.readers(t).iter().copied());
        let mut means = means.filter(|index| *index >= self.graph.forward_len && self.is_channel_mean(self.op(*index)));
        let mean = means.next()?;
        means.next().is_none().then_some(mean)
    }
}

fn insert(graph: &mut StepGraph, means: BTreeMap<usize, &'static str>) {
    let operations = std::mem::take(&mut graph.operations);
    let forward_len = graph.forward_len;
    graph.operations.reserve(operations.len() + means.len());
    for (index, mut op) in operations.into_iter().enumerate() {
        let mean = means.get(&index).zip(operation::mean_dim(&op));
        let synced = mean.map(|(id, mean)| (*id, mean.out.clone(), mean.input.shape[1]));
        let Some((id, out, samples)) = synced else {
            graph.operations.push(op);
            continue;
        };
        let local = TensorIr { id: graph.fresh_id(), ..out.clone() };
        op.visit_mut(&mut Rename(|tensor| if tensor == out.id { local.id } else { tensor }));
        graph.operations.push(op);
        let samples = ScalarIr::UInt(samples as u64);
        graph.operations.push(OperationIr::Custom(CustomOpIr::with_scalars(id, &[local], &[out], vec![samples])));
        if index < forward_len {
            graph.forward_len += 1;
        }
    }
}
