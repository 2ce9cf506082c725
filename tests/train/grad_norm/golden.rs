//! The norms that PyTorch reports for tiny Llama and Qwen2 models, on every mesh.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::prelude::*;
use safetensors::SafeTensors;

use super::meshes::{Meshed, on_mesh};
use crate::common::llama::{CausalLm, Config};

/// What PyTorch has made of a checkpoint in steps of AdamW.
#[derive(serde::Deserialize)]
struct Golden {
    tokens: Vec<Vec<Vec<i64>>>,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hf").join(name)
}

impl Golden {
    fn read(name: &str) -> Self {
        serde_json::from_slice(&fs::read(folder(name).join("golden.json")).unwrap()).unwrap()
    }

    fn batch(&self, step: usize, device: &Device) -> Tensor<2, Int> {
        let rows = &self.tokens[step];
        let dims = [rows.len(), rows[0].len()];
        Tensor::from_data(TensorData::new(rows.concat(), dims), device)
    }
}

/// Gives a model the values of a Hugging Face file, whose linear weights are transposed and whose norms have a `weight`.
struct Load<'a> {
    file: SafeTensors<'a>,
    path: Vec<String>,
}

impl ModuleMapper for Load<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        let name = path.strip_suffix(".gamma").map_or(path.clone(), |norm| format!("{norm}.weight"));
        let view = self.file.tensor(&name).unwrap();
        let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let (id, old, mapper) = param.consume();
        let device = old.device();
        let new = Tensor::<D>::from_data(TensorData::new(values, view.shape().to_vec()), &device);
        let new = if D == 2 && !name.contains("embed_tokens") { new.transpose() } else { new };
        assert_eq!(new.dims(), old.dims(), "{name}");
        Param::from_mapped_value(id, new.detach().require_grad(), mapper)
    }
}

fn model(name: &str, tied: bool, device: &Device) -> CausalLm {
    let sizes = Config { words: 512, width: 64, inner: 176, layers: 4, heads: 8, kv_heads: 2, ..Config::LLAMA };
    let model = Config { tied, bias: tied, ..sizes }.init(device);
    let bytes = fs::read(folder(name).join("model.safetensors")).unwrap();
    model.map(&mut Load { file: SafeTensors::deserialize(&bytes).unwrap(), path: Vec::new() })
}

fn optimizer() -> ModuleOptimizer {
    AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.99).with_epsilon(1e-8).with_weight_decay(0.1).init()
}

fn plan(tied: bool) -> Plan {
    let attention = Plan::new().shard("*.q_proj.*", 1).shard("*.k_proj.*", 1).shard("*.v_proj.*", 1);
    let biases = Plan::new()
        .shard_if_present("*.q_proj.bias", 0)
        .shard_if_present("*.k_proj.bias", 0)
        .shard_if_present("*.v_proj.bias", 0);
    let layers = biases
        .then(attention)
        .shard("*.o_proj.weight", 0)
        .shard("*.gate_proj.weight", 1)
        .shard("*.up_proj.weight", 1)
        .shard("*.down_proj.weight", 0);
    match tied {
        true => layers.shard_padded("model.embed_tokens.weight", 0),
        false => layers.then(Plan::vocabulary("model.embed_tokens", "lm_head")),
    }
}

fn cut(stages: usize) -> Cut {
    Cut::before((1..stages).map(|stage| format!("model.layers.{}.*", stage * 4 / stages)).collect::<Vec<_>>())
}

/// A mean over the tokens of the rows.
fn loss(model: &CausalLm, tokens: Tensor<2, Int>) -> Loss {
    let [rows, length] = tokens.dims();
    Loss::mean(model.loss(tokens), (rows * (length - 1)) as f64)
}

fn pytorch(name: &str, tied: bool, axes: [usize; 3]) {
    let golden = Golden::read(name);
    launch::threads(axes.iter().product())
        .run(|world| {
            let device = world.device().autodiff();
            let model = model(name, tied, &device);
            on_mesh(&world, axes, model, &plan(tied), cut, Check { golden: &golden, name, axes, device })
        })
        .unwrap();
}

struct Check<'a> {
    golden: &'a Golden,
    name: &'a str,
    axes: [usize; 3],
    device: Device,
}

impl Meshed<CausalLm> for Check<'_> {
    fn run<P: ParallelModule<Model = CausalLm>>(self, mut model: P, dp: &Communicator) -> Result<(), Error> {
        let mut optim = optimizer();
        for number in 0..self.golden.losses.len() {
            let batch = self.golden.batch(number, &self.device);
            let share = burn_parallel::comm::part(batch.dims()[0], dp.size(), dp.rank());
            let step = model.step(batch.slice([share]), loss)?;
            let step = step.clip_grad_norm(&model, 1e9)?;
            let what = format!("{} on {:?}, step {number}", self.name, self.axes);
            close(&what, self.golden.losses[number], step.loss.item(), 2e-5);
            close(&what, self.golden.grad_norms[number], step.grad_norm.unwrap(), 5e-4);
            model = optim.step(1e-2, model, step.grads);
        }
        Ok(())
    }
}

#[track_caller]
fn close(what: &str, expected: f64, found: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance * expected, "{what}: {found}, not {expected}");
}

const MESHES: [[usize; 3]; 8] =
    [[1, 1, 1], [2, 1, 1], [1, 1, 2], [1, 1, 4], [1, 2, 1], [1, 3, 1], [2, 2, 1], [2, 2, 2]];

#[test]
fn llama_has_the_norms_of_pytorch_on_every_mesh() {
    MESHES.into_iter().for_each(|axes| pytorch("llama_gqa", false, axes));
}

#[test]
fn qwen2_with_a_tied_head_has_the_norms_of_pytorch_on_every_mesh() {
    MESHES.into_iter().for_each(|axes| pytorch("qwen2_tied", true, axes));
}
