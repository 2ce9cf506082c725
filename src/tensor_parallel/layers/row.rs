//! A linear layer split by its input features.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Initializer, Linear};
use burn::tensor::{Device, Tensor};

use super::init::{Blueprint, agreed_seed};
use super::slice::{check_features, check_linear, own_part, rows};
use crate::Error;
use crate::comm::Communicator;
use crate::layout::{copy_to_group, scatter_to_group};
use crate::tensor_parallel::functional::{Overlap, matmul_reduce_scatter, row_parallel};

const NAME: &str = "RowParallelLinear";

/// Configuration of a [`RowParallelLinear`].
#[derive(Config, Debug)]
pub struct RowParallelLinearConfig {
    /// Input features, over all ranks.
    pub d_input: usize,
    /// Output features.
    pub d_output: usize,
    /// Whether there is a bias: whole on every rank, added once, after the sum. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Whether the input is this rank's part of the features, as a column-parallel layer leaves it; if not, it is
    /// replicated and cut here. Default: true.
    #[config(default = true)]
    pub input_is_parallel: bool,
    /// Whether the output is this rank's part of the sequence. Default: false.
    #[config(default = false)]
    pub sequence_parallel: bool,
    /// How weight and bias begin; fans are those of the whole layer. Not `Orthogonal`. Default: burn's for `Linear`.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/f64::sqrt(3.0), fan_out_only:false}")]
    pub initializer: Initializer,
    /// Seed of the first values, which are the same at every degree. Give each layer another; default: drawn by rank 0.
    pub seed: Option<u64>,
}

impl RowParallelLinearConfig {
    /// Makes this rank's rows, when they are first used. Collective: the ranks agree on the seed of rank 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with fewer input features than ranks, or for `Initializer::Orthogonal`; those of
    /// [`Communicator`].
    pub fn init(&self, group: &Communicator, device: &Device) -> Result<RowParallelLinear, Error> {
        let own = own_part(NAME, "d_input", self.d_input, group)?;
        let blueprint = Blueprint {
            operation: NAME,
            d_input: self.d_input,
            d_output: self.d_output,
            bias: self.bias,
            initializer: &self.initializer,
            seed: agreed_seed(self.seed, group)?,
        };
        Ok(self.layer(blueprint.rows(own, device)?, group))
    }

    /// Copies this rank's rows, and the bias, out of a whole layer, which keeps its parameter ids. No communication.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the layer is of other dims, or there are fewer input features than ranks.
    pub fn init_from(&self, whole: &Linear, group: &Communicator) -> Result<RowParallelLinear, Error> {
        check_linear(NAME, "the layer", whole, [self.d_input, self.d_output], self.bias)?;
        let own = own_part(NAME, "d_input", self.d_input, group)?;
        Ok(self.layer(rows(whole, own), group))
    }

    fn layer(&self, local: Linear, group: &Communicator) -> RowParallelLinear {
        RowParallelLinear {
            weight: local.weight,
            bias: local.bias,
            d_input: self.d_input,
            input_is_parallel: self.input_is_parallel,
            sequence_parallel: self.sequence_parallel,
            group: group.clone(),
        }
    }
}

/// A linear layer of which each rank holds some input features: rows of the weight; the bias is whole on all.
///
/// ```text
/// Y = g(X_0 A_0 + .. + X_(n-1) A_(n-1)) + b
/// ```
///
/// The products are summed by *g* ([`reduce_from_group`](crate::layout::reduce_from_group)), whose backward
/// communicates nothing; with `sequence_parallel` by a reduce-scatter whose backward is an all-gather. The bias is
/// added after the sum. With `sequence_parallel` each rank adds it to other rows, so its gradient is summed over the
/// ranks: one more all-reduce, of `d_output` elements, in the backward. The products overlap with their collectives,
/// see [`functional`](crate::tensor_parallel::functional). Made by [`RowParallelLinearConfig`].
///
/// Source: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3; with sequence parallelism
/// [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2.
#[derive(Module, Debug)]
pub struct RowParallelLinear {
    /// This rank's rows, `[part(d_input), d_output]`.
    pub weight: Param<Tensor<2>>,
    /// The bias, `[d_output]`, the same on all ranks.
    pub bias: Option<Param<Tensor<1>>>,
    /// Input features over all ranks.
    #[module(skip)]
    pub d_input: usize,
    #[module(skip)]
    input_is_parallel: bool,
    #[module(skip)]
    sequence_parallel: bool,
    #[module(skip)]
    group: Communicator,
}

impl RowParallelLinear {
    /// This rank's rows of a burn layer, for a parallel input, without sequence parallelism. For other options see
    /// [`RowParallelLinearConfig::init_from`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with fewer input features than ranks.
    pub fn from_full(whole: &Linear, group: &Communicator) -> Result<Self, Error> {
        let [d_input, d_output] = whole.weight.dims();
        RowParallelLinearConfig::new(d_input, d_output).with_bias(whole.bias.is_some()).init_from(whole, group)
    }

    /// Applies the layer. Every rank of the group calls it, and runs backward through it.
    ///
    /// # Shapes
    /// - input: `[.., part(d_input)]`, or `[.., d_input]`, the same on all ranks, if not `input_is_parallel`
    /// - output: `[.., d_output]`, the same on all ranks; with `sequence_parallel` `[.., part(sequence), d_output]`
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number of features, or sequence parallelism on rank 1; those of
    /// [`Communicator`].
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Result<Tensor<D>, Error> {
        let input = if self.input_is_parallel {
            input
        } else {
            check_features(NAME, &input, self.d_input, &self.group)?;
            scatter_to_group(input, D - 1, &self.group)?
        };
        check_features(NAME, &input, self.weight.dims()[0], &self.group)?;
        let (weight, group, overlap) = (self.weight.val(), &self.group, Overlap::auto().over(self.d_input));
        let output = match self.sequence_parallel {
            true => matmul_reduce_scatter(input, weight, group, overlap)?,
            false => row_parallel(input, weight, group, overlap)?,
        };
        let Some(bias) = &self.bias else { return Ok(output) };
        let bias = match self.sequence_parallel {
            true => copy_to_group(bias.val(), &self.group)?,
            false => bias.val(),
        };
        Ok(output + bias.unsqueeze())
    }
}
