//! The feed-forward block of a transformer: columns, activation, rows.

use burn::config::Config;
use burn::module::Module;
use burn::nn::activation::{Activation, SwiGlu};
use burn::nn::transformer::PositionWiseFeedForward;
use burn::nn::{Initializer, Linear};
use burn::tensor::{Device, Tensor, activation};

use super::init::{Blueprint, agreed_seed, branch};
use super::row::{RowParallelLinear, RowParallelLinearConfig};
use super::slice::{check_features, check_linear, columns, own_part};
use crate::Error;
use crate::comm::Communicator;
use crate::tensor_parallel::functional::{
    self, Overlap, all_gather_matmul, all_gather_matmul_each, bias_activation, column_parallel, column_parallel_each,
};

const NAME: &str = "ParallelFeedForward";

/// What stands between the two layers of a [`ParallelFeedForward`].
#[derive(Config, Debug, Copy, PartialEq)]
pub enum FeedForwardActivation {
    /// `gelu(x A) B`.
    Gelu,
    /// `gelu(x A) B` with the tanh approximation.
    GeluApproximate,
    /// `relu(x A) B`.
    Relu,
    /// `(silu(x G) * x A) B`, with a gate `G` as large as `A`. Source:
    /// [arXiv:2002.05202](https://arxiv.org/abs/2002.05202).
    SwiGlu,
}

/// Configuration of a [`ParallelFeedForward`].
#[derive(Config, Debug)]
pub struct ParallelFeedForwardConfig {
    /// Input and output features.
    pub d_model: usize,
    /// Hidden features, over all ranks.
    pub d_ff: usize,
    /// Whether the layers have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// What stands between the layers. Default: Gelu.
    #[config(default = "FeedForwardActivation::Gelu")]
    pub activation: FeedForwardActivation,
    /// Whether input and output are this rank's part of the sequence. Default: false.
    #[config(default = false)]
    pub sequence_parallel: bool,
    /// How weights and biases begin; fans are those of whole layers. Not `Orthogonal`. Default: burn's for `Linear`.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/f64::sqrt(3.0), fan_out_only:false}")]
    pub initializer: Initializer,
    /// Seed of the first values, which are the same at every degree. Give each block another; default: drawn by rank 0.
    pub seed: Option<u64>,
}

impl ParallelFeedForwardConfig {
    /// Makes this rank's slices, when they are first used. Collective: the ranks agree on the seed of rank 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with fewer hidden features than ranks, or for `Initializer::Orthogonal`; those of
    /// [`Communicator`].
    pub fn init(&self, group: &Communicator, device: &Device) -> Result<ParallelFeedForward, Error> {
        let own = own_part(NAME, "d_ff", self.d_ff, group)?;
        let seed = agreed_seed(self.seed, group)?;
        let inner = |place: u64| {
            let blueprint = Blueprint {
                operation: NAME,
                d_input: self.d_model,
                d_output: self.d_ff,
                bias: self.bias,
                initializer: &self.initializer,
                seed: branch(seed, place),
            };
            blueprint.columns(own.clone(), device)
        };
        let (up, gate) = (inner(0)?, self.gated().then(|| inner(1)).transpose()?);
        let down = self.outer().with_seed(Some(branch(seed, 2))).init(group, device)?;
        Ok(self.layer(up, gate, down, group))
    }

    /// Copies this rank's slices out of whole layers, which keep their parameter ids: `up` and `gate` (for SwiGLU only)
    /// `[d_model, d_ff]`, `down` `[d_ff, d_model]`. No communication.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a layer is missing, one too many or of other dims, or with fewer hidden features
    /// than ranks.
    pub fn init_from(
        &self,
        up: &Linear,
        gate: Option<&Linear>,
        down: &Linear,
        group: &Communicator,
    ) -> Result<ParallelFeedForward, Error> {
        if gate.is_some() != self.gated() {
            let problem =
                format!("{:?} takes a gate: {}; one is given: {}", self.activation, self.gated(), gate.is_some());
            return Err(Error::invalid(NAME, problem));
        }
        let own = own_part(NAME, "d_ff", self.d_ff, group)?;
        for (what, inner) in [("up", Some(up)), ("gate", gate)] {
            inner.map_or(Ok(()), |inner| check_linear(NAME, what, inner, [self.d_model, self.d_ff], self.bias))?;
        }
        let down = self.outer().init_from(down, group)?;
        Ok(self.layer(columns(up, own.clone()), gate.map(|gate| columns(gate, own)), down, group))
    }

    fn gated(&self) -> bool {
        self.activation == FeedForwardActivation::SwiGlu
    }

    fn outer(&self) -> RowParallelLinearConfig {
        RowParallelLinearConfig::new(self.d_ff, self.d_model)
            .with_bias(self.bias)
            .with_sequence_parallel(self.sequence_parallel)
            .with_initializer(self.initializer.clone())
    }

    fn layer(
        &self,
        up: Linear,
        gate: Option<Linear>,
        down: RowParallelLinear,
        group: &Communicator,
    ) -> ParallelFeedForward {
        ParallelFeedForward {
            up,
            gate,
            down,
            activation: self.activation,
            sequence_parallel: self.sequence_parallel,
            group: group.clone(),
        }
    }
}

/// A feed-forward block of which each rank holds some hidden features.
///
/// ```text
/// Y = g(gelu(f(X) A_r) B_r) + b
/// ```
///
/// One all-reduce in the forward, *g*, and one in the backward, *f*; with `sequence_parallel` an all-gather and a
/// reduce-scatter in each, and the all-reduce of the gradient of the outer bias. There is no dropout inside: the ranks
/// would need different random numbers, which burn's generator does not give to ranks that are threads. Made by
/// [`ParallelFeedForwardConfig`].
///
/// Source: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3; with sequence parallelism
/// [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2.
#[derive(Module, Debug)]
pub struct ParallelFeedForward {
    /// This rank's columns of the inner layer, `[d_model, part(d_ff)]`.
    pub up: Linear,
    /// This rank's columns of the gate of SwiGLU, `[d_model, part(d_ff)]`.
    pub gate: Option<Linear>,
    /// The outer layer, of which this rank has `[part(d_ff), d_model]`.
    pub down: RowParallelLinear,
    #[module(skip)]
    activation: FeedForwardActivation,
    #[module(skip)]
    sequence_parallel: bool,
    #[module(skip)]
    group: Communicator,
}

impl ParallelFeedForward {
    /// This rank's slices of burn's block, without sequence parallelism. For that see
    /// [`ParallelFeedForwardConfig::init_from`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the block has dropout, or another activation than GELU and ReLU, or fewer hidden
    /// features than ranks.
    pub fn from_full(whole: &PositionWiseFeedForward, group: &Communicator) -> Result<Self, Error> {
        if whole.dropout.prob != 0.0 {
            let problem = format!("the block has a dropout of {}; set it to 0", whole.dropout.prob);
            return Err(Error::invalid(NAME, problem));
        }
        let activation = match &whole.activation {
            Activation::Gelu(gelu) if gelu.approximate => FeedForwardActivation::GeluApproximate,
            Activation::Gelu(_) => FeedForwardActivation::Gelu,
            Activation::Relu(_) => FeedForwardActivation::Relu,
            other => return Err(Error::invalid(NAME, format!("the activation {other:?} is neither GELU nor ReLU"))),
        };
        let [d_model, d_ff] = whole.linear_inner.weight.dims();
        ParallelFeedForwardConfig::new(d_model, d_ff)
            .with_bias(whole.linear_inner.bias.is_some())
            .with_activation(activation)
            .init_from(&whole.linear_inner, None, &whole.linear_outer, group)
    }

    /// This rank's slices of burn's [`SwiGlu`] and the layer after it, without sequence parallelism.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the dims do not fit, only some of the layers have biases, or with fewer hidden
    /// features than ranks.
    pub fn from_full_swiglu(whole: &SwiGlu, down: &Linear, group: &Communicator) -> Result<Self, Error> {
        let [d_model, d_ff] = whole.linear_outer.weight.dims();
        ParallelFeedForwardConfig::new(d_model, d_ff)
            .with_bias(whole.linear_outer.bias.is_some())
            .with_activation(FeedForwardActivation::SwiGlu)
            .init_from(&whole.linear_outer, Some(&whole.linear_inner), down, group)
    }

    /// Applies the block. Every rank of the group calls it, and runs backward through it.
    ///
    /// # Shapes
    /// - input and output: `[.., d_model]`, the same on all ranks; with `sequence_parallel` `[.., part(sequence),
    ///   d_model]`
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number of features, or sequence parallelism on rank 1; those of
    /// [`Communicator`].
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Result<Tensor<D>, Error> {
        check_features(NAME, &input, self.up.weight.dims()[0], &self.group)?;
        let d_ff = self.down.d_input;
        let hidden = match &self.gate {
            Some(gate) => {
                // Both layers share what enters.
                let weights = [gate.weight.val(), self.up.weight.val()];
                let overlap = Overlap::auto().over(2 * d_ff);
                let [gated, up] = match self.sequence_parallel {
                    true => all_gather_matmul_each(input, weights, &self.group, overlap)?,
                    false => column_parallel_each(input, weights, &self.group, overlap)?,
                };
                let biased = |product: Tensor<D>, layer: &Linear| {
                    let bias = layer.bias.as_ref().map(|bias| bias.val());
                    bias_activation(product, bias, functional::Activation::Identity)
                };
                activation::silu(biased(gated, gate)) * biased(up, &self.up)
            }
            None => {
                let (weight, overlap) = (self.up.weight.val(), Overlap::auto().over(d_ff));
                let product = match self.sequence_parallel {
                    true => all_gather_matmul(input, weight, &self.group, overlap)?,
                    false => column_parallel(input, weight, &self.group, overlap)?,
                };
                let activation = match self.activation {
                    FeedForwardActivation::GeluApproximate => functional::Activation::GeluApproximate,
                    FeedForwardActivation::Relu => functional::Activation::Relu,
                    _ => functional::Activation::Gelu,
                };
                bias_activation(product, self.up.bias.as_ref().map(|bias| bias.val()), activation)
            }
        };
        self.down.forward(hidden)
    }
}
