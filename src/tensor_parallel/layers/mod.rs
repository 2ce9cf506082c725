//! Layers whose parameters are split over the ranks of a group, for models written with tensor parallelism in mind.
//!
//! Each layer follows burn's conventions: a `Config` with documented fields, `init`, a [`Module`](burn::module::Module)
//! that burn's optimizers and records take, `forward`. Different from burn's layers, `init` takes the group as well,
//! and both return an [`Error`](crate::Error) instead of panicking. A rank holds its slice of a parameter and never
//! makes the whole.
//!
//! | layer | in place of burn's | a rank holds | forward | backward |
//! |---|---|---|---|---|
//! | [`ColumnParallelLinear`] | `Linear` | output features | none; all-gather if gathered | all-reduce (*f*) |
//! | [`RowParallelLinear`] | `Linear` | input features, the bias | all-reduce (*g*) | none |
//! | [`VocabParallelEmbedding`] | `Embedding` | a range of the ids | all-reduce (*g*) | none |
//! | [`vocab_parallel_cross_entropy`] | `CrossEntropyLoss` | | two small all-reduces | none |
//! | [`ParallelFeedForward`] | `PositionWiseFeedForward`, `SwiGlu` | hidden features | all-reduce (*g*) | all-reduce (*f*) |
//! | [`ParallelAttention`] | `MultiHeadAttention` | heads | all-reduce (*g*) | all-reduce (*f*) |
//!
//! With `sequence_parallel` the activations between blocks are split along the sequence, the last dim but one: each *f*
//! becomes an all-gather whose backward is a reduce-scatter, each *g* a reduce-scatter whose backward is an all-gather.
//! The bytes are the same, the memory of what lies between is `1/n`. A parameter that is replicated and meets such
//! activations, as the gain of a layer norm, sees only its rank's positions: pass it through
//! [`copy_to_group`](crate::layout::copy_to_group) where it is used. The row bias of these layers is treated so.
//!
//! # First values
//!
//! `init` draws every element from a seed and the element's place in the whole parameter: a layer starts the same at
//! every degree. The numbers are not those that burn draws. To start from a layer of burn, as one loaded from a file,
//! cut it with `init_from` or `from_full`.
//!
//! # Rules
//!
//! - All ranks of the group make the same layers in the same order, with the same configuration, and call `forward` and
//!   backward alike. Run backward with [`layout::backward`](crate::layout::backward), which returns its errors.
//! - Every rank ends with the same loss. Where the parameters of a rank are replicated (row bias, layer norms outside)
//!   their gradients are the same on all ranks, so optimizers keep them equal.
//! - Features and vocabularies are divided as [`part`](crate::comm::part) does, also if the ranks do not divide them.
//!   Heads must be divided evenly.
//! - Gradients flow on `Device::flex()` and on the devices of CubeCL, as for all moves of [`layout`](crate::layout).
//!
//! Names and formulae are those of Megatron-LM, [arXiv:1909.08053](https://arxiv.org/abs/1909.08053), and of
//! Korthikanti et al., [arXiv:2205.05198](https://arxiv.org/abs/2205.05198).
//!
//! # Example
//!
//! ```
//! use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
//! use burn::tensor::{Int, Tensor};
//! use burn_parallel::prelude::*;
//! use burn_parallel::tensor_parallel::layers::{
//!     ParallelFeedForwardConfig, VocabParallelEmbeddingConfig, vocab_parallel_cross_entropy,
//! };
//!
//! launch::threads(2).run(|rank| {
//!     let device = rank.device().autodiff();
//!     let mut table = VocabParallelEmbeddingConfig::new(11, 4).with_seed(Some(1)).init(&rank, &device)?;
//!     let block = ParallelFeedForwardConfig::new(4, 9).with_seed(Some(2)).init(&rank, &device)?;
//!     assert_eq!(table.weight.dims(), if rank.rank() == 0 { [6, 4] } else { [5, 4] });
//!
//!     let ids = Tensor::<2, Int>::from_ints([[3, 10, 0]], &device);
//!     let targets = Tensor::<1, Int>::from_ints([10, 0, 7], &device);
//!     let hidden = block.forward(table.forward(ids)?)?;
//!     let logits = table.logits(hidden)?; // [1, 3, 6] and [1, 3, 5]
//!     let [_, _, width] = logits.dims();
//!     let loss = vocab_parallel_cross_entropy(logits.reshape([3, width]), targets, 11, &[], &rank)?.mean();
//!     let grads = GradientsParams::from_grads(layout::backward(&loss, &rank)?, &table);
//!     let mut optim: ModuleOptimizer = SgdConfig::new().init();
//!     table = optim.step(0.1, table, grads);
//!     Ok(())
//! })?;
//! # Ok::<(), Error>(())
//! ```

mod attention;
mod attention_config;
mod column;
mod cross_entropy;
mod embedding;
mod feed_forward;
mod ids;
mod init;
mod region;
mod row;
mod slice;

pub use attention::ParallelAttention;
pub use attention_config::ParallelAttentionConfig;
pub use column::{ColumnParallelLinear, ColumnParallelLinearConfig};
pub use cross_entropy::{VocabParallelCrossEntropy, VocabParallelCrossEntropyConfig, vocab_parallel_cross_entropy};
pub use embedding::{VocabParallelEmbedding, VocabParallelEmbeddingConfig};
pub use feed_forward::{FeedForwardActivation, ParallelFeedForward, ParallelFeedForwardConfig};
pub use row::{RowParallelLinear, RowParallelLinearConfig};
