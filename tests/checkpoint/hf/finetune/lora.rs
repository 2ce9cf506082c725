//! Adapters on every mesh.

use std::path::Path;
use std::process::Command;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::hf;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::Parallel;

use super::{folder, strategy};
use crate::Dir;
use crate::common::finetune::directory;
use crate::common::finetune::lora::{self, LoraConfig};
use crate::common::llama::{Batch, Llama, LlamaConfig};
use crate::common::models::Numbers;
use crate::hf::values;

fn adapters() -> LoraConfig {
    let targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"].map(String::from).to_vec();
    LoraConfig { rank: 3, alpha: 6.0, targets, seed: 5 }
}

fn tokens(seed: u64) -> Tensor<2, Int> {
    Numbers(seed).classes([4, 13], 48, &Device::flex().autodiff())
}

/// Trains a few steps, and returns their losses.
fn train(model: &mut Option<Parallel<Llama>>, axes: [usize; 3]) -> Result<Vec<f64>, Error> {
    let mut optim: ModuleOptimizer = AdamWConfig::new().with_weight_decay(0.1).init();
    let mut losses = Vec::new();
    for _ in 0..3 {
        let mut of = model.take().unwrap();
        let share = burn_parallel::comm::part(4, axes[0], of.mesh().coordinate("dp")?);
        let step = of.step(Batch::of_documents(tokens(0).slice([share])), Llama::loss)?;
        losses.push(step.loss.item());
        *model = Some(of.optimize(&mut optim, 2e-2, step)?);
    }
    Ok(losses)
}

fn fresh(world: &Rank, axes: [usize; 3], sharding: Sharding) -> Result<Parallel<Llama>, Error> {
    let model = LlamaConfig::read(folder()).map_err(Error::user)?.init(&world.device().autodiff());
    let model = lora::adapt(model, &adapters()).map_err(Error::user)?;
    let model = model.parallelize(world, &strategy(axes, sharding))?;
    directory::load(model, &folder(), &Batch::of_documents(tokens(0)))
}

fn trained(dir: &Path, axes: [usize; 3], sharding: Sharding) -> Vec<f64> {
    let losses = launch::threads(axes.iter().product()).run(|world| {
        let mut model = Some(fresh(&world, axes, sharding)?);
        let losses = train(&mut model, axes)?;
        let model = model.unwrap();
        lora::save(&model, &world, (&folder(), &dir.join("adapter")), &adapters())?;
        directory::save(&model, &world, (&folder(), &dir.join("merged")), Some(adapters().alpha))?;
        Ok(losses)
    });
    losses.unwrap().remove(0)
}

/// Demands that two directories have nearly the same tensors.
fn near(one: &Path, other: &Path) {
    let (mut one, mut other) = (hf::open(one).unwrap(), hf::open(other).unwrap());
    let names: Vec<String> = one.names().map(Into::into).collect();
    assert_eq!(names, other.names().collect::<Vec<_>>());
    for name in names {
        for (a, b) in values(&mut one, &name).into_iter().zip(values(&mut other, &name)) {
            assert!((a - b).abs() < 2e-5, "{name}: {a} and {b}");
        }
    }
}

#[test]
fn adapters_train_alike_on_every_mesh() {
    let first = Dir::fresh();
    let expected = trained(first.path(), [1, 1, 1], Sharding::None);
    assert!(expected[2] < expected[0], "{expected:?}");
    let meshes = [
        ([2, 1, 1], Sharding::None),
        ([1, 2, 1], Sharding::None),
        ([1, 1, 2], Sharding::None),
        ([2, 1, 1], Sharding::Optimizer),
        ([2, 1, 1], Sharding::Gradients),
        ([2, 1, 1], Sharding::Parameters),
        ([2, 1, 2], Sharding::Optimizer),
        ([2, 1, 2], Sharding::Gradients),
        ([2, 2, 1], Sharding::Parameters),
        ([1, 2, 2], Sharding::None),
    ];
    for (axes, sharding) in meshes {
        let dir = Dir::fresh();
        let found = trained(dir.path(), axes, sharding);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 2e-5 * expected, "{axes:?} {sharding:?}: {found}, not {expected}");
        }
        near(&first.join("adapter/adapter_model.safetensors"), &dir.join("adapter/adapter_model.safetensors"));
        near(&first.join("merged"), &dir.join("merged"));
    }
    peft_has_the_same_logits(&first);
}

/// Where Python with `peft` is there, which `BURN_PARALLEL_PYTHON` says: the adapters of the directory, and the merged
/// one, have the same logits there, and other than the base.
fn peft_has_the_same_logits(dir: &Dir) {
    let Some(python) = std::env::var_os("BURN_PARALLEL_PYTHON") else {
        println!(
            "SKIPPED, not passed: what Python's peft makes of the adapters, which BURN_PARALLEL_PYTHON would name"
        );
        return;
    };
    let script = r#"
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, merged = sys.argv[1:]
tokens = torch.arange(24).reshape(2, 12)
with torch.no_grad():
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = plain(tokens).logits
    adapted = PeftModel.from_pretrained(plain, adapter)(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens).logits
assert (before - adapted).abs().max() > 1e-2
assert (merged - adapted).abs().max() < 1e-4, (merged - adapted).abs().max()
"#;
    let paths = [folder(), dir.join("adapter"), dir.join("merged")];
    let output = Command::new(&python).arg("-c").arg(script).args(paths).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn training_goes_on_from_a_directory_of_adapters() {
    let dir = Dir::fresh();
    trained(dir.path(), [1, 1, 1], Sharding::None);
    let loss = |axes: [usize; 3], resumed: bool| {
        let losses = launch::threads(axes.iter().product()).run(|world| {
            let mut model = match resumed {
                true => lora::resume(fresh(&world, axes, Sharding::None)?, &dir.join("adapter"))?,
                false => {
                    let model = LlamaConfig::read(folder()).map_err(Error::user)?.init(&world.device().autodiff());
                    let model = model.parallelize(&world, &strategy(axes, Sharding::None))?;
                    directory::load(model, &dir.join("merged"), &Batch::of_documents(tokens(0)))?
                }
            };
            Ok(model.step(Batch::of_documents(tokens(9)), Llama::loss)?.loss.item())
        });
        losses.unwrap()[0]
    };
    let merged = loss([1, 1, 1], false);
    for axes in [[1, 1, 1], [1, 2, 1], [1, 1, 2]] {
        let resumed = loss(axes, true);
        assert!((resumed - merged).abs() < 1e-5 * merged, "{axes:?}: {resumed}, not {merged}");
    }
}

#[test]
fn no_weight_is_made_for_an_adapter() {
    struct Made(usize);
    impl ModuleVisitor for Made {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0 += usize::from(param.is_initialized());
        }
    }
    let model = LlamaConfig::read(folder()).unwrap().init(&Device::flex().autodiff());
    let model = lora::adapt(model, &adapters()).unwrap();
    let mut made = Made(0);
    model.visit(&mut made);
    // Two factors for each of five projections of two layers.
    assert_eq!(made.0, 20);
}

#[test]
fn adapters_that_cannot_be() {
    let says = |change: &dyn Fn(&mut LoraConfig), words: &str| {
        let mut config = adapters();
        change(&mut config);
        let said = config.check().unwrap_err();
        assert!(said.contains(words) && !said.contains('\n'), "{said}");
    };
    says(&|config| config.rank = 0, "a rank from 1");
    says(&|config| config.alpha = f64::NAN, "an alpha above 0");
    says(&|config| config.targets.clear(), "needs a projection");
    says(&|config| config.targets.push("lm_head".into()), "`lm_head` is no projection");
}
