//! The format and the reader in Python of `docs/checkpoints.md`.

use std::fs;
use std::process::Command;

use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;
use serde_json::Value;

use crate::Dir;
use crate::common::reference::{optimizer, values};
use crate::net::{Axes, Net, train};

#[test]
fn a_script_reads_what_was_saved() {
    let numpy = Command::new("python3").args(["-c", "import numpy"]).output();
    if !numpy.is_ok_and(|output| output.status.success()) {
        println!("SKIPPED, not passed: there is no python3 with numpy on this machine");
        return;
    }
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/checkpoints.md");
    let docs = fs::read_to_string(docs).unwrap();
    let script = docs.split_once("```python\n").unwrap().1.split_once("```").unwrap().0;
    let (dir, net) = (Dir::fresh(), Net::new());
    let axes = Axes::new(2, 1, 2);
    let run = launch::threads(4).run(|world| {
        let mut optim = optimizer();
        let (mut model, _) = train(axes.wrap(&world, &net)?, &mut optim, (0, 1))?;
        let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
        Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.save(1, state)?;
        Ok(values(&model.assemble()?))
    });
    let expected = run.unwrap().swap_remove(0);
    let path = dir.path().join("read.py");
    fs::write(&path, script).unwrap();
    let output = Command::new("python3").arg(&path).arg(dir.path().join("step-000000001")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    for (path, whole) in expected {
        let sum: f64 = whole.values.iter().map(|x| f64::from(*x)).sum();
        let dims: Vec<String> = whole.dims.iter().map(usize::to_string).collect();
        let line = text.lines().find(|line| line.split(' ').next() == Some(&format!("model/{path}"))).unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!(words[1], dims.join("x"));
        assert!((words[2].parse::<f64>().unwrap() - sum).abs() < 1e-4, "{line} {sum}");
    }
    assert_eq!(
        text.lines().filter(|line| line.starts_with("optimizers/adamw/")).count(),
        2 * text.lines().filter(|line| line.starts_with("model/")).count()
    );
}

/// Every key of the index is in the docs, and it says which strategy it was made under.
#[test]
fn the_index_has_the_keys_of_the_docs() {
    let docs = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/checkpoints.md")).unwrap();
    let section = docs.split_once("## The index\n").unwrap().1.split_once("\n## ").unwrap().0;
    let (dir, net) = (Dir::fresh(), Net::new());
    let axes = Axes::new(1, 2, 1);
    let run = launch::threads(2).run(|world| {
        let (mut model, mut optim) = (axes.wrap(&world, &net)?, optimizer());
        model = train(model, &mut optim, (0, 1))?.0;
        let config = CheckpointConfig::new().with_strategy(axes.strategy());
        let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
        Checkpointer::new(&world, dir.path(), config)?.save(7, state)
    });
    run.unwrap();
    let index = fs::read(dir.path().join("step-000000007/checkpoint.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let tensor = &index["model"]["head.weight"];
    let param = &index["optimizers"]["adamw"]["head.weight"];
    let all = [&index, &index["files"][0], tensor, &tensor["slices"][0], param].map(keys).concat();
    assert_eq!(all.len(), 14 + 2 + 3 + 4 + 2, "{all:?}");
    for key in all {
        assert!(section.contains(&format!("`{key}`")), "{key}");
    }
    let number = |key: &str| index[key].as_u64().unwrap();
    assert_eq!(["step", "ranks", "replicas", "version"].map(number), [7, 2, 1, 1]);
    let made_under: Strategy = index["made_under"].as_str().unwrap().parse().unwrap();
    assert_eq!(made_under.to_string(), axes.strategy().to_string());
}
