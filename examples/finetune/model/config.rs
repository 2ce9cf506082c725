//! The sizes and kinds of a model, as `config.json` of a Hugging Face directory says them.

use std::fs;
use std::path::Path;

use burn::nn::{Initializer, LinearConfig, RmsNormConfig};
use serde_json::Value;

use super::autocast::Autocast;
use super::rope::Rope;

/// The sizes and kinds of a [`Llama`](super::Llama).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LlamaConfig {
    /// How many different tokens there are.
    pub vocab: usize,
    /// The width of the residual stream.
    pub width: usize,
    /// The width within the feed-forwards.
    pub inner: usize,
    /// The number of layers.
    pub layers: usize,
    /// The query heads of each layer.
    pub heads: usize,
    /// The heads of keys and values; they divide `heads`.
    pub kv_heads: usize,
    /// The width of a head: an even number.
    pub head_size: usize,
    /// What the norms add to the mean square.
    pub epsilon: f64,
    /// Whether the output layer is the embedding.
    pub tied: bool,
    /// Whether query, key and value have a bias.
    pub qkv_bias: bool,
    /// Whether the output of attention has a bias.
    pub output_bias: bool,
    /// Whether the feed-forwards have biases.
    pub mlp_bias: bool,
    /// Whether the heads of queries and keys are normalised, as in Qwen 3.
    pub qk_norm: bool,
    /// The rotary positions.
    pub rope: Rope,
    /// The longest text that the model was made for, in tokens.
    pub positions: usize,
    /// What products are computed in: as the weights are, where a `config.json` was read.
    pub autocast: Autocast,
}

impl LlamaConfig {
    /// What fresh weights are drawn from.
    pub(super) const INITIAL: Initializer = Initializer::Normal { mean: 0.0, std: 0.02 };

    /// Reads `config.json` of a directory.
    ///
    /// # Errors
    /// One line: the path, and what is missing, makes no sense, or is not supported here.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self, String> {
        let path = dir.as_ref().join("config.json");
        let text = fs::read_to_string(&path).map_err(|why| format!("cannot read {}: {why}", path.display()))?;
        Self::from_json(&text).map_err(|problem| format!("{}: {problem}", path.display()))
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// As [`read`](Self::read), without the path.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let config: Value = serde_json::from_str(text).map_err(|why| format!("is no JSON: {why}"))?;
        let kind = match &config["model_type"] {
            Value::String(kind) => kind.as_str(),
            Value::Null => return Err("`model_type` is missing".into()),
            other => return Err(format!("`model_type` is {other}, not a text")),
        };
        let family = Family::of(kind)?;
        unsupported(&config, kind)?;

        let flag = |key: &str, default: bool| match &config[key] {
            Value::Null => Ok(default),
            value => value.as_bool().ok_or(format!("`{key}` is {value}, neither true nor false")),
        };
        let (width, heads) = (size(&config, "hidden_size")?, size(&config, "num_attention_heads")?);
        let kv_heads = match (&config["num_key_value_heads"], family.kv_heads) {
            (Value::Null, None) => heads,
            (Value::Null, Some(default)) => default,
            _ => size(&config, "num_key_value_heads")?,
        };
        let head_size = match (&config["head_dim"], family.head_size) {
            (Value::Null, Some(default)) => default,
            (Value::Null, None) if width % heads == 0 => width / heads,
            (Value::Null, None) => {
                return Err(format!("`num_attention_heads` is {heads}, which does not divide `hidden_size`, {width}"));
            }
            _ => size(&config, "head_dim")?,
        };
        if heads % kv_heads != 0 {
            return Err(format!(
                "`num_key_value_heads` is {kv_heads}, which does not divide `num_attention_heads`, {heads}"
            ));
        }
        if head_size % 2 != 0 {
            return Err(format!("heads have {head_size} elements, an odd number: rotary positions turn pairs"));
        }
        let epsilon = match &config["rms_norm_eps"] {
            Value::Null => 1e-6,
            value => match value.as_f64().filter(|epsilon| *epsilon > 0.0) {
                Some(epsilon) => epsilon,
                None => return Err(format!("`rms_norm_eps` is {value}, not a number above 0")),
            },
        };
        let bias = match family.bias {
            Bias::Never | Bias::Qkv => false,
            Bias::AsSaid => flag("attention_bias", false)?,
        };
        Ok(Self {
            vocab: size(&config, "vocab_size")?,
            width,
            inner: size(&config, "intermediate_size")?,
            layers: size(&config, "num_hidden_layers")?,
            heads,
            kv_heads,
            head_size,
            epsilon,
            tied: flag("tie_word_embeddings", false)?,
            qkv_bias: bias || family.bias == Bias::Qkv,
            output_bias: bias,
            mlp_bias: family.mlp_bias && flag("mlp_bias", false)?,
            qk_norm: family.qk_norm,
            rope: Rope::from_config(&config)?,
            positions: size(&config, "max_position_embeddings")?,
            autocast: Autocast::default(),
        })
    }

    /// A linear layer of the model.
    pub(super) fn linear(&self, config: LinearConfig) -> LinearConfig {
        config.with_initializer(Self::INITIAL)
    }

    /// A norm over the last dim.
    pub(super) fn norm(&self, size: usize) -> RmsNormConfig {
        RmsNormConfig::new(size).with_epsilon(self.epsilon)
    }
}

/// What models of a type have that their config does not say, or what is meant where it says nothing.
struct Family {
    bias: Bias,
    mlp_bias: bool,
    qk_norm: bool,
    /// `num_key_value_heads` and `head_dim`, if not as many as `num_attention_heads`, and what makes `hidden_size`.
    kv_heads: Option<usize>,
    head_size: Option<usize>,
}

/// Which layers of attention have biases.
#[derive(PartialEq)]
enum Bias {
    Never,
    /// Query, key and value.
    Qkv,
    /// All or none: `attention_bias`.
    AsSaid,
}

impl Family {
    fn of(kind: &str) -> Result<Self, String> {
        let plain = Self { bias: Bias::AsSaid, mlp_bias: false, qk_norm: false, kv_heads: None, head_size: None };
        Ok(match kind {
            "llama" => Self { mlp_bias: true, ..plain },
            "mistral" => Self { bias: Bias::Never, kv_heads: Some(8), ..plain },
            "qwen2" => Self { bias: Bias::Qkv, kv_heads: Some(32), ..plain },
            "qwen3" => Self { qk_norm: true, kv_heads: Some(32), head_size: Some(128), ..plain },
            _ => {
                return Err(format!("models of type `{kind}` are not supported, only llama, mistral, qwen2 and qwen3"));
            }
        })
    }
}

/// A size that the model needs.
fn size(config: &Value, key: &str) -> Result<usize, String> {
    match &config[key] {
        Value::Null => Err(format!("`{key}` is missing")),
        value => match value.as_u64().filter(|size| (1..1 << 31).contains(size)) {
            Some(size) => Ok(size as usize),
            None => Err(format!("`{key}` is {value}, not a whole number from 1")),
        },
    }
}

/// Looks for what changes the computation in a way that is not written here.
fn unsupported(config: &Value, kind: &str) -> Result<(), String> {
    match &config["hidden_act"] {
        Value::Null => {}
        Value::String(activation) if activation == "silu" || activation == "swish" => {}
        other => return Err(format!("`hidden_act` is {other}, and only silu is supported")),
    }
    // In Qwen the size of the window means nothing unless it is switched on; in Mistral the window is on unless it is
    // null.
    let windowed = match kind {
        "qwen2" | "qwen3" => config["use_sliding_window"] == true,
        "mistral" => config.get("sliding_window") != Some(&Value::Null),
        _ => !config["sliding_window"].is_null(),
    };
    let sliding = |kind: &Value| kind != "full_attention";
    if windowed || config["layer_types"].as_array().is_some_and(|layers| layers.iter().any(sliding)) {
        return Err("attention within a sliding window is not supported (`sliding_window`, `layer_types`)".into());
    }
    if let Some(dropout) = config["attention_dropout"].as_f64().filter(|rate| *rate != 0.0) {
        return Err(format!("`attention_dropout` is {dropout}, and dropout is not supported"));
    }
    let experts = ["num_local_experts", "num_experts", "n_routed_experts"];
    if let Some(key) = experts.into_iter().find(|key| !config[key].is_null()) {
        return Err(format!("`{key}` is {}: mixtures of experts are not supported", config[key]));
    }
    if !config["quantization_config"].is_null() {
        return Err("`quantization_config` is there: quantized weights are not supported".into());
    }
    Ok(())
}
