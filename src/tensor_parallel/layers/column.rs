//! A linear layer split by its output features.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Initializer, Linear};
use burn::tensor::module::linear;
use burn::tensor::{Device, Tensor};

use super::init::{Blueprint, agreed_seed};
use super::slice::{check_features, check_linear, columns, own_part};
use crate::Error;
use crate::comm::Communicator;
use crate::layout::gather_from_group;
use crate::tensor_parallel::functional::{Overlap, all_gather_matmul, column_parallel};

const NAME: &str = "ColumnParallelLinear";

/// Configuration of a [`ColumnParallelLinear`].
#[derive(Config, Debug)]
pub struct ColumnParallelLinearConfig {
    /// Input features.
    pub d_input: usize,
    /// Output features, over all ranks.
    pub d_output: usize,
    /// Whether there is a bias, split like the output. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Whether the output is gathered, so that every rank gets all features. Default: false.
    #[config(default = false)]
    pub gather_output: bool,
    /// Whether the input is this rank's part of the sequence, gathered here. Default: false.
    #[config(default = false)]
    pub sequence_parallel: bool,
    /// How weight and bias begin; fans are those of the whole layer. Not `Orthogonal`. Default: burn's for `Linear`.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/f64::sqrt(3.0), fan_out_only:false}")]
    pub initializer: Initializer,
    /// Seed of the first values, which are the same at every degree. Give each layer another; default: drawn by rank 0.
    pub seed: Option<u64>,
}

impl ColumnParallelLinearConfig {
    /// Makes this rank's columns, when they are first used. Collective: the ranks agree on the seed of rank 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with fewer output features than ranks, or for `Initializer::Orthogonal`; those of
    /// [`Communicator`].
    pub fn init(&self, group: &Communicator, device: &Device) -> Result<ColumnParallelLinear, Error> {
        let own = own_part(NAME, "d_output", self.d_output, group)?;
        let blueprint = Blueprint {
            operation: NAME,
            d_input: self.d_input,
            d_output: self.d_output,
            bias: self.bias,
            initializer: &self.initializer,
            seed: agreed_seed(self.seed, group)?,
        };
        Ok(self.layer(blueprint.columns(own, device)?, group))
    }

    /// Copies this rank's columns out of a whole layer, which keeps its parameter ids. No communication.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the layer is of other dims, or there are fewer output features than ranks.
    pub fn init_from(&self, whole: &Linear, group: &Communicator) -> Result<ColumnParallelLinear, Error> {
        check_linear(NAME, "the layer", whole, [self.d_input, self.d_output], self.bias)?;
        let own = own_part(NAME, "d_output", self.d_output, group)?;
        Ok(self.layer(columns(whole, own), group))
    }

    fn layer(&self, local: Linear, group: &Communicator) -> ColumnParallelLinear {
        ColumnParallelLinear {
            weight: local.weight,
            bias: local.bias,
            d_output: self.d_output,
            gather_output: self.gather_output,
            sequence_parallel: self.sequence_parallel,
            group: group.clone(),
        }
    }
}

/// A linear layer of which each rank holds some output features: columns of the weight, part of the bias.
///
/// ```text
/// Y = X [A_0, .., A_(n-1)] + [b_0, .., b_(n-1)],   Y_r = f(X) A_r + b_r
/// ```
///
/// The input passes *f* ([`copy_to_group`](crate::layout::copy_to_group)), whose backward is the all-reduce of `dX`;
/// with `sequence_parallel` an all-gather whose backward is a reduce-scatter. The products overlap with them, see
/// [`functional`](crate::tensor_parallel::functional). Features are divided as [`part`](crate::comm::part) does. Made
/// by [`ColumnParallelLinearConfig`].
///
/// Source: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3; with sequence parallelism
/// [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2.
#[derive(Module, Debug)]
pub struct ColumnParallelLinear {
    /// This rank's columns, `[d_input, part(d_output)]`.
    pub weight: Param<Tensor<2>>,
    /// Their biases, `[part(d_output)]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// Output features over all ranks.
    #[module(skip)]
    pub d_output: usize,
    #[module(skip)]
    gather_output: bool,
    #[module(skip)]
    sequence_parallel: bool,
    #[module(skip)]
    group: Communicator,
}

impl ColumnParallelLinear {
    /// This rank's columns of a burn layer, without gathering or sequence parallelism. For those see
    /// [`ColumnParallelLinearConfig::init_from`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with fewer output features than ranks.
    pub fn from_full(whole: &Linear, group: &Communicator) -> Result<Self, Error> {
        let [d_input, d_output] = whole.weight.dims();
        ColumnParallelLinearConfig::new(d_input, d_output).with_bias(whole.bias.is_some()).init_from(whole, group)
    }

    /// Applies the layer. Every rank of the group calls it, and runs backward through it.
    ///
    /// # Shapes
    /// - input: `[.., d_input]`, the same on all ranks; with `sequence_parallel` `[.., part(sequence), d_input]`
    /// - output: `[.., part(d_output)]`, or `[.., d_output]` if gathered
    ///
    /// A gathered output is replicated: all ranks are to go on with it in the same way.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number of features, or sequence parallelism on rank 1; those of
    /// [`Communicator`].
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Result<Tensor<D>, Error> {
        check_features(NAME, &input, self.weight.dims()[0], &self.group)?;
        let (weight, group, overlap) = (self.weight.val(), &self.group, Overlap::auto().over(self.d_output));
        let output = match self.sequence_parallel {
            true => all_gather_matmul(input, weight, group, overlap)?,
            false => column_parallel(input, weight, group, overlap)?,
        };
        let output = match &self.bias {
            Some(bias) => output + bias.val().unsqueeze(),
            None => output,
        };
        match self.gather_output {
            true => gather_from_group(output, D - 1, &self.group),
            false => Ok(output),
        }
    }

    /// The product alone, for an input that has already entered the region through *f* or a gather: several layers on
    /// the same input share one.
    ///
    /// # Shapes
    /// - input: `[.., d_input]`
    /// - output: `[.., part(d_output)]`
    ///
    /// # Panics
    /// As burn's `Linear`, if the input has another number of features.
    pub fn forward_local<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        linear(input, self.weight.val(), self.bias.as_ref().map(|bias| bias.val()))
    }
}
