//! The ready mappings, and what a dry run says.

use burn::module::Module;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::hf::{self, Mapping, Rule, Weights};
use burn_parallel::params::SliceSource;
use burn_parallel::prelude::*;

use crate::hf::golden::Name;
use crate::hf::{Tensors, counting, file_of};

const WIDTH: usize = 4;

/// The fields of `examples/train_lm`.
#[derive(Module, Debug)]
struct Gpt {
    tokens: Embedding,
    positions: Embedding,
    layers: TransformerEncoder,
    norm: LayerNorm,
    output: Linear,
}

#[derive(Module, Debug)]
struct Bert {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    layers: TransformerEncoder,
    pooler: Linear,
    transform: Linear,
    transform_norm: LayerNorm,
    decoder: Linear,
}

fn embedding(size: usize, device: &Device) -> Embedding {
    EmbeddingConfig::new(size, WIDTH).init(device)
}

fn encoder(device: &Device) -> TransformerEncoder {
    TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 2, 2).with_norm_first(true).init(device)
}

fn gpt(device: &Device) -> Gpt {
    Gpt {
        tokens: embedding(7, device),
        positions: embedding(5, device),
        layers: encoder(device),
        norm: LayerNormConfig::new(WIDTH).init(device),
        output: LinearConfig::new(WIDTH, 7).with_bias(false).init(device),
    }
}

fn gpt2_file(prefix: &str) -> Tensors {
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        (format!("{prefix}wte.weight"), vec![7, WIDTH]),
        (format!("{prefix}wpe.weight"), vec![5, WIDTH]),
        (format!("{prefix}ln_f.weight"), vec![WIDTH]),
        (format!("{prefix}ln_f.bias"), vec![WIDTH]),
    ];
    for layer in 0..2 {
        for (name, dims) in [
            ("ln_1.weight", vec![WIDTH]),
            ("ln_1.bias", vec![WIDTH]),
            ("ln_2.weight", vec![WIDTH]),
            ("ln_2.bias", vec![WIDTH]),
            ("attn.c_attn.weight", vec![WIDTH, 3 * WIDTH]),
            ("attn.c_attn.bias", vec![3 * WIDTH]),
            ("attn.c_proj.weight", vec![WIDTH, WIDTH]),
            ("attn.c_proj.bias", vec![WIDTH]),
            ("mlp.c_fc.weight", vec![WIDTH, 4 * WIDTH]),
            ("mlp.c_fc.bias", vec![4 * WIDTH]),
            ("mlp.c_proj.weight", vec![4 * WIDTH, WIDTH]),
            ("mlp.c_proj.bias", vec![WIDTH]),
        ] {
            tensors.push((format!("{prefix}h.{layer}.{name}"), dims));
        }
    }
    let tensors: Vec<(&str, &[usize])> = tensors.iter().map(|(name, dims)| (name.as_str(), dims.as_slice())).collect();
    counting(&tensors)
}

fn value(tensors: &Tensors, name: &str) -> Vec<f32> {
    tensors.iter().find(|(of, _, _)| of == name).unwrap().2.clone()
}

#[test]
fn gpt2_is_burns_encoder() {
    for prefix in ["", "transformer."] {
        let tensors = gpt2_file(prefix);
        let weights = Weights::from_bytes(file_of(&tensors)).unwrap();
        let model = gpt(&Device::flex());
        let comparison = hf::compare(&model, &weights, &Mapping::gpt2()).unwrap();
        assert!(comparison.fits(), "{comparison}");
        assert!(comparison.left.is_empty(), "{comparison}");
        let mut mapped = weights.mapped(Mapping::gpt2()).unwrap();
        let fused = value(&tensors, &format!("{prefix}h.1.attn.c_attn.weight"));
        for (part, name) in ["query", "key", "value"].into_iter().enumerate() {
            let path = format!("layers.layers.1.mha.{name}.weight");
            assert_eq!(mapped.dims(&path).unwrap().unwrap(), [WIDTH, WIDTH]);
            // Rows 1 and 2, the last two columns.
            let read: Vec<f32> = mapped.read(&path, &[1..3, 2..4]).unwrap().try_to_vec().unwrap();
            let at = |row: usize, column: usize| fused[row * 3 * WIDTH + part * WIDTH + column];
            assert_eq!(read, [at(1, 2), at(1, 3), at(2, 2), at(2, 3)]);
        }
        let bias = value(&tensors, &format!("{prefix}h.0.attn.c_attn.bias"));
        let read: Vec<f32> =
            mapped.read("layers.layers.0.mha.value.bias", std::slice::from_ref(&(0..4))).unwrap().try_to_vec().unwrap();
        assert_eq!(read, bias[8..]);
        // The head is the embedding, transposed.
        let words = value(&tensors, &format!("{prefix}wte.weight"));
        let read: Vec<f32> = mapped.read("output.weight", &[0..2, 3..5]).unwrap().try_to_vec().unwrap();
        assert_eq!(read, [words[12], words[16], words[13], words[17]]);
        // The norm before the attention is burn's second.
        let read: Vec<f32> =
            mapped.read("layers.layers.0.norm_2.gamma", std::slice::from_ref(&(0..4))).unwrap().try_to_vec().unwrap();
        assert_eq!(read, value(&tensors, &format!("{prefix}h.0.ln_1.weight")));
    }
}

#[test]
fn bert_is_burns_encoder() {
    let device = Device::flex();
    let linear = |gives| LinearConfig::new(WIDTH, gives).init(&device);
    let norm = || LayerNormConfig::new(WIDTH).init(&device);
    let model = Bert {
        words: embedding(7, &device),
        positions: embedding(5, &device),
        types: embedding(2, &device),
        norm: norm(),
        layers: encoder(&device),
        pooler: linear(WIDTH),
        transform: linear(WIDTH),
        transform_norm: norm(),
        decoder: linear(7),
    };
    for (gamma, beta) in [("weight", "bias"), ("gamma", "beta")] {
        let square = vec![WIDTH, WIDTH];
        let mut names: Vec<(String, Vec<usize>)> = vec![
            ("bert.embeddings.word_embeddings.weight".into(), vec![7, WIDTH]),
            ("bert.embeddings.position_embeddings.weight".into(), vec![5, WIDTH]),
            ("bert.embeddings.token_type_embeddings.weight".into(), vec![2, WIDTH]),
            (format!("bert.embeddings.LayerNorm.{gamma}"), vec![WIDTH]),
            (format!("bert.embeddings.LayerNorm.{beta}"), vec![WIDTH]),
            ("bert.pooler.dense.weight".into(), square.clone()),
            ("bert.pooler.dense.bias".into(), vec![WIDTH]),
            ("cls.predictions.transform.dense.weight".into(), square.clone()),
            ("cls.predictions.transform.dense.bias".into(), vec![WIDTH]),
            ("cls.predictions.transform.LayerNorm.weight".into(), vec![WIDTH]),
            ("cls.predictions.transform.LayerNorm.bias".into(), vec![WIDTH]),
            ("cls.predictions.bias".into(), vec![7]),
        ];
        for layer in 0..2 {
            let mut add = |name: &str, weight: Vec<usize>, bias: usize| {
                names.push((format!("bert.encoder.layer.{layer}.{name}.weight"), weight));
                names.push((format!("bert.encoder.layer.{layer}.{name}.bias"), vec![bias]));
            };
            for name in ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
            {
                add(name, square.clone(), WIDTH);
            }
            add("intermediate.dense", vec![4 * WIDTH, WIDTH], 4 * WIDTH);
            add("output.dense", vec![WIDTH, 4 * WIDTH], WIDTH);
            for name in ["attention.output.LayerNorm", "output.LayerNorm"] {
                names.push((format!("bert.encoder.layer.{layer}.{name}.{gamma}"), vec![WIDTH]));
                names.push((format!("bert.encoder.layer.{layer}.{name}.{beta}"), vec![WIDTH]));
            }
        }
        let names: Vec<(&str, &[usize])> = names.iter().map(|(name, dims)| (name.as_str(), dims.as_slice())).collect();
        let weights = Weights::from_bytes(file_of(&counting(&names))).unwrap();
        let comparison = hf::compare(&model, &weights, &Mapping::bert()).unwrap();
        assert!(comparison.fits() && comparison.left.is_empty(), "{comparison}");
    }
}

#[test]
fn a_dry_run_tells_what_is_wrong() {
    let device = Device::flex();
    let model = Name::Llama.fresh(&device);
    let weights = hf::open(Name::Llama.folder()).unwrap();
    let fits = hf::compare(&model, &weights, &Mapping::llama()).unwrap();
    assert!(fits.fits() && fits.left.is_empty(), "{fits}");
    assert!(
        fits.to_string().ends_with("39 parameters fit, 0 do not, 0 are missing, 0 are kept; 0 tensors are left"),
        "{fits}"
    );

    let wrong = Mapping::new()
        .rule(Rule::new("model.layers.*.input_layernorm.weight", "model.layers.*.input_layernorm.gamma"))
        .rule(Rule::new("*_proj.weight", "*_proj.weight"))
        .rule(Rule::new("lm_head.weight", "lm_head.weight"))
        .rule(Rule::new("embed.weight", "model.embed_tokens.weight").transposed())
        .keep("model.norm.*");
    let found = hf::compare(&model, &weights, &wrong).unwrap();
    assert!(!found.fits());
    let said = found.to_string();
    for words in [
        "does not fit: lm_head.weight of lm_head.weight: has dims [64, 512] in the model and [512, 64] in the directory: \
         transposed? Add `.transposed()` to its rule",
        "missing: model.embed_tokens.weight: `model.embed_tokens.weight` is left and has its dims",
        "missing: model.layers.3.post_attention_layernorm.gamma: `model.layers.3.post_attention_layernorm.weight` is left",
        "kept: model.norm.gamma",
        "left: model.norm.weight",
    ] {
        assert!(said.contains(words), "`{words}` is missing in: {said}");
    }
    let tied = hf::compare(&Name::Qwen2.fresh(&device), &weights, &Mapping::llama()).unwrap();
    assert_eq!(tied.left, ["lm_head.weight"]);
    let said = hf::compare(&model, &weights, &Mapping::new().rule(Rule::new("a", "b").rotary_pairs(1))).unwrap_err();
    assert!(said.to_string().contains("an even size"), "{said}");
    // A rank of a model that is spread may hold parts, which are not what the directory has.
    launch::threads(2)
        .run(|rank| {
            let strategy = Strategy::new().with_tp(2, Plan::new().shard("*_proj.weight", 1));
            let spread = Name::Llama.fresh(&rank.device().autodiff()).parallelize(&rank, &strategy)?;
            let said = hf::compare(&spread, &weights, &Mapping::llama()).unwrap_err().to_string();
            assert!(said.contains("a `Parallel`") && said.contains("before it is wrapped"), "{said}");
            let said = Plan::new().table(&spread, 2).unwrap_err().to_string();
            assert!(said.contains("a `Parallel`") && said.contains("before it is wrapped"), "{said}");
            Ok(())
        })
        .unwrap();
    assert_eq!(Mapping::of_type("qwen3").unwrap(), Mapping::llama());
    assert!(Mapping::of_type("t5").unwrap_err().to_string().contains("`t5`"));
}
