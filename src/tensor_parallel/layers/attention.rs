//! Attention with the heads split over the ranks.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Tensor};

use super::row::RowParallelLinear;
use super::slice::check_features;
use crate::Error;
use crate::comm::Communicator;
use crate::layout::copy_to_group;
use crate::tensor_parallel::functional::{Overlap, all_gather_matmul_each, column_parallel_each};

pub(super) const NAME: &str = "ParallelAttention";

/// Self-attention of which each rank has `heads / n` query heads, and the key/value heads that these look at.
///
/// ```text
/// Q_r, K_r, V_r = f(X) A_r + b_r,   Y = g(softmax(Q_r K_r^T / sqrt(d_k)) V_r B_r) + b
/// ```
///
/// One all-reduce in the forward, *g*, and one in the backward, *f*; with `sequence_parallel` an all-gather and a
/// reduce-scatter in each, and the all-reduce of the gradient of the output bias.
///
/// With fewer key/value heads than ranks (grouped-query attention,
/// [arXiv:2305.13245](https://arxiv.org/abs/2305.13245)), `n / n_kv_heads` neighbouring ranks hold the same head. Each
/// sees only what its own query heads ask of it, so the gradient of its weights is the sum over those ranks, a group of
/// their own: *f* stands before these parameters, one all-reduce more in the backward for the weights and one for the
/// biases.
///
/// The computation is that of burn's `MultiHeadAttention`, without dropout: the ranks would need different random
/// numbers, which burn's generator does not give to ranks that are threads. Made by
/// [`ParallelAttentionConfig`](super::ParallelAttentionConfig).
///
/// Source: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3; with sequence parallelism
/// [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2.
#[derive(Module, Debug)]
pub struct ParallelAttention {
    /// This rank's query heads, `[d_model, d_model / n]`.
    pub query: Linear,
    /// This rank's key heads, `[d_model, local key/value heads * d_k]`.
    pub key: Linear,
    /// This rank's value heads, as the key heads.
    pub value: Linear,
    /// The output layer, of which this rank has `[d_model / n, d_model]`.
    pub output: RowParallelLinear,
    /// Query heads of this rank.
    #[module(skip)]
    pub local_heads: usize,
    /// Key/value heads of this rank.
    #[module(skip)]
    pub local_kv_heads: usize,
    #[module(skip)]
    pub(super) causal: bool,
    #[module(skip)]
    pub(super) min_float: f64,
    #[module(skip)]
    pub(super) sequence_parallel: bool,
    #[module(skip)]
    pub(super) sharers: Option<Communicator>,
    #[module(skip)]
    pub(super) group: Communicator,
}

impl ParallelAttention {
    /// The ranks that hold the same key/value head as this one, if there are others. Its counters tell what summing the
    /// gradients of these parameters costs.
    pub fn sharers(&self) -> Option<&Communicator> {
        self.sharers.as_ref()
    }

    /// Applies the attention. Every rank of the group calls it, and runs backward through it.
    ///
    /// # Arguments
    /// - `mask_pad`: `true` where a position is padding, which gets no attention; the same on all ranks
    ///
    /// # Shapes
    /// - input and output: `[batch, sequence, d_model]`, the same on all ranks; with `sequence_parallel`
    ///   `[batch, part(sequence), d_model]`
    /// - mask: `[batch, sequence]`, whole
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number of features or a mask of other dims; those of [`Communicator`].
    pub fn forward(&self, input: Tensor<3>, mask_pad: Option<Tensor<2, Bool>>) -> Result<Tensor<3>, Error> {
        check_features(NAME, &input, self.query.weight.dims()[0], &self.group)?;
        let (query, key, value) = self.project(input)?;
        let [batch, _, sequence, _] = query.dims();
        if let Some(mask) = &mask_pad
            && mask.dims() != [batch, sequence]
        {
            let problem = format!("the mask is {:?} for a batch and sequence of {:?}", mask.dims(), [batch, sequence]);
            return Err(Error::invalid(NAME, problem));
        }
        let d_k = query.dims()[3];
        // The root of an f32, as in burn, for the same numbers in f64 as well.
        let mut scores = query.matmul(key.transpose()).div_scalar((d_k as f32).sqrt());
        if let Some(mask) = mask_pad {
            scores = scores.mask_fill(mask.reshape([batch, 1, 1, sequence]), self.min_float);
        }
        if self.causal {
            let later = Tensor::<2, Bool>::tril_mask([sequence, sequence], 0, &scores.device());
            scores = scores.mask_fill(later.reshape([1, 1, sequence, sequence]), self.min_float);
        }
        let context = softmax(scores, 3).matmul(value).swap_dims(1, 2);
        self.output.forward(context.reshape([batch, sequence, self.local_heads * d_k]))
    }

    /// Queries, keys and values `[batch, local heads, sequence, d_k]`, every key/value head repeated for the query
    /// heads that look at it.
    fn project(&self, input: Tensor<3>) -> Result<(Tensor<4>, Tensor<4>, Tensor<4>), Error> {
        let bias = |layer: &Linear| layer.bias.as_ref().map(|bias| bias.val());
        let weights = [&self.query, &self.key, &self.value].map(|layer| layer.weight.val());
        let spread = |tensor: Tensor<3>| repeat(heads(tensor, self.local_kv_heads), self.local_heads);
        let Some(sharers) = &self.sharers else {
            let [query, key, value] = self.multiply(input, weights)?;
            let query = heads(biased(query, bias(&self.query)), self.local_heads);
            let (key, value) = (biased(key, bias(&self.key)), biased(value, bias(&self.value)));
            return Ok((query, spread(key), spread(value)));
        };
        let [of_query, of_key, of_value] = weights;
        let width = of_key.dims()[1];
        let both = copy_to_group(Tensor::cat(vec![of_key, of_value], 1), sharers)?;
        let biases = match (bias(&self.key), bias(&self.value)) {
            (Some(key), Some(value)) => Some(copy_to_group(Tensor::cat(vec![key, value], 0), sharers)?),
            _ => None,
        };
        let [query, both] = self.multiply(input, [of_query, both])?;
        let query = heads(biased(query, bias(&self.query)), self.local_heads);
        let both = biased(both, biases);
        Ok((query, spread(both.clone().narrow(2, 0, width)), spread(both.narrow(2, width, width))))
    }

    /// What enters is shared by the products: one collective forward, if any, and one backward.
    fn multiply<const N: usize>(&self, input: Tensor<3>, weights: [Tensor<2>; N]) -> Result<[Tensor<3>; N], Error> {
        // All ranks have as many heads.
        let own: usize = weights.iter().map(|weight| weight.dims()[1]).sum();
        let overlap = Overlap::auto().over(own * self.group.size());
        match self.sequence_parallel {
            true => all_gather_matmul_each(input, weights, &self.group, overlap),
            false => column_parallel_each(input, weights, &self.group, overlap),
        }
    }
}

fn biased(product: Tensor<3>, bias: Option<Tensor<1>>) -> Tensor<3> {
    match bias {
        Some(bias) => product + bias.unsqueeze(),
        None => product,
    }
}

/// `[batch, sequence, heads * d_k]` to `[batch, heads, sequence, d_k]`.
fn heads(tensor: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, sequence, width] = tensor.dims();
    tensor.reshape([batch, sequence, heads, width / heads]).swap_dims(1, 2)
}

/// `[batch, some, sequence, d_k]` to `[batch, all, sequence, d_k]`: each head `all / some` times, next to one another.
fn repeat(tensor: Tensor<4>, all: usize) -> Tensor<4> {
    let [batch, some, sequence, d_k] = tensor.dims();
    if some == all {
        return tensor;
    }
    let spread: Tensor<5> = tensor.reshape([batch, some, 1, sequence, d_k]);
    spread.repeat_dim(2, all / some).reshape([batch, all, sequence, d_k])
}
