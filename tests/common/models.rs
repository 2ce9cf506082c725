//! Ordinary burn models, and eager steps to compare with.

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::pool::{AdaptiveAvgPool2dConfig, MaxPool2dConfig};
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::*;
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn::tensor::{Gradients, TensorData, activation};

pub fn device() -> Device {
    Device::flex().autodiff()
}

/// Numbers in [-1, 1) that are the same everywhere.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn tensor<const D: usize>(&mut self, shape: [usize; D], device: &Device) -> Tensor<D> {
        let n = shape.iter().product();
        Tensor::from_data(TensorData::new((0..n).map(|_| self.next()).collect::<Vec<f32>>(), shape), device)
    }

    pub fn classes<const D: usize>(&mut self, shape: [usize; D], classes: usize, device: &Device) -> Tensor<D, Int> {
        let n = shape.iter().product();
        let data: Vec<i64> =
            (0..n).map(|_| ((self.next() + 1.0) / 2.0 * classes as f32) as i64 % classes as i64).collect();
        Tensor::from_data(TensorData::new(data, shape), device)
    }
}

pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    CrossEntropyLossConfig::new().init(&logits.device()).forward(logits, targets)
}

/// Replaces what burn draws from a generator that all tests share by numbers that are the same in every run.
pub fn seeded<M: Module>(model: M) -> M {
    struct Fill(Numbers);
    impl ModuleMapper for Fill {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (id, value, mapper) = param.consume();
            let drawn: Vec<f32> = value.clone().inner().into_data().try_to_vec().unwrap();
            if !value.is_require_grad() || drawn.iter().all(|x| *x == drawn[0]) {
                return Param::from_mapped_value(id, value, mapper);
            }
            let dims: [usize; D] = value.dims();
            let bound = (dims[D - 1] as f32 / drawn.len() as f32).sqrt().min(0.5);
            let value = (self.0.tensor(dims, &value.device()) * bound).require_grad();
            Param::from_mapped_value(id, value, mapper)
        }
    }
    model.map(&mut Fill(Numbers(7)))
}

#[derive(Module, Debug)]
pub struct Mlp {
    pub first: Linear,
    pub dropout: Dropout,
    pub second: Linear,
}

impl Mlp {
    pub fn new(dropout: f64, device: &Device) -> Self {
        seeded(Self {
            first: LinearConfig::new(6, 16).init(device),
            dropout: DropoutConfig::new(dropout).init(),
            second: LinearConfig::new(16, 4).init(device),
        })
    }

    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.second.forward(self.dropout.forward(activation::gelu(self.first.forward(x))))
    }

    pub fn loss(&self, x: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
        cross_entropy(self.forward(x), targets)
    }
}

#[derive(Module, Debug)]
pub struct Lm {
    pub embedding: Embedding,
    pub position: PositionalEncoding,
    pub encoder: TransformerEncoder,
    pub norm: LayerNorm,
    pub head: Linear,
}

impl Lm {
    pub fn new(vocab: usize, d: usize, layers: usize, device: &Device) -> Self {
        seeded(Self::lazy(vocab, d, layers, device))
    }

    /// Of parameters that are not made yet.
    pub fn lazy(vocab: usize, d: usize, layers: usize, device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(vocab, d).init(device),
            position: PositionalEncodingConfig::new(d).with_max_sequence_size(64).init(device),
            encoder: TransformerEncoderConfig::new(d, 4 * d, 2, layers).with_dropout(0.0).init(device),
            norm: LayerNormConfig::new(d).init(device),
            head: LinearConfig::new(d, vocab).init(device),
        }
    }

    pub fn loss(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let [b, s] = tokens.dims();
        let mask = attention::generate_autoregressive_mask(b, s, &tokens.device());
        let x = self.position.forward(self.embedding.forward(tokens));
        let x = self.encoder.forward(TransformerEncoderInput::new(x).mask_attn(mask));
        let logits = self.head.forward(self.norm.forward(x));
        let vocab = logits.dims()[2];
        cross_entropy(logits.reshape([b * s, vocab]), targets.reshape([b * s]))
    }
}

/// A language model whose heads and widths 2, 3 and 4 ranks divide, with dropout if asked for.
#[derive(Module, Debug)]
pub struct WideLm {
    pub embedding: Embedding,
    pub encoder: TransformerEncoder,
    pub norm: LayerNorm,
    pub head: Linear,
}

impl WideLm {
    pub fn new(vocabulary: usize, dropout: f64, norm_first: bool, layers: usize, device: &Device) -> Self {
        let encoder =
            TransformerEncoderConfig::new(24, 48, 12, layers).with_dropout(dropout).with_norm_first(norm_first);
        Self {
            embedding: EmbeddingConfig::new(vocabulary, 24).init(device),
            encoder: encoder.init(device),
            norm: LayerNormConfig::new(24).init(device),
            head: LinearConfig::new(24, vocabulary).init(device),
        }
    }

    pub fn loss(&self, (tokens, targets): (Tensor<2, Int>, Tensor<2, Int>)) -> Tensor<1> {
        let [b, s] = tokens.dims();
        let mask = attention::generate_autoregressive_mask(b, s, &tokens.device());
        let x = TransformerEncoderInput::new(self.embedding.forward(tokens)).mask_attn(mask);
        let logits = self.head.forward(self.norm.forward(self.encoder.forward(x)));
        let vocabulary = logits.dims()[2];
        cross_entropy(logits.reshape([b * s, vocabulary]), targets.reshape([b * s]))
    }
}

#[derive(Module, Debug)]
pub struct Cnn {
    pub input_norm: BatchNorm,
    pub first: Conv2d,
    pub norm: BatchNorm,
    pub second: Conv2d,
    pub second_norm: BatchNorm,
    pub head: Linear,
}

impl Cnn {
    pub fn new(device: &Device) -> Self {
        seeded(Self {
            input_norm: BatchNormConfig::new(2).init(device),
            // A bias before a batch norm, or without padding a shift before it, has the gradient 0, of which every run
            // computes other digits, which Adam blows up to the size of the learning rate.
            first: Conv2dConfig::new([2, 4], [3, 3])
                .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                .with_bias(false)
                .init(device),
            norm: BatchNormConfig::new(4).init(device),
            second: Conv2dConfig::new([4, 5], [2, 2]).with_bias(false).init(device),
            second_norm: BatchNormConfig::new(5).with_momentum(0.3).init(device),
            head: LinearConfig::new(5 * 4, 3).init(device),
        })
    }

    pub fn loss(&self, images: Tensor<4>, targets: Tensor<1, Int>) -> Tensor<1> {
        let x = self.input_norm.forward(images);
        let x = activation::relu(self.norm.forward(self.first.forward(x)));
        let x = MaxPool2dConfig::new([2, 2]).init().forward(x);
        let x = activation::relu(self.second_norm.forward(self.second.forward(x)));
        let x = AdaptiveAvgPool2dConfig::new([2, 2]).init().forward(x);
        let batch = x.dims()[0];
        cross_entropy(self.head.forward(x.reshape([batch, 20])), targets)
    }
}

/// Two batch norms whose outputs are added, so that both get the same gradient.
#[derive(Module, Debug)]
pub struct Residual {
    pub main: BatchNorm,
    pub conv: Conv2d,
    pub shortcut: BatchNorm,
    pub head: Linear,
}

impl Residual {
    pub fn new(device: &Device) -> Self {
        seeded(Self {
            main: BatchNormConfig::new(2).init(device),
            conv: Conv2dConfig::new([2, 2], [1, 1]).with_bias(false).init(device),
            shortcut: BatchNormConfig::new(2).init(device),
            head: LinearConfig::new(128, 3).init(device),
        })
    }

    pub fn loss(&self, images: Tensor<4>, targets: Tensor<1, Int>) -> Tensor<1> {
        let batch = images.dims()[0];
        let main = self.main.forward(activation::tanh(self.conv.forward(images.clone())));
        let x = activation::relu(main + self.shortcut.forward(images));
        cross_entropy(self.head.forward(x.reshape([batch, 128])), targets)
    }
}

pub fn images(batch: usize, seed: u64, device: &Device) -> (Tensor<4>, Tensor<1, Int>) {
    let mut numbers = Numbers(seed);
    (numbers.tensor([batch, 2, 8, 8], device) * 2.0 + 0.5, numbers.classes([batch], 3, device))
}

#[derive(Module, Debug)]
pub struct Rnn {
    pub embedding: Embedding,
    pub lstm: Lstm,
    pub head: Linear,
}

impl Rnn {
    pub fn new(device: &Device) -> Self {
        seeded(Self {
            embedding: EmbeddingConfig::new(11, 6).init(device),
            lstm: LstmConfig::new(6, 7, true).init(device),
            head: LinearConfig::new(7, 11).init(device),
        })
    }

    pub fn loss(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let [b, s] = tokens.dims();
        let (x, _) = self.lstm.forward(self.embedding.forward(tokens), None);
        cross_entropy(self.head.forward(x).reshape([b * s, 11]), targets.reshape([b * s]))
    }
}

/// The embedding is also the head: one parameter, used twice.
#[derive(Module, Debug)]
pub struct Tied {
    pub embedding: Embedding,
    pub inner: Linear,
}

impl Tied {
    pub fn new(device: &Device) -> Self {
        seeded(Self {
            embedding: EmbeddingConfig::new(11, 6).init(device),
            inner: LinearConfig::new(6, 6).init(device),
        })
    }

    pub fn loss(&self, tokens: Tensor<2, Int>, targets: Tensor<2, Int>) -> Tensor<1> {
        let [b, s] = tokens.dims();
        let x = activation::tanh(self.inner.forward(self.embedding.forward(tokens))).reshape([b * s, 6]);
        cross_entropy(x.matmul(self.embedding.weight.val().transpose()), targets.reshape([b * s]))
    }
}

pub fn scalar(loss: Tensor<1>) -> f32 {
    loss.inner().into_scalar::<f32>()
}

pub fn eager<M: Module>(model: &M, loss: impl FnOnce(&M) -> Tensor<1>) -> (f32, GradientsParams) {
    let loss = loss(model);
    let gradients: Gradients = loss.backward();
    (scalar(loss), GradientsParams::from_grads(gradients, model))
}
