//! Cross-entropy of logits split by the vocabulary.

use burn::config::Config;
use burn::tensor::{Bool, DType, Int, Tensor};

use super::ids::{check_ids, localize};
use crate::Error;
use crate::comm::{Communicator, ReduceOp, part};
use crate::layout::reduce_from_group;
#[cfg(feature = "cubecl")]
use crate::tensor_parallel::kernels;

const NAME: &str = "vocab_parallel_cross_entropy";

/// The cross-entropy of every row, from logits of which each rank holds a range of the vocabulary.
///
/// ```text
/// m = max_r max_j z_rj                                    all-reduce (max), no gradient
/// s = sum_r sum_j exp(z_rj - m),   t = z_target - m       one all-reduce (sum) of both, g
/// loss = ln s - t
/// ```
///
/// The whole logits are never gathered: two collectives of 1 and 2 numbers per row. *g* passes the gradients of `s` and
/// `t` on as they are, for every rank computes the same loss from the same sums; so `dz_rj = (exp(z_rj - m) / s - [j is
/// the target]) dloss`, the gradient of one device, is made by each rank for its own part, without communication.
/// 16-bit logits are computed in `f32`. On CubeCL's devices (features `wgpu`, `cuda`) these are three kernels, of which
/// the last writes `dz` in the backward, and nothing as large as the logits is made beside.
///
/// # Arguments
/// - `targets`: the same on all ranks
/// - `vocabulary`: size over all ranks, divided as [`part`](crate::comm::part) does
/// - `pad_tokens`: targets whose rows cost nothing and get no gradient; they need not be in the vocabulary
///
/// # Shapes
/// - logits: `[rows, part(vocabulary)]`, as a [`ColumnParallelLinear`](super::ColumnParallelLinear) leaves them
/// - targets: `[rows]`
/// - output: `[rows]`, the same on all ranks
///
/// Source: `_VocabParallelCrossEntropy` of Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section
/// 3.
///
/// # Errors
/// [`Error::InvalidArgument`] if the logits are not this rank's part, for another number of targets, or one outside of
/// the vocabulary, for which the targets are read; those of [`Communicator`].
pub fn vocab_parallel_cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    vocabulary: usize,
    pad_tokens: &[i64],
    group: &Communicator,
) -> Result<Tensor<1>, Error> {
    let [rows, width] = logits.dims();
    let (rank, size) = (group.rank(), group.size());
    let own = part(vocabulary, size, rank);
    if width != own.len() || own.is_empty() || targets.dims() != [rows] {
        let problem = format!(
            "rank {rank} of {size} has {} of {vocabulary} columns, at least 1, and a target for each row; it brings \
             logits {:?} and targets {:?}",
            own.len(),
            [rows, width],
            targets.dims()
        );
        return Err(Error::invalid(NAME, problem));
    }
    let padded = padding(&targets, pad_tokens);
    let targets = match &padded {
        Some(padded) => targets.mask_fill(padded.clone(), 0),
        None => targets,
    };
    check_ids(NAME, &targets, vocabulary)?;
    #[cfg(feature = "cubecl")]
    {
        let (local, elsewhere) = localize(targets.clone(), own.clone());
        if let Some(losses) = kernels::vocab_parallel_losses(&logits, local.mask_fill(elsewhere, -1), group) {
            return Ok(match padded {
                Some(padded) => losses?.mask_fill(padded, 0.0),
                None => losses?,
            });
        }
    }
    let logits = match logits.dtype() {
        DType::F16 | DType::BF16 => logits.cast(DType::F32),
        _ => logits,
    };

    let mut most = logits.clone().detach().max_dim(1);
    if size > 1 {
        most = group.all_reduce(most, ReduceOp::Max)?;
    }
    let shifted = logits - most;
    let (local, elsewhere) = localize(targets.reshape([rows, 1]), own);
    let target = shifted.clone().gather(1, local).mask_fill(elsewhere, 0.0);
    let sums = reduce_from_group(Tensor::cat(vec![shifted.exp().sum_dim(1), target], 1), group)?;
    let losses = (sums.clone().narrow(1, 0, 1).log() - sums.narrow(1, 1, 1)).reshape([rows]);
    Ok(match padded {
        Some(padded) => losses.mask_fill(padded, 0.0),
        None => losses,
    })
}

fn padding(targets: &Tensor<1, Int>, pad_tokens: &[i64]) -> Option<Tensor<1, Bool>> {
    pad_tokens.iter().map(|&token| targets.clone().equal_scalar(token)).reduce(Tensor::bool_or)
}

/// Configuration of a [`VocabParallelCrossEntropy`].
#[derive(Config, Debug)]
pub struct VocabParallelCrossEntropyConfig {
    /// Size of the vocabulary over all ranks.
    pub vocabulary: usize,
    /// Targets whose rows do not count. They need not be in the vocabulary. Default: none.
    pub pad_tokens: Option<Vec<i64>>,
}

impl VocabParallelCrossEntropyConfig {
    /// Makes the loss. No communication.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a vocabulary smaller than the group.
    pub fn init(&self, group: &Communicator) -> Result<VocabParallelCrossEntropy, Error> {
        super::slice::own_part(NAME, "vocabulary", self.vocabulary, group)?;
        let pad_tokens = self.pad_tokens.clone().unwrap_or_default();
        Ok(VocabParallelCrossEntropy { vocabulary: self.vocabulary, pad_tokens, group: group.clone() })
    }
}

/// The mean of [`vocab_parallel_cross_entropy`] over the rows that count, as burn's `CrossEntropyLoss`. Made by
/// [`VocabParallelCrossEntropyConfig`].
#[derive(Debug, Clone)]
pub struct VocabParallelCrossEntropy {
    vocabulary: usize,
    pad_tokens: Vec<i64>,
    group: Communicator,
}

impl VocabParallelCrossEntropy {
    /// The mean loss; NaN, as burn's, if no row counts. Every rank of the group calls it.
    ///
    /// # Shapes
    /// - logits: `[rows, part(vocabulary)]`
    /// - targets: `[rows]`, the same on all ranks
    /// - output: `[1]`, the same on all ranks
    ///
    /// # Errors
    /// Those of [`vocab_parallel_cross_entropy`].
    pub fn forward(&self, logits: Tensor<2>, targets: Tensor<1, Int>) -> Result<Tensor<1>, Error> {
        let padded = padding(&targets, &self.pad_tokens);
        let losses = vocab_parallel_cross_entropy(logits, targets, self.vocabulary, &self.pad_tokens, &self.group)?;
        Ok(match padded {
            Some(padded) => {
                let counted = losses.ones_like().detach().mask_fill(padded, 0.0).sum();
                losses.sum() / counted
            }
            None => losses.mean(),
        })
    }
}
