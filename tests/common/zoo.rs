//! Models that know nothing of parallelism, their batches and losses.

use std::ops::Range;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig};
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{
    BatchNorm, BatchNormConfig, Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, Lstm,
    LstmConfig,
};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use burn_parallel::Error;
use burn_parallel::graph::{TensorMapper, TensorTree};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A batch as plain data, so that every rank makes its own tensors: features `[rows, 6, 8]`, tokens `[rows, 6]`,
/// targets.
#[derive(Clone)]
pub struct Batch {
    pub features: Tensor<3>,
    pub tokens: Tensor<2, Int>,
    pub targets: Tensor<2>,
}

impl TensorTree for Batch {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        let (features, tokens, targets) = (self.features, self.tokens, self.targets).map_tensors(mapper)?;
        Ok(Self { features, tokens, targets })
    }
}

/// A model with its batches and its mean loss.
pub struct Case<M> {
    pub model: M,
    pub loss: fn(&M, Batch) -> Tensor<1>,
    pub input: fn(usize, Range<usize>) -> Batch,
}

impl<M: Module> Case<M> {
    /// Trains on one device, on so many rows in each step: the losses, and the model.
    pub fn alone(&self, mut optim: ModuleOptimizer, lr: f64, rows: &[usize]) -> (Vec<f64>, M) {
        let mut model = self.model.clone().fork(&Device::flex().autodiff()).train();
        let mut losses = Vec::new();
        for (step, rows) in rows.iter().enumerate() {
            let loss = (self.loss)(&model, (self.input)(step, 0..*rows));
            losses.push(loss.clone().inner().into_scalar::<f64>());
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            model = optim.step(lr, model, grads);
        }
        (losses, model)
    }
}

fn uniform(rng: &mut ChaCha8Rng) -> f32 {
    rng.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0
}

/// Some rows of the batch of a step: the same numbers whoever asks.
pub fn batch(step: usize, rows: Range<usize>) -> Batch {
    let device = Device::flex().autodiff();
    let (mut features, mut tokens, mut targets) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows.clone() {
        let mut rng = ChaCha8Rng::seed_from_u64((step * 1000 + row) as u64);
        features.extend((0..48).map(|_| uniform(&mut rng)));
        tokens.extend((0..6).map(|_| (rng.next_u32() % 13) as i64));
        targets.extend((0..4).map(|_| uniform(&mut rng)));
    }
    let n = rows.len();
    Batch {
        features: Tensor::from_data(TensorData::new(features, [n, 6, 8]), &device),
        tokens: Tensor::from_data(TensorData::new(tokens, [n, 6]), &device),
        targets: Tensor::from_data(TensorData::new(targets, [n, 4]), &device),
    }
}

/// Replaces every trained parameter by numbers of a seed, so that a model is the same in every run.
pub fn with_values<M: Module>(model: M, seed: u64) -> M {
    struct Fill(ChaCha8Rng);
    impl ModuleMapper for Fill {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (id, value, mapper) = param.consume();
            if !value.is_require_grad() {
                return Param::from_mapped_value(id, value, mapper);
            }
            let shape = value.shape();
            let numbers: Vec<f32> = (0..shape.num_elements()).map(|_| 0.4 * uniform(&mut self.0)).collect();
            let value = Tensor::from_data(TensorData::new(numbers, shape), &value.device()).require_grad();
            Param::from_mapped_value(id, value, mapper)
        }
    }
    model.map(&mut Fill(ChaCha8Rng::seed_from_u64(seed)))
}

/// All float parameters and buffers by path.
pub fn parameters<M: Module>(model: &M) -> Vec<(String, Vec<f32>)> {
    #[derive(Default)]
    struct Read {
        path: Vec<String>,
        found: Vec<(String, Vec<f32>)>,
    }
    impl ModuleVisitor for Read {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_owned());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let numbers = param.base().into_data().iter::<f32>().collect();
            self.found.push((self.path.join("."), numbers));
        }
    }
    let mut read = Read::default();
    model.visit(&mut read);
    read.found
}

/// Demands equal paths, and values within `tolerance` of the largest magnitude of each tensor.
pub fn assert_close(expected: &[(String, Vec<f32>)], found: &[(String, Vec<f32>)], tolerance: f32, what: &str) {
    assert_eq!(expected.len(), found.len(), "{what}: number of parameters");
    for ((path, a), (found_path, b)) in expected.iter().zip(found) {
        assert_eq!((path, a.len()), (found_path, b.len()), "{what}");
        let scale = a.iter().fold(1e-2f32, |scale, x| scale.max(x.abs()));
        for (x, y) in a.iter().zip(b) {
            assert!((x - y).abs() <= tolerance * scale, "{what}: {path} has {y} for {x}, at a scale of {scale}");
        }
    }
}

fn mse(output: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
    (output - targets).powf_scalar(2.0).mean()
}

#[derive(Module, Debug)]
pub struct Mlp {
    layers: Vec<Linear>,
}

pub fn mlp() -> Case<Mlp> {
    let device = Device::flex().autodiff();
    let sizes = [(48, 33), (33, 17), (17, 4)];
    let layers = sizes.map(|(from, to)| LinearConfig::new(from, to).init(&device)).into();
    let loss = |model: &Mlp, batch: Batch| {
        let mut x = batch.features.flatten::<2>(1, 2);
        for (number, layer) in model.layers.iter().enumerate() {
            x = layer.forward(if number > 0 { activation::gelu(x) } else { x });
        }
        mse(x, batch.targets)
    };
    Case { model: with_values(Mlp { layers }, 1), loss, input: batch }
}

#[derive(Module, Debug)]
pub struct Transformer {
    tokens: Embedding,
    encoder: TransformerEncoder,
    norm: LayerNorm,
    head: Linear,
}

pub fn transformer() -> Case<Transformer> {
    let device = Device::flex().autodiff();
    let model = Transformer {
        tokens: EmbeddingConfig::new(13, 8).init(&device),
        encoder: TransformerEncoderConfig::new(8, 16, 2, 2).with_dropout(0.0).with_norm_first(true).init(&device),
        norm: LayerNormConfig::new(8).init(&device),
        head: LinearConfig::new(8, 4).init(&device),
    };
    let loss = |model: &Transformer, batch: Batch| {
        let x = model.tokens.forward(batch.tokens) + batch.features;
        let x = model.norm.forward(model.encoder.forward(TransformerEncoderInput::new(x)));
        mse(model.head.forward(x.mean_dim(1).squeeze_dim::<2>(1)), batch.targets)
    };
    Case { model: with_values(model, 2), loss, input: batch }
}

#[derive(Module, Debug)]
pub struct Recurrent {
    lstm: Lstm,
    head: Linear,
}

pub fn lstm() -> Case<Recurrent> {
    let device = Device::flex().autodiff();
    let model =
        Recurrent { lstm: LstmConfig::new(8, 9, true).init(&device), head: LinearConfig::new(9, 4).init(&device) };
    let loss = |model: &Recurrent, batch: Batch| {
        let (_, state) = model.lstm.forward(batch.features, None);
        mse(model.head.forward(state.hidden), batch.targets)
    };
    Case { model: with_values(model, 3), loss, input: batch }
}

#[derive(Module, Debug)]
pub struct Cnn {
    first: Conv2d,
    norm: Option<BatchNorm>,
    second: Conv2d,
    pool: AdaptiveAvgPool2d,
    head: Linear,
}

fn cnn_loss(model: &Cnn, batch: Batch) -> Tensor<1> {
    let x = model.first.forward(batch.features.unsqueeze_dim::<4>(1));
    let x = match &model.norm {
        Some(norm) => norm.forward(x),
        None => x,
    };
    let x = model.pool.forward(activation::relu(model.second.forward(activation::relu(x))));
    mse(model.head.forward(x.flatten::<2>(1, 3)), batch.targets)
}

fn cnn_with(norm: bool) -> Case<Cnn> {
    let device = Device::flex().autodiff();
    let model = Cnn {
        first: Conv2dConfig::new([1, 3], [3, 3]).with_bias(!norm).init(&device),
        norm: norm.then(|| BatchNormConfig::new(3).init(&device)),
        second: Conv2dConfig::new([3, 5], [2, 2]).init(&device),
        pool: AdaptiveAvgPool2dConfig::new([2, 2]).init(),
        head: LinearConfig::new(20, 4).init(&device),
    };
    Case { model: with_values(model, 4), loss: cnn_loss, input: batch }
}

pub fn cnn() -> Case<Cnn> {
    cnn_with(false)
}

pub fn cnn_with_batch_norm() -> Case<Cnn> {
    cnn_with(true)
}

/// An embedding that is also the output matrix.
#[derive(Module, Debug)]
pub struct Tied {
    tokens: Embedding,
    middle: Linear,
}

pub fn tied() -> Case<Tied> {
    let device = Device::flex().autodiff();
    let model =
        Tied { tokens: EmbeddingConfig::new(13, 8).init(&device), middle: LinearConfig::new(8, 8).init(&device) };
    let loss = |model: &Tied, batch: Batch| {
        let x = model.middle.forward(model.tokens.forward(batch.tokens.clone()).tanh());
        let logits = x.matmul(model.tokens.weight.val().transpose().unsqueeze());
        let chosen = activation::log_softmax(logits, 2).gather(2, batch.tokens.roll_dim(1, 1).unsqueeze_dim(2));
        chosen.mean().neg()
    };
    Case { model: with_values(model, 5), loss, input: batch }
}
