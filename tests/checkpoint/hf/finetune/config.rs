//! What is read of `config.json`.

use serde_json::{Value, json};

use crate::Dir;
use crate::common::llama::{LlamaConfig, Scaling};
use crate::hf::folder;

#[derive(serde::Deserialize)]
struct Golden {
    frequencies: Vec<f32>,
    attention_factor: f64,
}

#[test]
fn positions_turn_as_in_transformers() {
    for name in ["qwen3_yarn", "llama3_biased", "mistral_linear"] {
        let golden = std::fs::read(folder(name).join("golden.json")).unwrap();
        let golden: Golden = serde_json::from_slice(&golden).unwrap();
        let config = LlamaConfig::read(folder(name)).unwrap();
        let found = config.rope.frequencies(config.head_size);
        assert_eq!(found.len(), golden.frequencies.len());
        for (found, expected) in found.iter().zip(&golden.frequencies) {
            assert!((found - expected).abs() <= 1e-6 * expected, "{name}: {found}, not {expected}");
        }
        assert!((config.rope.attention_factor() - golden.attention_factor).abs() < 1e-12, "{name}");
    }
}

/// The config of a real model, with changes.
fn with(changes: Value) -> Result<LlamaConfig, String> {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": true, "sliding_window": null,
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    LlamaConfig::from_json(&config.to_string())
}

#[test]
fn both_forms_say_the_same() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let old = with(json!({ "rope_scaling": scaling })).unwrap();
    let mut parameters = scaling.clone();
    parameters["rope_theta"] = 500_000.0.into();
    let new = with(json!({ "rope_theta": null, "rope_parameters": parameters })).unwrap();
    assert_eq!(old, new);
    assert_eq!(old.rope.theta, 500_000.0);
    assert_eq!(old.rope.scaling, Scaling::Llama3 { factor: 32.0, low: 1.0, high: 4.0, original: 8192.0 });
    let plain = with(json!({})).unwrap();
    assert_eq!((plain.rope.theta, plain.rope.scaling, plain.head_size), (500_000.0, Scaling::None, 64));
    assert_eq!(plain, with(json!({ "rope_scaling": null, "rope_parameters": {} })).unwrap());
    assert_eq!(with(json!({ "rope_theta": null })).unwrap().rope.theta, 10_000.0);
}

#[test]
fn families_have_their_biases_and_norms() {
    let of = |kind: &str| {
        let config = with(json!({ "model_type": kind, "attention_bias": true, "mlp_bias": true })).unwrap();
        [config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm]
    };
    assert_eq!(of("llama"), [true, true, true, false]);
    assert_eq!(of("mistral"), [false, false, false, false]);
    assert_eq!(of("qwen2"), [true, false, false, false]);
    assert_eq!(of("qwen3"), [true, true, false, true]);
    let bare = with(json!({ "model_type": "qwen3" })).unwrap();
    assert_eq!((bare.qkv_bias, bare.head_size), (false, 128));
    let heads = |kind: &str| with(json!({ "model_type": kind, "num_key_value_heads": null })).unwrap().kv_heads;
    assert_eq!([heads("llama"), heads("mistral")], [32, 8]);
}

#[test]
fn what_is_not_supported_is_one_line() {
    let says = |changes: Value, words: &str| {
        let said = with(changes.clone()).unwrap_err();
        assert!(said.contains(words) && !said.contains('\n'), "{changes}: `{words}` is missing in: {said}");
    };
    says(json!({ "model_type": "gemma2" }), "models of type `gemma2` are not supported, only llama, mistral");
    says(json!({ "model_type": null }), "`model_type` is missing");
    says(json!({ "hidden_act": "gelu" }), "`hidden_act` is \"gelu\"");
    says(json!({ "model_type": "mistral", "sliding_window": 4096 }), "sliding window");
    says(json!({ "model_type": "qwen2", "use_sliding_window": true }), "sliding window");
    says(json!({ "layer_types": ["full_attention", "sliding_attention"] }), "sliding window");
    says(json!({ "attention_dropout": 0.1 }), "`attention_dropout` is 0.1");
    says(json!({ "num_local_experts": 8 }), "mixtures of experts");
    says(json!({ "quantization_config": {} }), "quantized");
    says(json!({ "rope_scaling": { "type": "dynamic", "factor": 2 } }), "`rope_scaling` has the type `dynamic`");
    says(json!({ "rope_scaling": { "type": "linear" } }), "`factor` is missing in `rope_scaling`");
    says(json!({ "rope_scaling": { "type": "linear", "factor": -1 } }), "`factor` of `rope_scaling` is -1");
    says(json!({ "rope_scaling": 3 }), "`rope_scaling` is 3, not a table");
    says(json!({ "rope_parameters": { "full_attention": {} } }), "differ between layers");
    says(json!({ "partial_rotary_factor": 0.5 }), "`partial_rotary_factor` is 0.5");
    says(json!({ "vocab_size": null }), "`vocab_size` is missing");
    says(json!({ "hidden_size": 0 }), "`hidden_size` is 0, not a whole number from 1");
    says(json!({ "hidden_size": 2050 }), "does not divide `hidden_size`, 2050");
    says(json!({ "num_key_value_heads": 5 }), "does not divide `num_attention_heads`, 32");
    says(json!({ "head_dim": 63 }), "an odd number");
    says(json!({ "rms_norm_eps": "small" }), "`rms_norm_eps` is \"small\"");
    says(json!({ "tie_word_embeddings": 1 }), "`tie_word_embeddings` is 1, neither true nor false");
    // In use is what is switched on.
    assert!(with(json!({ "model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": false })).is_ok());

    let dir = Dir::fresh();
    let path = dir.join("config.json").display().to_string();
    let said = LlamaConfig::read(dir.path()).unwrap_err();
    assert!(said.starts_with(&format!("cannot read {path}: ")), "{said}");
    std::fs::write(&path, "{").unwrap();
    let said = LlamaConfig::read(dir.path()).unwrap_err();
    assert!(said.starts_with(&format!("{path}: is no JSON: ")), "{said}");
}
