//! Damaged, foreign and hostile files: an error that names the file, and nothing is changed.

use std::fs;
use std::path::Path;

use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::Dir;
use crate::common::reference::{optimizer, values};
use crate::net::{Axes, Net, train};
use crate::sealed::{self, put_index, sealed};
use crate::wrong_json::{OTHERS, REST, wrong};

const STEP: &str = "step-000000001";
const INDEX: &str = "step-000000001/checkpoint.json";
const SUM: &str = "step-000000001/checkpoint.json.xxh3";
const FILES: [&str; 4] = [INDEX, SUM, "step-000000001/rank-00000.safetensors", "step-000000001/rank-00001.safetensors"];

fn saved(net: &Net) -> Dir {
    let dir = Dir::fresh();
    let axes = Axes::new(1, 1, 2);
    let run = launch::threads(2).run(|world| {
        let mut optim = optimizer();
        let (mut model, _) = train(axes.wrap(&world, net)?, &mut optim, (0, 1))?;
        let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
        Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.save(1, state)
    });
    run.unwrap();
    dir
}

/// Restores on one rank: the error, after which everything is as it was, or whether something was changed.
fn restore(dir: &Dir, net: &Net) -> Result<(), String> {
    let run = launch::threads(1).run(|world| {
        let (mut model, mut optim) = (Axes::new(1, 1, 1).wrap(&world, net)?, optimizer());
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        let restored = checkpoints.restore_step(1, TrainState::new(&mut model).with_optimizer("adamw", &mut optim));
        Ok(match restored {
            Ok(_) => Ok(()),
            Err(error) => {
                assert!(matches!(error, Error::Checkpoint { .. }), "{error:?}");
                // Whatever it is about.
                assert!(error.to_string().contains(STEP), "{error}");
                assert_eq!(values(model.local()), values(net));
                assert!(optim.to_record().is_empty());
                Err(error.to_string())
            }
        })
    });
    run.unwrap().swap_remove(0)
}

#[track_caller]
fn refused(dir: &Dir, net: &Net, words: &[&str]) {
    let error = restore(dir, net).unwrap_err();
    for words in words {
        assert!(error.contains(words), "`{words}` is missing in: {error}");
    }
}

/// Puts other bytes into a file, and back again.
fn with_file(dir: &Dir, name: &str, change: impl FnOnce(&mut Vec<u8>), then: impl FnOnce()) {
    let path = dir.path().join(name);
    let before = fs::read(&path).unwrap();
    let mut bytes = before.clone();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    then();
    fs::write(&path, before).unwrap();
}

#[test]
fn files_that_are_damaged() {
    let net = Net::new();
    let dir = saved(&net);
    assert_eq!(restore(&dir, &net), Ok(()));
    let file = FILES[3];
    with_file(
        &dir,
        file,
        |bytes| bytes.truncate(bytes.len() - 1),
        || refused(&dir, &net, &["rank-00001.safetensors: has", "damaged", "restore_step"]),
    );
    with_file(&dir, file, |bytes| bytes.push(0), || refused(&dir, &net, &["rank-00001.safetensors: has"]));
    with_file(&dir, file, Vec::clear, || refused(&dir, &net, &["rank-00001.safetensors: has 0 bytes"]));
    let flip = |bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1;
    with_file(&dir, file, flip, || {
        refused(&dir, &net, &["rank-00001.safetensors: bytes", "their checksum is another", "restore_step"])
    });
    with_file(&dir, file, |bytes| bytes[0] ^= 1, || refused(&dir, &net, &["rank-00001.safetensors", "restore_step"]));
    with_file(
        &dir,
        INDEX,
        |bytes| bytes[40] ^= 1,
        || refused(&dir, &net, &["checkpoint.json: is damaged", "restore_step"]),
    );
    with_file(&dir, SUM, Vec::clear, || refused(&dir, &net, &["checkpoint.json: is damaged"]));
    let path = dir.path().join(file);
    let other = fs::read(dir.path().join(FILES[2])).unwrap();
    with_file(
        &dir,
        file,
        |bytes| {
            let len = bytes.len();
            *bytes = other;
            bytes.resize(len, 0);
        },
        || refused(&dir, &net, &["rank-00001.safetensors"]),
    );
    fs::rename(&path, path.with_extension("away")).unwrap();
    refused(&dir, &net, &["rank-00001.safetensors: cannot be read", "restore_step"]);
    fs::rename(path.with_extension("away"), &path).unwrap();
    #[cfg(unix)]
    {
        // It would be read for ever, or waited for.
        for (name, said) in [(INDEX, "checkpoint.json"), (SUM, "checkpoint.json.xxh3")] {
            let (path, away) = (dir.path().join(name), dir.path().join("away"));
            fs::rename(&path, &away).unwrap();
            std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
            refused(&dir, &net, &[&format!("{said}: cannot be read: it is not a file")]);
            fs::remove_file(&path).unwrap();
            assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
            refused(&dir, &net, &[&format!("{said}: "), "not a file"]);
            fs::remove_file(&path).unwrap();
            fs::rename(&away, &path).unwrap();
        }
    }
    assert_eq!(restore(&dir, &net), Ok(()));
}

/// An index that its checksum fits. Returns the one that was there.
fn with_index(dir: &Dir, change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let before = fs::read(dir.path().join(INDEX)).unwrap();
    let mut index: Value = serde_json::from_slice(&before).unwrap();
    change(&mut index);
    put_index(&dir.path().join(STEP), index.to_string().as_bytes());
    before
}

/// Gives index and slices the checksums of what there is.
fn seal(dir: &Path) {
    let step = dir.join(STEP);
    let files = [2, 3].map(|file| (FILES[file], fs::read(dir.join(FILES[file])).unwrap()));
    let files: Vec<(String, &[u8])> =
        files.iter().map(|(name, bytes)| (name.rsplit('/').next().unwrap().to_owned(), bytes.as_slice())).collect();
    let index = fs::read(step.join(sealed::INDEX)).unwrap();
    put_index(&step, sealed(&index, &files).as_deref().unwrap_or(&index));
}

#[test]
fn indices_that_lie() {
    let net = Net::new();
    let dir = saved(&net);
    let lies = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let before = with_index(&dir, change);
        refused(&dir, &net, words);
        put_index(&dir.path().join(STEP), &before);
    };
    let weight = "blocks.0.up.weight";
    let slice = |index: &mut Value, key: &str, value: Value| index["model"][weight]["slices"][1][key] = value;
    lies(&|index| index["version"] = json!(2), &["checkpoint.json: is of version 2", "newer", "restore_step"]);
    lies(&|index| index["format"] = json!("other"), &["is a `other`"]);
    lies(&|index| drop(index.as_object_mut().unwrap().remove("model")), &["missing field `model`"]);
    lies(&|index| index["more"] = json!(1), &["unknown field `more`"]);
    lies(&|index| index["block_bytes"] = json!(0), &["blocks of no bytes"]);
    lies(&|index| index["files"][0]["name"] = json!("../../etc/passwd"), &["`../../etc/passwd`, which is no name"]);
    lies(&|index| index["files"][1]["name"] = index["files"][0]["name"].clone(), &["twice"]);
    lies(&|index| slice(index, "file", json!(7)), &["`model/blocks.0.up.weight`", "file 7 of 2"]);
    lies(&|index| slice(index, "ranges", json!([[0, 8], [0, 4]])), &["`model/blocks.0.up.weight`", "overlaps"]);
    lies(&|index| slice(index, "ranges", json!([[0, 8], [5, 7]])), &["`model/blocks.0.up.weight`", "leave some"]);
    lies(&|index| slice(index, "ranges", json!([[0, 8], [4, 9]])), &["`model/blocks.0.up.weight`", "not within"]);
    lies(&|index| slice(index, "xxh3", json!([])), &["has 0 checksums"]);
    lies(&|index| slice(index, "tensor", json!("other")), &["has no tensor `other`"]);
    lies(&|index| index["model"][weight]["dtype"] = json!("F64"), &["`model/blocks.0.up.weight", "F32"]);
    lies(&|index| index["model"][weight]["dtype"] = json!("F33"), &["dtype F33"]);
    lies(&|index| index["model"][weight]["dims"] = json!([1u64 << 40, 1u64 << 40]), &["more than there can be"]);
    lies(&|index| index["model"][weight]["dims"] = json!([0, 1u64 << 32, 1u64 << 32]), &["more than there can be"]);
    lies(&|index| drop(index["model"].as_object_mut().unwrap().remove(weight)), &["lacks", weight]);
    // Of one slice a tensor of any size might be made; and moments are as large as they say.
    let copy = |index: &mut Value| {
        let slices = index["model"][weight]["slices"].clone();
        slice(index, "tensor", slices[0]["tensor"].clone());
        slice(index, "file", slices[0]["file"].clone());
    };
    lies(&copy, &["`model/blocks.0.up.weight`", "is another slice as well"]);
    let moment = |index: &mut Value, key: &str, value: Value| {
        index["optimizers"]["adamw"]["head.bias"]["moments"]["momentum.moment_1"][key] = value;
    };
    let huge = |index: &mut Value| {
        let elements = 1u64 << 50;
        // A slice is one block each: of so large ones no more can be told.
        index["block_bytes"] = json!(u64::MAX >> 1);
        moment(index, "dims", json!([elements]));
        let mut first = index["optimizers"]["adamw"]["head.bias"]["moments"]["momentum.moment_1"]["slices"][0].clone();
        first["ranges"] = json!([[0, elements]]);
        moment(index, "slices", json!([first]));
    };
    lies(&huge, &["rank-0000", "the index says F32 [1125899906842624]"]);
    lies(&|index| moment(index, "dims", json!(vec![1; 65])), &["65 dims are more than a tensor can have"]);
    let scalar = |index: &mut Value, value: Value| index["optimizers"]["adamw"][weight]["scalars"]["__rank"] = value;
    lies(&|index| scalar(index, json!({ "float": "x" })), &["which is no number"]);
    lies(&|index| scalar(index, json!({ "uint": 99 })), &["adamw"]);
    assert_eq!(restore(&dir, &net), Ok(()));
}

#[test]
fn one_thing_is_wrong() {
    let text = br#"{"a":[1,{"b":"x\"]"}],"c":null}"#;
    assert!(wrong(b"", 0, 0).is_none());
    let wrong = |place, what| String::from_utf8(wrong(text, place, what).unwrap()).unwrap();
    assert_eq!(wrong(0, 1), "true");
    assert_eq!(wrong(1, 1), r#"{"a":true,"c":null}"#);
    assert_eq!(wrong(3, 1), r#"{"a":[1,true],"c":null}"#);
    assert_eq!(wrong(4, 1), r#"{"a":[1,{"b":true}],"c":null}"#);
    assert_eq!(wrong(5, OTHERS.len()), r#"{"a":[1,{"b":"x\"]"}],"c":"#);
    assert_eq!(wrong(1, OTHERS.len() + 2), r#"{"c":null}"#);
    assert_eq!(wrong(5, OTHERS.len() + 2), r#"{"a":[1,{"b":"x\"]"}]}"#);
    assert_eq!(wrong(5, OTHERS.len() + 3), r#"{"a":[1,{"b":"x\"]"}],"c":null,"c":null}"#);
    assert_eq!(wrong(5, OTHERS.len() + 4), r#"{"a":[1,{"b":"x\"]"}],"x":null}"#);
    assert_eq!(wrong(2, OTHERS.len() + 5 + 3 * (OTHERS.len() + REST)), r#"{"a":[{"b":"x\"]"},{"b":"x\"]"}],"c":null}"#);
}

/// The index with any one thing wrong, and its own checksum right: an error that names the checkpoint and changes
/// nothing, or values.
#[test]
fn any_value_may_be_another() {
    let net = Net::new();
    let dir = saved(&net);
    let index = fs::read(dir.path().join(INDEX)).unwrap();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..Default::default()
    });
    let outcome = runner.run(&(any::<usize>(), any::<usize>()), |(place, what)| {
        put_index(&dir.path().join(STEP), &wrong(&index, place, what).unwrap());
        let _ = restore(&dir, &net);
        Ok(())
    });
    outcome.unwrap();
    put_index(&dir.path().join(STEP), &index);
    assert_eq!(restore(&dir, &net), Ok(()));
}

/// Any byte of any file, with the checksums as they were or made right again: an error that names the checkpoint and
/// changes nothing, or values. The header of a file may have other words that mean the same; the tensors of one with
/// its own checksums may not.
#[test]
fn any_byte_may_be_another() {
    let net = Net::new();
    let dir = saved(&net);
    let strategy = (0usize..4, any::<prop::sample::Index>(), 1u8..=255, any::<bool>(), any::<bool>());
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..Default::default()
    });
    let outcome = runner.run(&strategy, |(file, at, flip, cut, sealed)| {
        let change = |bytes: &mut Vec<u8>| {
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        };
        let index = fs::read(dir.path().join(INDEX)).unwrap();
        with_file(&dir, FILES[file], change, || {
            if sealed {
                seal(dir.path());
            }
            let _ = restore(&dir, &net);
        });
        put_index(&dir.path().join(STEP), &index);
        Ok(())
    });
    outcome.unwrap();
    assert_eq!(restore(&dir, &net), Ok(()));
}
