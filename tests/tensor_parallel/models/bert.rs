//! An encoder in the manner of BERT: norms behind the layers, learnt positions, a masked language model's head.

use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig, Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation::{gelu, log_softmax, softmax};

const WORDS: usize = 1200;
const WIDTH: usize = 192;
const HEADS: usize = 12;
const LENGTH: usize = 64;

#[derive(Module, Debug)]
pub struct Bert {
    embeddings: Embeddings,
    encoder: Encoder,
    head: Head,
}

#[derive(Module, Debug)]
struct Embeddings {
    word_embeddings: Embedding,
    position_embeddings: Embedding,
    token_type_embeddings: Embedding,
    norm: LayerNorm,
    dropout: Dropout,
}

#[derive(Module, Debug)]
struct Encoder {
    layer: Vec<Layer>,
}

#[derive(Module, Debug)]
struct Layer {
    attention: Attention,
    intermediate: Intermediate,
    output: Output,
}

#[derive(Module, Debug)]
struct Attention {
    self_attention: SelfAttention,
    output: Output,
}

#[derive(Module, Debug)]
struct SelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    dropout: Dropout,
}

#[derive(Module, Debug)]
struct Intermediate {
    dense: Linear,
}

#[derive(Module, Debug)]
struct Output {
    dense: Linear,
    norm: LayerNorm,
    dropout: Dropout,
}

#[derive(Module, Debug)]
struct Head {
    transform: Linear,
    norm: LayerNorm,
    decoder: Linear,
}

pub fn init(device: &Device) -> Bert {
    let linear = |takes, gives| LinearConfig::new(takes, gives).init(device);
    let norm = || LayerNormConfig::new(WIDTH).init(device);
    let dropout = || DropoutConfig::new(0.1).init();
    let embedding = |size| EmbeddingConfig::new(size, WIDTH).init(device);
    let output = |takes| Output { dense: linear(takes, WIDTH), norm: norm(), dropout: dropout() };
    let layer = |_| Layer {
        attention: Attention {
            self_attention: SelfAttention {
                query: linear(WIDTH, WIDTH),
                key: linear(WIDTH, WIDTH),
                value: linear(WIDTH, WIDTH),
                dropout: dropout(),
            },
            output: output(WIDTH),
        },
        intermediate: Intermediate { dense: linear(WIDTH, 4 * WIDTH) },
        output: output(4 * WIDTH),
    };
    Bert {
        embeddings: Embeddings {
            word_embeddings: embedding(WORDS),
            position_embeddings: embedding(LENGTH),
            token_type_embeddings: embedding(2),
            norm: norm(),
            dropout: dropout(),
        },
        encoder: Encoder { layer: (0..2).map(layer).collect() },
        head: Head { transform: linear(WIDTH, WIDTH), norm: norm(), decoder: linear(WIDTH, WORDS) },
    }
}

impl Output {
    fn forward(&self, x: Tensor<3>, beside: Tensor<3>) -> Tensor<3> {
        self.norm.forward(self.dropout.forward(self.dense.forward(x)) + beside)
    }
}

impl SelfAttention {
    fn forward(&self, x: Tensor<3>, padding: Tensor<4, Bool>) -> Tensor<3> {
        let [rows, length, width] = x.dims();
        let heads = |x: Tensor<3>| x.reshape([rows, length, HEADS, width / HEADS]).swap_dims(1, 2);
        let (query, key) = (heads(self.query.forward(x.clone())), heads(self.key.forward(x.clone())));
        let scores = query.matmul(key.transpose()) / ((width / HEADS) as f64).sqrt();
        let seen = self.dropout.forward(softmax(scores.mask_fill(padding, -1e9), 3));
        seen.matmul(heads(self.value.forward(x))).swap_dims(1, 2).reshape([rows, length, width])
    }
}

impl Bert {
    /// Of tokens, their types, which of them are padding, and the words that stand behind them.
    pub fn loss(
        &self,
        (tokens, types, padding, labels): (Tensor<2, Int>, Tensor<2, Int>, Tensor<2, Bool>, Tensor<2, Int>),
    ) -> Tensor<1> {
        let [rows, length] = tokens.dims();
        let places = Tensor::<1, Int>::arange(0..length as i64, &tokens.device()).unsqueeze::<2>();
        let of = &self.embeddings;
        let x = of.word_embeddings.forward(tokens)
            + of.position_embeddings.forward(places)
            + of.token_type_embeddings.forward(types);
        let mut x = of.dropout.forward(of.norm.forward(x));
        let padding = padding.reshape([rows, 1, 1, length]);
        for layer in &self.encoder.layer {
            let seen = layer.attention.self_attention.forward(x.clone(), padding.clone());
            x = layer.attention.output.forward(seen, x);
            let inner = gelu(layer.intermediate.dense.forward(x.clone()));
            x = layer.output.forward(inner, x);
        }
        let x = self.head.norm.forward(gelu(self.head.transform.forward(x)));
        let logits = self.head.decoder.forward(x).reshape([rows * length, WORDS]);
        log_softmax(logits, 1).gather(1, labels.reshape([rows * length, 1])).mean().neg()
    }
}

pub fn inputs(device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>, Tensor<2, Bool>, Tensor<2, Int>) {
    let ints = || Tensor::<2, Int>::zeros([4, LENGTH], device);
    (ints(), ints(), ints().equal_elem(1), ints())
}
