//! A table of embeddings split by the vocabulary.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Embedding, Initializer};
use burn::tensor::module::{embedding, linear};
use burn::tensor::{Device, Int, Tensor};

use super::ids::{check_ids, localize};
use super::init::{agreed_seed, table};
use super::region::{enter, leave};
use super::slice::{check_features, cut, own_part};
use crate::Error;
use crate::comm::{Communicator, part};

const NAME: &str = "VocabParallelEmbedding";

/// Configuration of a [`VocabParallelEmbedding`].
#[derive(Config, Debug)]
pub struct VocabParallelEmbeddingConfig {
    /// Vectors in the table, over all ranks.
    pub n_embedding: usize,
    /// Size of each vector.
    pub d_model: usize,
    /// Whether the output is this rank's part of the sequence. Default: false.
    #[config(default = false)]
    pub sequence_parallel: bool,
    /// How the table begins: one that needs no fans. Default: burn's for `Embedding`.
    #[config(default = "Initializer::Normal{mean:0.0, std:1.0}")]
    pub initializer: Initializer,
    /// Seed of the first values, which are the same at every degree. Give each layer another; default: drawn by rank 0.
    pub seed: Option<u64>,
}

impl VocabParallelEmbeddingConfig {
    /// Makes this rank's vectors, when they are first used. Collective: the ranks agree on the seed of rank 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with fewer vectors than ranks, or for an initializer that needs fans; those of
    /// [`Communicator`].
    pub fn init(&self, group: &Communicator, device: &Device) -> Result<VocabParallelEmbedding, Error> {
        let own = own_part(NAME, "n_embedding", self.n_embedding, group)?;
        let seed = agreed_seed(self.seed, group)?;
        Ok(self.layer(table(NAME, &self.initializer, seed, own, self.d_model, device)?, group))
    }

    /// Copies this rank's vectors out of a whole table, which keeps its parameter id. No communication.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the table is of other dims, or there are fewer vectors than ranks.
    pub fn init_from(&self, whole: &Embedding, group: &Communicator) -> Result<VocabParallelEmbedding, Error> {
        let (found, dims) = (whole.weight.dims(), [self.n_embedding, self.d_model]);
        if found != dims {
            let problem = format!("the table is configured as {dims:?}, but the given one is {found:?}");
            return Err(Error::invalid(NAME, problem));
        }
        let own = own_part(NAME, "n_embedding", self.n_embedding, group)?;
        Ok(self.layer(cut(&whole.weight, [own, 0..self.d_model]), group))
    }

    fn layer(&self, weight: Param<Tensor<2>>, group: &Communicator) -> VocabParallelEmbedding {
        VocabParallelEmbedding {
            weight,
            n_embedding: self.n_embedding,
            sequence_parallel: self.sequence_parallel,
            group: group.clone(),
        }
    }
}

/// A table of embeddings of which each rank holds a range of the vocabulary.
///
/// ```text
/// Y = g(sum_r E_r[ids in r's range, 0 elsewhere])
/// ```
///
/// Each rank looks up what it has and leaves zeros elsewhere; *g*
/// ([`reduce_from_group`](crate::layout::reduce_from_group)) or, with `sequence_parallel`, a reduce-scatter adds them
/// up. In the backward each rank gets the gradient of its own vectors. [`logits`](Self::logits) uses the same table as
/// the output layer. Made by [`VocabParallelEmbeddingConfig`].
///
/// Source: Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3; with sequence parallelism
/// [arXiv:2205.05198](https://arxiv.org/abs/2205.05198), section 4.2.2.
#[derive(Module, Debug)]
pub struct VocabParallelEmbedding {
    /// This rank's vectors, `[part(n_embedding), d_model]`.
    pub weight: Param<Tensor<2>>,
    /// Vectors over all ranks.
    #[module(skip)]
    pub n_embedding: usize,
    #[module(skip)]
    sequence_parallel: bool,
    #[module(skip)]
    group: Communicator,
}

impl VocabParallelEmbedding {
    /// This rank's vectors of a burn table, without sequence parallelism. For that see
    /// [`VocabParallelEmbeddingConfig::init_from`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] with fewer vectors than ranks.
    pub fn from_full(whole: &Embedding, group: &Communicator) -> Result<Self, Error> {
        let [n_embedding, d_model] = whole.weight.dims();
        VocabParallelEmbeddingConfig::new(n_embedding, d_model).init_from(whole, group)
    }

    /// Looks the ids up. Every rank of the group calls it, and runs backward through it.
    ///
    /// # Shapes
    /// - ids: `[batch, sequence]`, the same on all ranks
    /// - output: `[batch, sequence, d_model]`, the same on all ranks; with `sequence_parallel`
    ///   `[batch, part(sequence), d_model]`
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an id outside of the table, for which the ids are read; those of
    /// [`Communicator`].
    pub fn forward(&self, ids: Tensor<2, Int>) -> Result<Tensor<3>, Error> {
        check_ids(NAME, &ids, self.n_embedding)?;
        let own = part(self.n_embedding, self.group.size(), self.group.rank());
        let (local, elsewhere) = localize(ids, own);
        let [batch, sequence] = elsewhere.dims();
        let found = embedding(self.weight.val(), local).mask_fill(elsewhere.reshape([batch, sequence, 1]), 0.0);
        leave(NAME, found, self.sequence_parallel, &self.group)
    }

    /// The scores of this rank's part of the vocabulary, with the table as the weight of the output layer ("tied"): for
    /// [`vocab_parallel_cross_entropy`](super::vocab_parallel_cross_entropy). Every rank of the group calls it, and
    /// runs backward through it.
    ///
    /// # Shapes
    /// - hidden: `[.., d_model]`, the same on all ranks; with `sequence_parallel` `[.., part(sequence), d_model]`
    /// - output: `[.., part(n_embedding)]`
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number of features, or sequence parallelism on rank 1; those of
    /// [`Communicator`].
    pub fn logits<const D: usize>(&self, hidden: Tensor<D>) -> Result<Tensor<D>, Error> {
        check_features(NAME, &hidden, self.weight.dims()[1], &self.group)?;
        let hidden = enter(NAME, hidden, self.sequence_parallel, &self.group)?;
        Ok(linear(hidden, self.weight.val().transpose(), None))
    }
}
