//! GPT-2 and BERT on burn's own layers: directories of `transformers` are loaded, trained with PyTorch's losses, and
//! written again.

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::nn::activation::ActivationConfig;
use burn::nn::attention::generate_autoregressive_mask;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::prelude::*;
use burn::tensor::activation::{gelu, log_softmax};
use burn_parallel::comm::part;
use burn_parallel::hf::{self, Mapping, SaveConfig};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;

use crate::Dir;
use crate::hf::folder;
use crate::hf::save::same;

pub const WORDS: usize = 96;
const WIDTH: usize = 32;
const LAYERS: usize = 4;
/// The target of a position that is not trained on, and the token of a position that is none.
const IGNORED: i64 = -100;
const PAD: i64 = 0;

/// What PyTorch has made of a directory in steps of AdamW; `tests/data/hf/README.md` says more.
#[derive(serde::Deserialize)]
pub struct Steps {
    pub tokens: Vec<Vec<Vec<i64>>>,
    #[serde(default)]
    types: Vec<Vec<Vec<i64>>>,
    #[serde(default)]
    labels: Vec<Vec<Vec<i64>>>,
    pub losses: Vec<f64>,
    pub grad_norms: Vec<f64>,
    pub logits_first: Vec<f64>,
}

impl Steps {
    pub fn of(dir: &Path) -> Self {
        serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap()
    }

    /// What there is of a step, for one of some replicas: tokens, or tokens, their types and what is to be found.
    fn batch(&self, step: usize, (replica, replicas): (usize, usize)) -> Vec<Tensor<2, Int>> {
        let device = Device::flex().autodiff();
        let all = [&self.tokens, &self.types, &self.labels].into_iter().filter(|all| !all.is_empty());
        let share = |rows: &Vec<Vec<i64>>| {
            let data = TensorData::new(rows.concat(), [rows.len(), rows[0].len()]);
            Tensor::from_data(data, &device).slice([part(rows.len(), replicas, replica)])
        };
        all.map(|all| share(&all[step])).collect()
    }
}

/// A model with the fields of [`Mapping::gpt2`], whose head is its embedding.
#[derive(Module, Debug)]
pub struct Gpt2 {
    tokens: Embedding,
    positions: Embedding,
    layers: TransformerEncoder,
    norm: LayerNorm,
}

/// A model with the fields of [`Mapping::bert`], and a head whose weights are the embedding.
#[derive(Module, Debug)]
pub struct Bert {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    layers: TransformerEncoder,
    transform: Linear,
    transform_norm: LayerNorm,
    decoder: Bias,
}

#[derive(Module, Debug)]
struct Bias {
    bias: burn::module::Param<Tensor<1>>,
}

/// What the tests do with each of them.
pub trait Encoder: Module + Sized {
    fn fresh(device: &Device) -> Self;
    fn folder() -> PathBuf;
    fn mapping() -> Mapping;
    fn plan() -> Plan;
    /// `[rows, length, WORDS]`.
    fn logits(&self, batch: &[Tensor<2, Int>]) -> Tensor<3>;
    fn loss(&self, batch: Vec<Tensor<2, Int>>) -> Loss;

    /// The mesh `[dp, pp, tp]`.
    fn strategy([dp, pp, tp]: [usize; 3]) -> Strategy {
        let mut strategy = Strategy::new().with_dp(dp);
        if tp > 1 {
            strategy = strategy.with_tp(tp, Self::plan());
        }
        if pp > 1 {
            let cut = (1..pp).map(|stage| format!("layers.layers.{}.*", stage * LAYERS / pp)).collect::<Vec<_>>();
            strategy = strategy.with_pp(pp, PipelineConfig::new(2).with_cut(Cut::before(cut)));
        }
        strategy
    }
}

fn embedding(size: usize, device: &Device) -> Embedding {
    EmbeddingConfig::new(size, WIDTH).init(device)
}

fn places(tokens: &Tensor<2, Int>) -> Tensor<2, Int> {
    let length = tokens.dims()[1];
    Tensor::arange(0..length as i64, &tokens.device()).reshape([1, length])
}

/// `x @ weight^T`, for the weights of an embedding.
fn head(x: Tensor<3>, words: &Embedding) -> Tensor<3> {
    x.matmul(words.weight.val().transpose().unsqueeze())
}

impl Encoder for Gpt2 {
    fn fresh(device: &Device) -> Self {
        let layers = TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 4, LAYERS)
            .with_dropout(0.0)
            .with_norm_first(true)
            .with_activation(ActivationConfig::GeluApproximate);
        Self {
            tokens: embedding(WORDS, device),
            positions: embedding(32, device),
            layers: layers.init(device),
            norm: LayerNormConfig::new(WIDTH).init(device),
        }
    }

    fn folder() -> PathBuf {
        folder("gpt2")
    }

    fn mapping() -> Mapping {
        Mapping::gpt2()
    }

    fn plan() -> Plan {
        Plan::tied_vocabulary("tokens").then(Plan::megatron())
    }

    fn logits(&self, batch: &[Tensor<2, Int>]) -> Tensor<3> {
        let tokens = &batch[0];
        let x = self.tokens.forward(tokens.clone()) + self.positions.forward(places(tokens));
        let causal = generate_autoregressive_mask(1, tokens.dims()[1], &tokens.device());
        let x = self.layers.forward(TransformerEncoderInput::new(x).mask_attn(causal));
        head(self.norm.forward(x), &self.tokens)
    }

    fn loss(&self, batch: Vec<Tensor<2, Int>>) -> Loss {
        let [rows, length] = batch[0].dims();
        let targets = batch[0].clone().narrow(1, 1, length - 1).reshape([rows * (length - 1), 1]);
        let logits = self.logits(&[batch[0].clone().narrow(1, 0, length - 1)]);
        let nats = log_softmax(logits.flatten::<2>(0, 1), 1).gather(1, targets).sum().neg();
        Loss::sum(nats, (rows * (length - 1)) as f64)
    }
}

impl Encoder for Bert {
    fn fresh(device: &Device) -> Self {
        let epsilon = 1e-12;
        let norm = || LayerNormConfig::new(WIDTH).with_epsilon(epsilon).init(device);
        let layers = TransformerEncoderConfig::new(WIDTH, 4 * WIDTH, 4, LAYERS).with_dropout(0.0);
        Self {
            words: embedding(WORDS, device),
            positions: embedding(32, device),
            types: embedding(2, device),
            norm: norm(),
            layers: layers.with_layer_norm_eps(epsilon).init(device),
            transform: LinearConfig::new(WIDTH, WIDTH).init(device),
            transform_norm: norm(),
            decoder: Bias { bias: burn::nn::Initializer::Zeros.init([WORDS], device) },
        }
    }

    fn folder() -> PathBuf {
        folder("bert")
    }

    fn mapping() -> Mapping {
        Mapping::bert()
    }

    fn plan() -> Plan {
        Plan::megatron().then(Plan::new().shard("words.weight", 0).shard("decoder.bias", 0))
    }

    fn logits(&self, batch: &[Tensor<2, Int>]) -> Tensor<3> {
        let (tokens, types) = (&batch[0], &batch[1]);
        let x = self.words.forward(tokens.clone())
            + self.positions.forward(places(tokens))
            + self.types.forward(types.clone());
        let input = TransformerEncoderInput::new(self.norm.forward(x)).mask_pad(tokens.clone().equal_elem(PAD));
        let x = gelu(self.transform.forward(self.layers.forward(input)));
        head(self.transform_norm.forward(x), &self.words) + self.decoder.bias.val().unsqueeze()
    }

    /// The mean over the positions that have a label, of which there may be any number.
    fn loss(&self, batch: Vec<Tensor<2, Int>>) -> Loss {
        let [rows, length] = batch[0].dims();
        let labels = batch[2].clone().reshape([rows * length, 1]);
        let counts = labels.clone().not_equal_elem(IGNORED).float();
        let logits: Tensor<2> = self.logits(&batch).flatten(0, 1);
        let nats = log_softmax(logits, 1).gather(1, labels.clamp_min(0)) * counts.clone();
        Loss::sum(nats.sum().neg(), counts.sum())
    }
}

fn optimizer() -> ModuleOptimizer {
    AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.99).with_epsilon(1e-8).with_weight_decay(0.1).init()
}

fn near(what: &str, found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-4 * expected.abs(), "{what}: {found}, not {expected}");
}

/// Loads, trains the steps that PyTorch has, and writes the directory before and after.
pub fn trained<M: Encoder>(axes: [usize; 3], strategy: &Strategy, dir: &Path, steps: usize) {
    let golden = Steps::of(&M::folder());
    launch::threads(axes.iter().product())
        .run(|world| {
            let model = M::fresh(&world.device().autodiff()).parallelize(&world, strategy)?;
            let mut model = model.load(&mut hf::open(M::folder())?.mapped(M::mapping())?)?;
            let config = SaveConfig::new(M::mapping()).with_files_of(M::folder()).with_piece_bytes(2000);
            hf::save(&model, &world, dir.join("before"), &config)?;
            let (share, mut optim) = ((model.mesh().coordinate("dp")?, axes[0]), optimizer());
            for step in 0..steps {
                let gave = model.step(golden.batch(step, share), M::loss)?.clip_grad_norm(&model, 1e9)?;
                near(&format!("{axes:?}, loss of step {step}"), gave.loss.item(), golden.losses[step]);
                let norm = gave.grad_norm.unwrap_or(f64::NAN);
                near(&format!("{axes:?}, norm of step {step}"), norm, golden.grad_norms[step]);
                model = model.optimize(&mut optim, 1e-2, gave)?;
            }
            hf::save(&model, &world, dir.join("after"), &config).map(drop)
        })
        .unwrap();
}

fn every_mesh<M: Encoder>() {
    for axes in [[1, 1, 1], [2, 1, 1], [1, 1, 2], [1, 2, 1]] {
        let dir = Dir::fresh();
        trained::<M>(axes, &M::strategy(axes), dir.path(), 5);
        same(&M::folder(), &dir.join("before"));
        logits_are_those_of_pytorch::<M>(&dir.join("before"));
    }
    let dir = Dir::fresh();
    let data = DataParallelConfig::new().with_sharding(Sharding::Parameters);
    trained::<M>([2, 1, 1], &Strategy::new().with_dp(2).with_data(data), dir.path(), 5);
    same(&M::folder(), &dir.join("before"));
}

fn logits_are_those_of_pytorch<M: Encoder>(dir: &Path) {
    let golden = Steps::of(&M::folder());
    launch::threads(1)
        .run(|world| {
            let model = M::fresh(&world.device().autodiff()).parallelize(&world, &Strategy::new())?;
            let model = model.load(&mut hf::open(dir)?.mapped(M::mapping())?)?;
            let logits = model.forward_with(golden.batch(0, (0, 1)), |model, batch| model.logits(&batch))?;
            let first: Vec<f32> = logits.slice([0..1, 0..1, 0..16]).into_data().try_to_vec().unwrap();
            let largest = golden.logits_first.iter().fold(0f64, |most, x| most.max(x.abs()));
            for (found, expected) in first.iter().zip(&golden.logits_first) {
                assert!((f64::from(*found) - expected).abs() < 1e-5 * largest, "{first:?}, {:?}", golden.logits_first);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn gpt2_trains_with_the_losses_of_pytorch() {
    every_mesh::<Gpt2>();
}

#[test]
fn bert_trains_with_the_losses_of_pytorch() {
    every_mesh::<Bert>();
}
