//! What PyTorch reports for tiny Llama and Qwen2 models, on every mesh: logits, and the losses and norms of steps of
//! AdamW.

use std::fs;
use std::path::{Path, PathBuf};

use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::hf::{self, Mapping};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::Engine;

use super::close;
use super::meshes::{Meshed, on_mesh};
use crate::common::finetune::directory;
use crate::common::llama::{Batch, Llama, LlamaConfig};

/// What PyTorch has made of a checkpoint in steps of AdamW.
#[derive(serde::Deserialize)]
struct Golden {
    tokens: Vec<Vec<Vec<i64>>>,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    /// The first logits of the first row, before the first step.
    logits_first: Vec<f64>,
    /// The sum of the sizes of all logits of the first two rows.
    logits_sum: f64,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hf").join(name)
}

impl Golden {
    fn read(name: &str) -> Self {
        serde_json::from_slice(&fs::read(folder(name).join("golden.json")).unwrap()).unwrap()
    }

    fn tokens(&self, step: usize, device: &Device) -> Tensor<2, Int> {
        let rows = &self.tokens[step];
        let dims = [rows.len(), rows[0].len()];
        Tensor::from_data(TensorData::new(rows.concat(), dims), device)
    }
}

fn optimizer() -> ModuleOptimizer {
    AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.99).with_epsilon(1e-8).with_weight_decay(0.1).init()
}

fn cut(layers: usize, stages: usize) -> Cut {
    Cut::before((1..stages).map(|stage| format!("model.layers.{}.*", stage * layers / stages)).collect::<Vec<_>>())
}

fn pytorch(name: &str, axes: [usize; 3]) {
    launch::threads(axes.iter().product())
        .run(|world| {
            let device = world.device().autodiff();
            let config = LlamaConfig::read(folder(name)).map_err(Error::user)?;
            let check = Check { golden: &Golden::read(name), name, axes, device: device.clone() };
            let cut = |stages| cut(config.layers, stages);
            on_mesh(&world, axes, config.init(&device), &directory::plan(), cut, check)
        })
        .unwrap();
}

struct Check<'a> {
    golden: &'a Golden,
    name: &'a str,
    axes: [usize; 3],
    device: Device,
}

impl Meshed<Llama> for Check<'_> {
    fn run<P: ParallelModule<Model = Llama>>(self, mut model: P, dp: &Communicator) -> Result<(), Error> {
        let share = |tokens: Tensor<2, Int>| {
            let share = burn_parallel::comm::part(tokens.dims()[0], dp.size(), dp.rank());
            Batch::of_documents(tokens.slice([share]))
        };
        // A pipeline is not cut for a forward alone.
        model.prepare(share(self.golden.tokens(0, &self.device)), Llama::loss)?;
        let mut model = model.load(&mut hf::open(folder(self.name))?.mapped(Mapping::llama())?)?;
        self.logits(&model)?;
        let mut optim = optimizer();
        for number in 0..self.golden.losses.len() {
            let step = model.step(share(self.golden.tokens(number, &self.device)), Llama::loss)?;
            let step = step.clip_grad_norm(&model, 1e9)?;
            let what = format!("{} on {:?}, step {number}", self.name, self.axes);
            close(&what, self.golden.losses[number], step.loss.item(), 1e-4);
            close(&what, self.golden.grad_norms[number], step.grad_norm.unwrap(), 1e-4);
            model = model.optimize(&mut optim, 1e-2, step)?;
        }
        Ok(())
    }
}

impl Check<'_> {
    fn logits<P: ParallelModule<Model = Llama>>(&self, model: &P) -> Result<(), Error> {
        let batch = Batch::of_documents(self.golden.tokens(0, &Device::flex()));
        let logits: Tensor<3> =
            model.forward_with(batch, |model, batch| model.forward(batch.tokens, batch.positions, batch.documents))?;
        let what = format!("logits of {} on {:?}", self.name, self.axes);
        let first: Vec<f32> = logits.clone().slice([0..1, 0..1, 0..16]).into_data().try_to_vec().unwrap();
        let largest = self.golden.logits_first.iter().fold(0.0, |a, b| b.abs().max(a));
        for (found, expected) in first.into_iter().zip(&self.golden.logits_first) {
            assert!((f64::from(found) - expected).abs() <= 1e-4 * largest, "{what}: {found}, not {expected}");
        }
        let sum: f32 = logits.narrow(0, 0, 2).abs().sum().into_scalar();
        close(&what, self.golden.logits_sum, sum.into(), 1e-4);
        Ok(())
    }
}

/// There are two heads of keys and values, and 4 layers.
const MESHES: [[usize; 3]; 9] =
    [[1, 1, 1], [2, 1, 1], [1, 1, 2], [1, 1, 4], [1, 2, 1], [1, 3, 1], [1, 4, 1], [2, 2, 1], [2, 2, 2]];

#[test]
fn llama_trains_as_with_pytorch_on_every_mesh() {
    MESHES.into_iter().for_each(|axes| pytorch("llama_gqa", axes));
}

#[test]
fn qwen2_with_a_tied_head_trains_as_with_pytorch_on_every_mesh() {
    MESHES.into_iter().for_each(|axes| pytorch("qwen2_tied", axes));
}

/// Replicas alone, whose steps may be captured as well; and those that divide something among themselves.
#[test]
fn replicas_train_as_with_pytorch_by_either_engine() {
    for (name, replicas, sharding, engine) in [
        ("llama_gqa", 1, Sharding::None, Engine::Captured),
        ("llama_gqa", 2, Sharding::None, Engine::Captured),
        ("qwen2_tied", 2, Sharding::Gradients, Engine::Captured),
        ("llama_gqa", 2, Sharding::Optimizer, Engine::Eager),
        ("llama_gqa", 2, Sharding::Parameters, Engine::Auto),
        ("qwen2_tied", 3, Sharding::Parameters, Engine::Auto),
    ] {
        launch::threads(replicas)
            .run(|world| {
                let device = world.device().autodiff();
                let config = LlamaConfig::read(folder(name)).map_err(Error::user)?;
                let data = DataParallelConfig::new().with_sharding(sharding);
                let strategy = Strategy::new().with_dp(replicas).with_data(data).with_engine(engine);
                let model = config.init(&device).parallelize(&world, &strategy)?;
                assert_eq!(model.report().captured, engine != Engine::Eager);
                let replicas = model.mesh().axis("dp")?;
                Check { golden: &Golden::read(name), name, axes: [replicas.size(), 1, 1], device }.run(model, &replicas)
            })
            .unwrap();
    }
}

/// Other families and positions of longer texts: YaRN, Llama 3's and linear, in configs of both forms.
#[test]
fn other_families_train_as_with_pytorch() {
    for name in ["qwen3_yarn", "llama3_biased", "mistral_linear"] {
        for axes in [[1, 1, 1], [1, 1, 2], [1, 2, 1]] {
            pytorch(name, axes);
        }
    }
}
