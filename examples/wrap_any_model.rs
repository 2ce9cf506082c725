//! Three models that know nothing of this library, each split over 2 and 4 ranks by a plan that is found for it, and
//! trained beside a run on one device: `cargo run --release --example wrap_any_model`.

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig};
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{
    BatchNorm, BatchNormConfig, Embedding, EmbeddingConfig, Linear, LinearConfig, Lstm, LstmConfig, PaddingConfig2d,
};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use burn_parallel::graph::TensorTree;
use burn_parallel::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const STEPS: usize = 12;
const BATCH: usize = 16;
const CLASSES: usize = 4;

fn main() -> Result<(), Error> {
    let device = Device::flex();
    device.seed(7);
    let device = device.autodiff();
    compare("transformer encoder", Reader::new(&device), sentences, Reader::loss)?;
    compare("convolutional net with batch norm", Viewer::new(&device), pictures, Viewer::loss)?;
    compare("LSTM", Listener::new(&device), sounds, Listener::loss)
}

/// Trains the model on one device, then split over ranks, and prints both losses.
fn compare<M: Module + Sync, B: TensorTree + Clone>(
    name: &str,
    model: M,
    batch: fn(usize) -> B,
    loss: fn(&M, B) -> Tensor<1>,
) -> Result<(), Error> {
    // Weights are drawn once, now; each run has leaves and running statistics of its own.
    let model = model.train();
    let own = || model.clone().fork(&Device::flex().autodiff()).train();
    let alone = one_device(own(), batch, loss);
    for ranks in [2, 4] {
        let plan = Plan::suggest_for(&model, ranks, batch(0), loss)?;
        let (whole, part) = (Plan::new().table(&model, ranks)?.bytes(), plan.table(&model, ranks)?.bytes());
        println!("{name}: {part} of {whole} bytes of parameters on each of {ranks} ranks\n");
        let together = launch::threads(ranks).run(|rank| split(own(), &plan, &rank, batch, loss))?.swap_remove(0);
        println!("  step   one device   {ranks} ranks");
        for (step, (alone, together)) in alone.iter().zip(&together).enumerate() {
            println!("  {:>4}   {alone:>10.6}   {together:.6}", step + 1);
        }
        println!();
    }
    Ok(())
}

/// An ordinary training loop.
fn one_device<M: Module, B>(mut model: M, batch: fn(usize) -> B, loss: fn(&M, B) -> Tensor<1>) -> Vec<f32> {
    let mut optim: ModuleOptimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let loss = loss(&model, batch(step));
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optim.step(1e-2, model, grads);
        losses.push(loss.into_scalar::<f32>());
    }
    losses
}

/// The same loop, run by every rank on its part of the model.
fn split<M: Module, B: TensorTree + Clone>(
    model: M,
    plan: &Plan,
    group: &Communicator,
    batch: fn(usize) -> B,
    loss: fn(&M, B) -> Tensor<1>,
) -> Result<Vec<f32>, Error> {
    let mut model = model.tensor_parallel(group, plan)?;
    let mut optim: ModuleOptimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let step = model.step(batch(step), loss)?;
        model = optim.step(1e-2, model, step.grads);
        losses.push(step.loss.item() as f32);
    }
    Ok(losses)
}

fn classify(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    CrossEntropyLossConfig::new().init(&logits.device()).forward(logits, targets)
}

/// Says which kind of sentence it reads.
#[derive(Module, Debug)]
struct Reader {
    words: Embedding,
    encoder: TransformerEncoder,
    head: Linear,
}

impl Reader {
    fn new(device: &Device) -> Self {
        Self {
            words: EmbeddingConfig::new(32, 64).init(device),
            encoder: TransformerEncoderConfig::new(64, 256, 4, 2).with_dropout(0.0).init(device),
            head: LinearConfig::new(64, CLASSES).init(device),
        }
    }

    fn loss(&self, (sentences, kinds): (Tensor<2, Int>, Tensor<1, Int>)) -> Tensor<1> {
        let x = self.encoder.forward(TransformerEncoderInput::new(self.words.forward(sentences)));
        classify(self.head.forward(x.mean_dim(1).squeeze_dim::<2>(1)), kinds)
    }
}

/// Says where in a picture the light is.
#[derive(Module, Debug)]
struct Viewer {
    first: Conv2d,
    first_norm: BatchNorm,
    second: Conv2d,
    second_norm: BatchNorm,
    pool: AdaptiveAvgPool2d,
    head: Linear,
}

impl Viewer {
    fn new(device: &Device) -> Self {
        let conv = |channels| {
            let padding = PaddingConfig2d::Explicit(1, 1, 1, 1);
            Conv2dConfig::new(channels, [3, 3]).with_padding(padding).with_bias(false).init(device)
        };
        Self {
            first: conv([1, 16]),
            first_norm: BatchNormConfig::new(16).init(device),
            second: conv([16, 32]),
            second_norm: BatchNormConfig::new(32).init(device),
            pool: AdaptiveAvgPool2dConfig::new([2, 2]).init(),
            head: LinearConfig::new(4 * 32, CLASSES).init(device),
        }
    }

    fn loss(&self, (pictures, places): (Tensor<4>, Tensor<1, Int>)) -> Tensor<1> {
        let x = activation::relu(self.first_norm.forward(self.first.forward(pictures)));
        let x = activation::relu(self.second_norm.forward(self.second.forward(x)));
        classify(self.head.forward(self.pool.forward(x).flatten::<2>(1, 3)), places)
    }
}

/// Says when in a recording the noise was.
#[derive(Module, Debug)]
struct Listener {
    lstm: Lstm,
    head: Linear,
}

impl Listener {
    fn new(device: &Device) -> Self {
        Self { lstm: LstmConfig::new(8, 32, true).init(device), head: LinearConfig::new(32, CLASSES).init(device) }
    }

    fn loss(&self, (sounds, times): (Tensor<3>, Tensor<1, Int>)) -> Tensor<1> {
        let (_, state) = self.lstm.forward(sounds, None);
        classify(self.head.forward(state.hidden), times)
    }
}

/// The numbers of one step: the same whoever asks.
fn numbers(step: usize) -> (ChaCha8Rng, Vec<i64>) {
    let mut rng = ChaCha8Rng::seed_from_u64(step as u64);
    let classes = (0..BATCH).map(|_| rng.random_range(0..CLASSES as i64)).collect();
    (rng, classes)
}

fn tensor<const D: usize>(values: Vec<f32>, dims: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, dims), &Device::flex().autodiff())
}

fn classes(values: Vec<i64>) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(values, [BATCH]), &Device::flex().autodiff())
}

/// Words of a sentence are from a quarter of the dictionary, most of them.
fn sentences(step: usize) -> (Tensor<2, Int>, Tensor<1, Int>) {
    let (mut rng, kinds) = numbers(step);
    let mut word =
        |kind: i64| if rng.random_bool(0.5) { kind * 8 + rng.random_range(0..8) } else { rng.random_range(0..32) };
    let words: Vec<i64> = kinds.iter().flat_map(|kind| (0..12).map(|_| word(*kind)).collect::<Vec<_>>()).collect();
    (Tensor::from_data(TensorData::new(words, [BATCH, 12]), &Device::flex().autodiff()), classes(kinds))
}

/// A quarter of the picture is brighter.
fn pictures(step: usize) -> (Tensor<4>, Tensor<1, Int>) {
    let (mut rng, places) = numbers(step);
    let mut pixels = Vec::new();
    for place in &places {
        for pixel in 0..64 {
            let quarter = i64::from(pixel / 8 >= 4) * 2 + i64::from(pixel % 8 >= 4);
            pixels.push(rng.random_range(-1.0..1.0) + if quarter == *place { 0.5 } else { 0.0 });
        }
    }
    (tensor(pixels, [BATCH, 1, 8, 8]), classes(places))
}

/// A quarter of the recording is louder.
fn sounds(step: usize) -> (Tensor<3>, Tensor<1, Int>) {
    let (mut rng, times) = numbers(step);
    let mut samples = Vec::new();
    for time in &times {
        for moment in 0..8 {
            let noise = if moment / 2 == *time { 1.0 } else { 0.0 };
            samples.extend((0..8).map(|_| rng.random_range(-1.0..1.0) + noise));
        }
    }
    (tensor(samples, [BATCH, 8, 8]), classes(times))
}
