//! Preset mappings. All of them leave the adapters of a model alone: these are in no directory of a base.

use super::mapping::Mapping;
use super::rule::Rule;
use crate::Error;

impl Mapping {
    /// Decoders of the Llama family (Llama, Mistral, Qwen2, Qwen3): onto a burn model whose fields are called as in
    /// `transformers` (`model.layers.0.self_attn.q_proj`, ..): linear weights are transposed, and the `weight` of a
    /// norm is its `gamma`. If the model has an output layer of its own and the directory none, it is loaded from the
    /// embedding. Gemma has the same names and another norm, by `1 + weight`: this mapping is not for it.
    ///
    /// Positions that are turned by halves, as in `transformers`, need nothing more; with burn's
    /// [`RotaryEncoding`](burn::nn::RotaryEncoding), which turns neighbours, say [`rotary_pairs`](Self::rotary_pairs).
    pub fn llama() -> Self {
        Self::new()
            .rule(Rule::new("*norm.weight", "*norm.gamma"))
            .rule(Rule::new("*_proj.*", "*_proj.*").transposed())
            .rule(Rule::new("lm_head.weight", "lm_head.weight").transposed())
            .rule(Rule::new("model.embed_tokens.weight", "lm_head.weight").transposed())
            .rule(Rule::new("model.embed_tokens.weight", "model.embed_tokens.weight"))
            .keep("*.lora.*")
    }

    /// GPT-2 onto burn's [`TransformerEncoder`](burn::nn::transformer::TransformerEncoder) of `norm_first`, in a model
    /// with the fields `tokens`, `positions` (embeddings), `layers` (the encoder), `norm` and `output`, as in
    /// `examples/train_lm`. `c_attn` becomes query, key and value. If `output` is a layer of its own and the directory
    /// has none, it is loaded from the embedding. Names with and without `transformer.` in front are read; those with
    /// it are written.
    ///
    /// GPT-2's activation is the approximate GELU (`ActivationConfig::Gelu` of burn is the exact one).
    pub fn gpt2() -> Self {
        let names = |prefix: &str| {
            let file = |name: &str| format!("{prefix}{name}");
            let layer =
                |name: &str, path: &str| Rule::new(file(&format!("h.*.{name}")), format!("layers.layers.*.{path}"));
            let fused = |what: &str| {
                let parts = ["query", "key", "value"].map(|part| format!("layers.layers.*.mha.{part}.{what}"));
                Rule::new(file(&format!("h.*.attn.c_attn.{what}")), parts.to_vec())
            };
            Self::new()
                .rule(Rule::new(file("wte.weight"), "tokens.weight"))
                .rule(Rule::new(file("wpe.weight"), "positions.weight"))
                .rule(layer("ln_1.weight", "norm_2.gamma"))
                .rule(layer("ln_1.bias", "norm_2.beta"))
                .rule(layer("ln_2.weight", "norm_1.gamma"))
                .rule(layer("ln_2.bias", "norm_1.beta"))
                // The weights of `Conv1D` are `[in, out]`, as burn's.
                .rule(fused("weight").along(1))
                .rule(fused("bias"))
                .rule(layer("attn.c_proj.*", "mha.output.*"))
                .rule(layer("mlp.c_fc.*", "pwff.linear_inner.*"))
                .rule(layer("mlp.c_proj.*", "pwff.linear_outer.*"))
                .rule(Rule::new(file("ln_f.weight"), "norm.gamma"))
                .rule(Rule::new(file("ln_f.bias"), "norm.beta"))
        };
        names("transformer.")
            .then(names(""))
            .rule(Rule::new("lm_head.weight", "output.weight").transposed())
            .rule(Rule::new("transformer.wte.weight", "output.weight").transposed())
            .rule(Rule::new("wte.weight", "output.weight").transposed())
            .keep("*.lora.*")
    }

    /// BERT onto burn's [`TransformerEncoder`](burn::nn::transformer::TransformerEncoder), whose norms come behind the
    /// layers, in a model with the fields `words`, `positions`, `types` (embeddings), `norm`, `layers` (the encoder),
    /// and, if it has them, `pooler`, a linear layer, and the head of a masked language model: `transform`,
    /// `transform_norm` and `decoder`. Names with and without `bert.` in front are read; those with it are written.
    pub fn bert() -> Self {
        let names = |prefix: &str| {
            let file = |name: &str| format!("{prefix}{name}");
            let norm = |name: &str, path: &str| {
                let rule = |what: &str, own: &str| Rule::new(format!("{name}.{what}"), format!("{path}.{own}"));
                // Old directories call them as TensorFlow did.
                [rule("weight", "gamma"), rule("bias", "beta"), rule("gamma", "gamma"), rule("beta", "beta")]
            };
            let linear = |name: &str, path: &str| Rule::new(format!("{name}.*"), format!("{path}.*")).transposed();
            let layer = |name: &str| file(&format!("encoder.layer.*.{name}"));
            let path = |name: &str| format!("layers.layers.*.{name}");
            let rules = [
                Rule::new(file("embeddings.word_embeddings.weight"), "words.weight"),
                Rule::new(file("embeddings.position_embeddings.weight"), "positions.weight"),
                Rule::new(file("embeddings.token_type_embeddings.weight"), "types.weight"),
                linear(&layer("attention.self.query"), &path("mha.query")),
                linear(&layer("attention.self.key"), &path("mha.key")),
                linear(&layer("attention.self.value"), &path("mha.value")),
                linear(&layer("attention.output.dense"), &path("mha.output")),
                linear(&layer("intermediate.dense"), &path("pwff.linear_inner")),
                linear(&layer("output.dense"), &path("pwff.linear_outer")),
                linear(&file("pooler.dense"), "pooler"),
            ];
            let norms = [
                norm(&file("embeddings.LayerNorm"), "norm"),
                norm(&layer("attention.output.LayerNorm"), &path("norm_1")),
                norm(&layer("output.LayerNorm"), &path("norm_2")),
            ];
            rules.into_iter().chain(norms.into_iter().flatten()).fold(Self::new(), Self::rule)
        };
        names("bert.")
            .then(names(""))
            .rule(Rule::new("cls.predictions.transform.dense.*", "transform.*").transposed())
            .rule(Rule::new("cls.predictions.transform.LayerNorm.weight", "transform_norm.gamma"))
            .rule(Rule::new("cls.predictions.transform.LayerNorm.bias", "transform_norm.beta"))
            .rule(Rule::new("cls.predictions.bias", "decoder.bias"))
            .rule(Rule::new("cls.predictions.decoder.weight", "decoder.weight").transposed())
            .rule(Rule::new("bert.embeddings.word_embeddings.weight", "decoder.weight").transposed())
            .keep("*.lora.*")
    }

    /// The mapping for a `model_type` of `config.json`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is none.
    pub fn of_type(model_type: &str) -> Result<Self, Error> {
        Ok(match model_type {
            "llama" | "mistral" | "qwen2" | "qwen3" => Self::llama(),
            "gpt2" => Self::gpt2(),
            "bert" => Self::bert(),
            _ => {
                let problem = format!(
                    "there is no ready mapping for models of type `{model_type}`, only for llama, mistral, qwen2, qwen3, gpt2 \
                     and bert: make one of rules"
                );
                return Err(Error::invalid("Mapping", problem));
            }
        })
    }

    /// For models with burn's [`RotaryEncoding`](burn::nn::RotaryEncoding): the rows of `q_proj` and `k_proj`, in heads
    /// of `size`, and of `q_norm` and `k_norm`, are put in the order in which it turns them.
    pub fn rotary_pairs(mut self, size: usize) -> Self {
        let rules = ["q", "k"].map(|name| {
            let linear = format!("*.{name}_proj.*");
            let norm = Rule::new(format!("*.{name}_norm.weight"), format!("*.{name}_norm.gamma")).rotary_pairs(size);
            [Rule::new(linear.clone(), linear).transposed().rotary_pairs(size), norm]
        });
        self.rules.splice(0..0, rules.into_iter().flatten());
        self
    }
}
