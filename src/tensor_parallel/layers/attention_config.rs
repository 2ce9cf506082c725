//! How attention is split: which rank has which heads.

use std::ops::Range;

use burn::config::Config;
use burn::nn::attention::MultiHeadAttention;
use burn::nn::{Initializer, Linear};
use burn::tensor::Device;

use super::attention::{NAME, ParallelAttention};
use super::init::{Blueprint, agreed_seed, branch};
use super::row::{RowParallelLinear, RowParallelLinearConfig};
use super::slice::{check_linear, columns};
use crate::Error;
use crate::comm::{Communicator, part};

/// Configuration of a [`ParallelAttention`].
#[derive(Config, Debug)]
pub struct ParallelAttentionConfig {
    /// Input and output features; a multiple of `n_heads`.
    pub d_model: usize,
    /// Query heads, over all ranks; a multiple of the ranks.
    pub n_heads: usize,
    /// Key/value heads, over all ranks: a divisor of `n_heads`, and a multiple or a divisor of the ranks. Default: as
    /// many as query heads.
    pub n_kv_heads: Option<usize>,
    /// Whether query, key and value have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Whether the output layer has a bias. Default: true.
    #[config(default = true)]
    pub output_bias: bool,
    /// Whether a position sees only itself and what comes before. Default: false.
    #[config(default = false)]
    pub causal: bool,
    /// Score of what is masked, as burn's. Default: -1.0e4.
    #[config(default = -1.0e4)]
    pub min_float: f64,
    /// Whether input and output are this rank's part of the sequence. Default: false.
    #[config(default = false)]
    pub sequence_parallel: bool,
    /// How weights and biases begin; fans are those of whole layers. Not `Orthogonal`. Default: burn's for `Linear`.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/f64::sqrt(3.0), fan_out_only:false}")]
    pub initializer: Initializer,
    /// Seed of the first values, which are the same at every degree. Give each block another; default: drawn by rank 0.
    pub seed: Option<u64>,
}

/// The heads of one rank.
struct HeadShare {
    heads: usize,
    d_k: usize,
    kv_heads: Range<usize>,
    /// Ranks that have the same key/value head.
    sharers: usize,
}

impl ParallelAttentionConfig {
    /// Makes this rank's slices, when they are first used. Collective: the ranks agree on the seed of rank 0, and those
    /// that share a key/value head form a group.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the heads do not divide the features or the ranks not the heads, or for
    /// `Initializer::Orthogonal`; those of [`Communicator`].
    pub fn init(&self, group: &Communicator, device: &Device) -> Result<ParallelAttention, Error> {
        let share = self.share(group)?;
        let seed = agreed_seed(self.seed, group)?;
        let make = |place: u64, heads: usize, own: Range<usize>| {
            let blueprint = Blueprint {
                operation: NAME,
                d_input: self.d_model,
                d_output: heads * share.d_k,
                bias: self.bias,
                initializer: &self.initializer,
                seed: branch(seed, place),
            };
            blueprint.columns(own, device)
        };
        let (kv_heads, [own, own_kv]) = (self.kv_heads(), self.widths(&share, group));
        let query = make(0, self.n_heads, own)?;
        let (key, value) = (make(1, kv_heads, own_kv.clone())?, make(2, kv_heads, own_kv)?);
        let output = self.output().with_seed(Some(branch(seed, 3))).init(group, device)?;
        self.layer(share, query, key, value, output, group)
    }

    /// Copies this rank's heads out of whole layers, which keep their parameter ids: `query` and `output` `[d_model,
    /// d_model]`, `key` and `value` `[d_model, n_kv_heads * d_k]`. Collective only if ranks share key/value heads:
    /// these form a group.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a layer is of other dims, the heads do not divide the features or the ranks not
    /// the heads; those of [`Communicator`].
    pub fn init_from(
        &self,
        query: &Linear,
        key: &Linear,
        value: &Linear,
        output: &Linear,
        group: &Communicator,
    ) -> Result<ParallelAttention, Error> {
        let share = self.share(group)?;
        let kv_width = self.kv_heads() * share.d_k;
        check_linear(NAME, "query", query, [self.d_model, self.d_model], self.bias)?;
        check_linear(NAME, "key", key, [self.d_model, kv_width], self.bias)?;
        check_linear(NAME, "value", value, [self.d_model, kv_width], self.bias)?;
        let [own, own_kv] = self.widths(&share, group);
        let (query, key, value) = (columns(query, own), columns(key, own_kv.clone()), columns(value, own_kv));
        let output = self.output().init_from(output, group)?;
        self.layer(share, query, key, value, output, group)
    }

    fn kv_heads(&self) -> usize {
        self.n_kv_heads.unwrap_or(self.n_heads)
    }

    fn output(&self) -> RowParallelLinearConfig {
        RowParallelLinearConfig::new(self.d_model, self.d_model)
            .with_bias(self.output_bias)
            .with_sequence_parallel(self.sequence_parallel)
            .with_initializer(self.initializer.clone())
    }

    fn share(&self, group: &Communicator) -> Result<HeadShare, Error> {
        let (d_model, heads, kv_heads, size) = (self.d_model, self.n_heads, self.kv_heads(), group.size());
        let whole = |large: usize, small: usize| small > 0 && large > 0 && large.is_multiple_of(small);
        let problem = if !whole(d_model, heads) {
            format!("n_heads {heads} does not divide d_model {d_model}")
        } else if !whole(heads, kv_heads) {
            format!("n_kv_heads {kv_heads} does not divide n_heads {heads}")
        } else if !whole(heads, size) {
            format!("the {size} ranks of group `{}` do not divide n_heads {heads}: use another degree", group.group())
        } else if !whole(kv_heads, size) && !whole(size, kv_heads) {
            let name = group.group();
            format!(
                "n_kv_heads {kv_heads} and the {size} ranks of group `{name}` do not divide each other: use another degree"
            )
        } else {
            let sharers = (size / kv_heads).max(1);
            let kv_heads = match sharers {
                1 => part(kv_heads, size, group.rank()),
                _ => part(kv_heads, kv_heads, group.rank() / sharers),
            };
            return Ok(HeadShare { heads: heads / size, d_k: d_model / heads, kv_heads, sharers });
        };
        Err(Error::invalid(NAME, problem))
    }

    /// This rank's columns of the query layer, and of the key and value layers.
    fn widths(&self, share: &HeadShare, group: &Communicator) -> [Range<usize>; 2] {
        let first = group.rank() * share.heads;
        [first..first + share.heads, share.kv_heads.clone()].map(|heads| heads.start * share.d_k..heads.end * share.d_k)
    }

    fn layer(
        &self,
        share: HeadShare,
        query: Linear,
        key: Linear,
        value: Linear,
        output: RowParallelLinear,
        group: &Communicator,
    ) -> Result<ParallelAttention, Error> {
        let sharers = match share.sharers {
            1 => None,
            _ => Some(group.split(share.kv_heads.start as u64, group.rank() as i64)?),
        };
        Ok(ParallelAttention {
            query,
            key,
            value,
            output,
            local_heads: share.heads,
            local_kv_heads: share.kv_heads.len(),
            causal: self.causal,
            min_float: self.min_float,
            sequence_parallel: self.sequence_parallel,
            sharers,
            group: group.clone(),
        })
    }
}

impl ParallelAttention {
    /// This rank's heads of burn's attention, without sequence parallelism; `causal` hides later positions. For more
    /// see [`ParallelAttentionConfig::init_from`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the attention has dropout or a quiet softmax, if only some of query, key and value
    /// have biases, or if the ranks do not divide the heads.
    pub fn from_full(whole: &MultiHeadAttention, causal: bool, group: &Communicator) -> Result<Self, Error> {
        if whole.dropout.prob != 0.0 || whole.quiet_softmax {
            let problem = format!(
                "the attention has a dropout of {} and quiet_softmax = {}; set them to 0 and false",
                whole.dropout.prob, whole.quiet_softmax
            );
            return Err(Error::invalid(NAME, problem));
        }
        ParallelAttentionConfig::new(whole.d_model, whole.n_heads)
            .with_bias(whole.query.bias.is_some())
            .with_output_bias(whole.output.bias.is_some())
            .with_causal(causal)
            .with_min_float(whole.min_float)
            .init_from(&whole.query, &whole.key, &whole.value, &whole.output, group)
    }
}
