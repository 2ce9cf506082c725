//! Plans for the layers of burn-nn.
//!
//! They go by field names, so that they fit a layer wherever it is in a model. [`Plan::then`] puts them together.

use super::{Plan, Rule};
use crate::layout::Layout;

impl Plan {
    /// Megatron-LM's plan ([arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3) for burn's `TransformerEncoder`
    /// and `TransformerDecoder`, and for [`MultiHeadAttention`](Self::multi_head_attention) and
    /// [`PositionWiseFeedForward`](Self::position_wise_feed_forward) in other models: two all-reduces a layer and pass.
    ///
    /// Every rule is one for what is present, but some must be.
    pub fn megatron() -> Self {
        Self::multi_head_attention().then(Self::position_wise_feed_forward())
    }

    /// For burn's `TransformerEncoder`: [`megatron`](Self::megatron).
    pub fn transformer_encoder() -> Self {
        Self::megatron()
    }

    /// For burn's `TransformerDecoder`: [`megatron`](Self::megatron), both attentions.
    pub fn transformer_decoder() -> Self {
        Self::megatron()
    }

    /// For burn's `MultiHeadAttention`, in fields whose names end in `mha`, `attn` or `attention`: whole heads on each rank.
    /// Query, key and value by columns, output by rows: one all-reduce forward, one backward.
    ///
    /// The degree should divide the number of heads: otherwise heads are gathered, which is right but slow.
    pub fn multi_head_attention() -> Self {
        let mut plan = Self::new();
        for name in ["query", "key", "value"] {
            plan = plan.columns(name);
        }
        for holder in ["mha", "attn", "attention"] {
            plan = plan.shard_if_present(format!("*{holder}.output.weight"), 0);
        }
        plan
    }

    /// For burn's `PositionWiseFeedForward`: the inner layer by columns, the outer one by rows; one all-reduce forward, one
    /// backward.
    pub fn position_wise_feed_forward() -> Self {
        Self::new().columns("linear_inner").shard_if_present("*linear_outer.weight", 0)
    }

    /// For burn's `SwiGlu` in a field of this name (`""` for the `SwiGlu` alone): both of its layers by columns. The linear
    /// layer that comes after it is best split by rows (`.shard("*down.weight", 0)`): together they take one all-reduce
    /// forward and one backward.
    pub fn swiglu(field: &str) -> Self {
        let prefix = prefix(field);
        Self::new().columns(&format!("{prefix}linear_inner")).columns(&format!("{prefix}linear_outer"))
    }

    /// For a language model: burn's `Embedding` in the field `embedding` split by rows, the `Linear` in the field `output`
    /// that makes the logits by columns, so that each rank has part of the vocabulary at both ends. The cross-entropy is
    /// computed from logits that stay split. An `output` that is tied to the embedding needs no field of its own.
    ///
    /// A vocabulary that the number of ranks does not divide is [padded](Self::shard_padded).
    pub fn vocabulary(embedding: &str, output: &str) -> Self {
        let part = |field: String, dim, optional| Rule {
            pattern: format!("*{field}"),
            layout: Layout::Sharded(dim),
            optional,
            padded: true,
        };
        Self::new()
            .rule(part(format!("{embedding}.weight"), 0, false))
            .rule(part(format!("{output}.weight"), 1, true))
            .rule(part(format!("{output}.bias"), 0, true))
    }

    /// A `Linear` by columns, its bias alike.
    fn columns(self, linear: &str) -> Self {
        self.shard_if_present(format!("*{linear}.weight"), 1).shard_if_present(format!("*{linear}.bias"), 0)
    }
}

fn prefix(field: &str) -> String {
    if field.is_empty() { String::new() } else { format!("{field}.") }
}
