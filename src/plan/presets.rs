//! Preset plans for the layers of burn-nn and for the names of Hugging Face's models.
//!
//! They go by field names, so that they fit a layer wherever it is in a model. [`Plan::then`] puts them together.

use super::{ParamRule, Plan};
use crate::layout::Layout;

impl Plan {
    /// Megatron-LM's plan ([arXiv:1909.08053](https://arxiv.org/abs/1909.08053), section 3) for burn's
    /// `TransformerEncoder` and `TransformerDecoder`, and for [`MultiHeadAttention`](Self::multi_head_attention) and
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

    /// For burn's `MultiHeadAttention`, in fields whose names end in `mha`, `attn` or `attention`: whole heads on each
    /// rank. Query, key and value by columns, output by rows: one all-reduce forward, one backward.
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

    /// For burn's `PositionWiseFeedForward`: the inner layer by columns, the outer one by rows; one all-reduce forward,
    /// one backward.
    pub fn position_wise_feed_forward() -> Self {
        Self::new().columns("linear_inner").shard_if_present("*linear_outer.weight", 0)
    }

    /// For burn's `SwiGlu` in a field of this name (`""` for the `SwiGlu` alone): both of its layers by columns. The
    /// linear layer that comes after it is best split by rows (`.shard("*down.weight", 0)`): together they take one
    /// all-reduce forward and one backward.
    pub fn swiglu(field: &str) -> Self {
        let prefix = prefix(field);
        Self::new().columns(&format!("{prefix}linear_inner")).columns(&format!("{prefix}linear_outer"))
    }

    /// For a language model: burn's `Embedding` in the field `embedding` split by rows, the `Linear` in the field
    /// `output` that makes the logits by columns, so that each rank has part of the vocabulary at both ends. The
    /// cross-entropy is computed from logits that stay split. Both fields must be there: where the output is the
    /// embedding once more, take [`tied_vocabulary`](Self::tied_vocabulary).
    ///
    /// A vocabulary that the number of ranks does not divide is [padded](Self::shard_padded).
    ///
    /// An empty name is an error of [`table`](Self::table), which is to say when a model is wrapped.
    pub fn vocabulary(embedding: &str, output: &str) -> Self {
        if let Some(refused) = refused("vocabulary", &[embedding, output]) {
            return refused;
        }
        let plan = Self::tied_vocabulary(embedding);
        plan.rule(part(output, "weight", 1, false)).rule(part(output, "bias", 0, true))
    }

    /// For a language model whose logits come from the embedding itself: burn's `Embedding` in this field split by
    /// rows, at both ends of the model. As [`vocabulary`](Self::vocabulary) in everything else.
    pub fn tied_vocabulary(embedding: &str) -> Self {
        let rows = || Self::new().rule(part(embedding, "weight", 0, false));
        refused("tied_vocabulary", &[embedding]).unwrap_or_else(rows)
    }

    /// For models with the names that [Hugging Face's transformers](https://github.com/huggingface/transformers) give
    /// their layers: Llama, Mistral, Qwen2, Gemma (`q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    /// `down_proj`, `embed_tokens`, `lm_head`), BERT (`query`, `key`, `value`, `intermediate.dense`, `output.dense`,
    /// `word_embeddings`), DistilBERT, OPT, CLIP, ViT and Whisper (`out_proj`, `fc1`, `fc2`, `q_lin`, ..), GPT-2
    /// (`c_fc`, `c_proj`, `wte`), GPT-NeoX, BLOOM and Falcon (`query_key_value`, `dense`, `dense_h_to_4h`,
    /// `dense_4h_to_h`, `embed_in`, `embed_out`).
    ///
    /// Attention and feed-forward as in [`megatron`](Self::megatron), embeddings of words and output layers as in
    /// [`vocabulary`](Self::vocabulary), padded where the degree does not divide them. Every rule is one for what is
    /// present, but some must be. The degree should divide the number of key and value heads.
    ///
    /// One layer for query, key and value is split by columns. Where each head has its three side by side, as in
    /// `query_key_value`, a part of the columns is whole heads. In `c_attn`, `qkv_proj` and `Wqkv` all queries come
    /// first, then all keys, then all values, and in `gate_up_proj` all gates: there the product is gathered, since a
    /// part of it is some heads' queries and no keys, and what follows runs whole on every rank. The numbers are right,
    /// the parameters are split; such a layer as three has less to communicate.
    pub fn hugging_face() -> Self {
        let columns = [
            "q_proj",
            "k_proj",
            "v_proj",
            "query",
            "key",
            "value",
            "q_lin",
            "k_lin",
            "v_lin",
            "query_key_value",
            "c_attn",
            "qkv_proj",
            "Wqkv",
            "gate_up_proj",
            "gate_proj",
            "up_proj",
            "intermediate.dense",
            "fc1",
            "lin1",
            "c_fc",
            "dense_h_to_4h",
        ];
        let rows = [
            "o_proj",
            "out_proj",
            "out_lin",
            "output.dense",
            "attention.dense",
            "down_proj",
            "fc2",
            "lin2",
            "c_proj",
            "dense_4h_to_h",
        ];
        let mut plan = Self::new();
        for embedding in ["embed_tokens", "word_embeddings", "wte", "embed_in"] {
            plan = plan.rule(part(embedding, "weight", 0, true));
        }
        for output in ["lm_head", "embed_out", "predictions.decoder"] {
            plan = plan.rule(part(output, "weight", 1, true)).rule(part(output, "bias", 0, true));
        }
        let plan = columns.into_iter().fold(plan, |plan, name| plan.columns(name));
        rows.into_iter().fold(plan, |plan, name| plan.shard_if_present(format!("*{name}.weight"), 0))
    }

    /// A `Linear` by columns, its bias alike.
    fn columns(self, linear: &str) -> Self {
        self.shard_if_present(format!("*{linear}.weight"), 1).shard_if_present(format!("*{linear}.bias"), 0)
    }
}

/// Of a layer in the field `field`, a parameter that has a dim for the vocabulary.
fn part(field: &str, parameter: &str, dim: usize, optional: bool) -> ParamRule {
    ParamRule { pattern: format!("*{field}.{parameter}"), layout: Layout::Sharded(dim), optional, padded: true }
}

/// A plan that says, wherever it is looked at, that it was given an empty name.
fn refused(what: &str, fields: &[&str]) -> Option<Plan> {
    let said = || {
        format!(
            "`Plan::{what}` was given an empty name of a field, which would match every weight of the model; for an output \
             that is the embedding once more, take `Plan::tied_vocabulary(embedding)`"
        )
    };
    let mut plan = Plan::new();
    plan.own.refused = fields.iter().any(|field| field.is_empty()).then(said);
    plan.own.refused.is_some().then_some(plan)
}

fn prefix(field: &str) -> String {
    if field.is_empty() { String::new() } else { format!("{field}.") }
}
