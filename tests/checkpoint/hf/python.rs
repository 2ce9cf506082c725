//! Python's `transformers` and `peft` read what is written here, and what they write is read here.
//!
//! Ignored where `BURN_PARALLEL_PYTHON` does not name a Python with `torch`, `transformers` and `peft`:
//! `BURN_PARALLEL_PYTHON=python3 cargo test --test checkpoint -- --ignored python`.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use burn_parallel::hf::{self, Adapter, Mapping, SaveConfig};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::Engine;

use crate::Dir;
use crate::hf::adapter;
use crate::hf::encoders::{Bert, Encoder, Gpt2, Steps, trained};
use crate::hf::golden::Name;
use crate::hf::save::through_by;

/// Runs a script, and returns what it prints.
fn python<A: AsRef<OsStr>>(script: &str, arguments: impl IntoIterator<Item = A>) -> String {
    let python = std::env::var_os("BURN_PARALLEL_PYTHON").expect("BURN_PARALLEL_PYTHON names no Python");
    let mut command = Command::new(python);
    command.args(["-c", &[COMMON, script].concat()]).args(arguments).env("OMP_NUM_THREADS", "1");
    let output = command.env_remove("OPENBLAS_CORETYPE").env_remove("OPENBLAS_L2_SIZE").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

const COMMON: &str = r#"
import json, os, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

def load(folder):
    kind = AutoModelForMaskedLM if AutoConfig.from_pretrained(folder).model_type == "bert" else AutoModelForCausalLM
    model, said = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"] and not said["mismatched_keys"], said
    return model.eval()

def batch(golden, step):
    tokens = torch.tensor(golden["tokens"][step])
    if "labels" not in golden:
        return dict(input_ids=tokens[:, :-1]), tokens[:, 1:]
    types, labels = (torch.tensor(golden[name][step]) for name in ("types", "labels"))
    return dict(input_ids=tokens, token_type_ids=types, attention_mask=(tokens != 0).long()), labels

def logits_and_loss(model, golden, step):
    inputs, targets = batch(golden, step)
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).item()
"#;

/// Logits of a directory are those of the one that it was made of, bit for bit.
const SAME_LOGITS: &str = r#"
original, *copies = sys.argv[1:]
golden = json.load(open(os.path.join(original, "golden.json")))
expected, _ = logits_and_loss(load(original), golden, 0)
for copy in copies:
    found, _ = logits_and_loss(load(copy), golden, 0)
    assert torch.equal(found, expected), (copy, (found - expected).abs().max())
    print("same")
"#;

/// The losses of a step.
const LOSSES: &str = r#"
original, step, *folders = sys.argv[1:]
golden = json.load(open(os.path.join(original, "golden.json")))
for folder in folders:
    print(logits_and_loss(load(folder), golden, int(step))[1])
"#;

fn numbers(text: &str) -> Vec<f64> {
    text.lines().map(|line| line.trim().parse().unwrap()).collect()
}

#[test]
#[ignore = "needs a Python with torch, transformers and peft, which BURN_PARALLEL_PYTHON names"]
fn python_has_the_logits_of_what_any_mesh_has_written() {
    for name in Name::BOTH {
        let sharded = DataParallelConfig::new().with_sharding(Sharding::Parameters);
        let zero = name.strategy([2, 1, 1]).with_data(sharded).with_engine(Engine::Captured);
        let meshes = [[1, 1, 2], [1, 2, 1], [1, 1, 3]].map(|axes| (axes, name.strategy(axes)));
        let mut dirs = Vec::new();
        for (axes, strategy) in meshes.into_iter().chain([([2, 1, 1], zero)]) {
            let dir = Dir::fresh();
            let config = SaveConfig::new(Mapping::llama()).with_shard_bytes(300_000).with_files_of(name.folder());
            through_by(&strategy, name, &name.folder(), axes, &dir.join("out"), &config).unwrap();
            dirs.push(dir);
        }
        let copies = dirs.iter().map(|dir| dir.join("out"));
        let said = python(SAME_LOGITS, [name.folder()].into_iter().chain(copies));
        assert_eq!(said.lines().count(), dirs.len(), "{said}");
    }
}

fn trained_elsewhere<M: Encoder>() {
    let original = M::folder();
    let (mut before, mut after) = (vec![original.clone()], vec![original.clone(), "2".into()]);
    let mut dirs = Vec::new();
    for axes in [[1, 1, 1], [2, 1, 1], [1, 1, 2], [1, 2, 1]] {
        let dir = Dir::fresh();
        trained::<M>(axes, &M::strategy(axes), dir.path(), 2);
        before.push(dir.join("before"));
        after.push(dir.join("after"));
        dirs.push(dir);
    }
    assert_eq!(python(SAME_LOGITS, before).lines().count(), dirs.len());
    let expected = Steps::of(&original).losses[2];
    let losses = numbers(&python(LOSSES, after));
    assert_eq!(losses.len(), dirs.len());
    for loss in losses {
        assert!((loss - expected).abs() < 1e-4 * expected, "{loss}, not {expected}");
    }
}

/// Two steps here and the loss of the third there.
#[test]
#[ignore = "needs a Python with torch, transformers and peft, which BURN_PARALLEL_PYTHON names"]
fn python_goes_on_with_gpt2_and_bert() {
    trained_elsewhere::<Gpt2>();
    trained_elsewhere::<Bert>();
}

#[test]
#[ignore = "needs a Python with torch, transformers and peft, which BURN_PARALLEL_PYTHON names"]
fn python_reads_adapters() {
    let expected = adapter::expected();
    let dir = Dir::fresh();
    let mut arguments = vec![adapter::NAME.folder()];
    for axes in [[2, 1, 1], [1, 1, 2], [1, 2, 1]] {
        let to = dir.join(&format!("{axes:?}"));
        adapter::save_adapters(axes, &to);
        arguments.push(to);
    }
    let script = r#"
from peft import PeftModel
original, *adapters = sys.argv[1:]
golden = json.load(open(os.path.join(original, "golden.json")))
for adapter in adapters:
    model = PeftModel.from_pretrained(load(original), adapter)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(names) == 24, names
    print(logits_and_loss(model, golden, 0)[1])
    print(logits_and_loss(model.merge_and_unload(), golden, 0)[1])
"#;
    let losses = numbers(&python(script, arguments));
    assert_eq!(losses.len(), 6);
    losses.into_iter().for_each(|loss| adapter::near(loss, expected));
}

#[test]
#[ignore = "needs a Python with torch, transformers and peft, which BURN_PARALLEL_PYTHON names"]
fn adapters_of_python_are_read() {
    let dir = Dir::fresh();
    let script = r#"
from peft import LoraConfig, get_peft_model
original, out = sys.argv[1:]
torch.manual_seed(1)
config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
model = get_peft_model(load(original), config)
for name, param in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(param, std=0.3)
model.save_pretrained(out)
golden = json.load(open(os.path.join(original, "golden.json")))
print(logits_and_loss(model, golden, 0)[1])
"#;
    let name = adapter::NAME;
    let to = dir.join("adapter");
    let expected = numbers(&python(script, [&name.folder(), &to]))[0];
    assert!((expected - name.golden().losses[0]).abs() > 1e-3, "the adapters do nothing");
    for axes in [[1, 1, 1], [1, 1, 2], [1, 2, 1], [2, 1, 1]] {
        let adapted = |world: &Rank| {
            let model = adapter::bare(&world.device().autodiff()).parallelize(world, &adapter::strategy(axes))?;
            let model = model.load(&mut adapter::base()?)?;
            model.load(&mut Adapter::open(&to)?.mapped(&Mapping::llama())?)
        };
        launch::threads(axes.iter().product())
            .run(|world| {
                assert_eq!(Adapter::open(&to)?.config(), adapter::SIZES);
                let mut model = adapted(&world)?;
                let share = (model.mesh().coordinate("dp")?, axes[0]);
                adapter::near(name.golden().loss(&mut model, share)?, expected);
                let merged = name.fresh(&world.device().autodiff()).parallelize(&world, &adapter::strategy(axes))?;
                let mut merged = merged.load(&mut adapter::base()?.merged(Adapter::open(&to)?)?)?;
                adapter::near(name.golden().loss(&mut merged, share)?, expected);
                // Written again, it is what it was.
                let config = SaveConfig::new(Mapping::llama());
                let back = dir.join(&format!("back {axes:?}"));
                hf::save_adapter(&adapted(&world)?, &world, &back, ("base", adapter::SIZES), &config).map(drop)
            })
            .unwrap();
        same_tensors(&to, &dir.join(&format!("back {axes:?}")));
    }
}

fn same_tensors(one: &Path, other: &Path) {
    let file = |dir: &Path| dir.join("adapter_model.safetensors");
    crate::hf::save::same(&file(one), &file(other));
}
