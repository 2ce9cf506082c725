//! The example `train_lm` as its user meets it: its flags, its errors, its JSON.

#[allow(dead_code)]
#[path = "../../examples/train_lm/text.rs"]
mod text;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use burn::tensor::FloatDType;
use burn_parallel::prelude::*;
use clap::Parser;
use serde_json::Value;

use crate::common::ports::free_port;
use crate::programs::saving::SaveFlags;

/// The flags by which a run is saved and goes on.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    saving: SaveFlags,
}

/// The example beside this test. A plain `cargo test` builds it; with `--test cli` alone, build it first.
pub fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("examples").join("train_lm")
}

fn train_lm(flags: &[&str]) -> Output {
    let example = example();
    Command::new(&example)
        .args(flags)
        .output()
        .unwrap_or_else(|why| panic!("{}: {why}; `cargo build --example train_lm` makes it", example.display()))
}

/// A model so small that a run takes milliseconds.
pub const TINY: [&str; 6] = ["--layers", "1", "--d-model", "16", "--seq", "16"];

fn tiny(flags: &[&str]) -> Output {
    let steps: &[&str] = if flags.contains(&"--steps") { &[] } else { &["--steps", "3"] };
    train_lm(&[&TINY[..], steps, flags].concat())
}

/// A folder for one test, gone when the test ends.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("train_lm-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    pub fn is_file(&self, name: &str) -> bool {
        self.0.join(name).is_file()
    }

    fn write(&self, name: &str, bytes: &[u8]) -> String {
        fs::write(self.0.join(name), bytes).unwrap();
        self.path(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The run ended with code 2, wrote nothing but one line, and the line says `what`.
#[track_caller]
fn refused(flags: &[&str], what: &str) {
    let output = train_lm(flags);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{flags:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{flags:?}");
    assert_eq!(stderr.lines().count(), 1, "{flags:?}: {stderr}");
    assert!(stderr.starts_with("train_lm: ") && stderr.contains(what), "{flags:?}: {stderr}");
}

pub fn json(folder: &Folder, flags: &[&str]) -> Value {
    let path = folder.path("outcome.json");
    let output = tiny(&[flags, &["--json", &path]].concat());
    assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[track_caller]
pub fn same_losses(expected: &[f64], found: &[f64], within: f64) {
    assert_eq!(expected.len(), found.len());
    let same = expected.iter().zip(found).all(|(a, b)| (a - b).abs() <= within * a.abs());
    assert!(same, "{expected:?} {found:?}");
}

pub fn losses(outcome: &Value) -> Vec<f64> {
    outcome["losses"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect()
}

#[test]
fn flags_that_make_no_sense_are_refused() {
    let sizes = ["--ranks", "--dp", "--pp", "--tp", "--steps", "--batch", "--micro-batch", "--micro-batches", "--seq"];
    for flag in sizes.into_iter().chain(["--layers", "--d-model", "--heads"]) {
        refused(&[flag, "0"], "at least 1");
        refused(&[flag, "-3"], "at least 1");
        refused(&[flag, "many"], "whole number");
        refused(&[flag, "99999999999999999999999999"], "at most");
        refused(&[flag], flag);
    }
    for rate in ["0", "-1", "1.5", "nan", "inf"] {
        refused(&["--lr", rate], "greater than 0 and at most 1");
    }
    refused(&["--lr", "fast"], "must be a number");
    refused(&["--batch", "automatic"], "or `auto`");
    refused(&["--grow-batch", "0"], "at least 1");
    for bytes in ["0", "-1", "1.5G", "6GB", "99999999T", "much"] {
        refused(&["--memory-budget", bytes], "it must be bytes, as 500M or 6G");
    }
    for seconds in ["0", "-1", "nan", "soon"] {
        refused(&["--trial-timeout", seconds], "it must be a positive number of seconds");
    }
    refused(&["--noise-scale=0"], "at least 1");
    refused(&["--noise-scale=often"], "whole number");
    refused(&["--noise-scale", "2"], "--noise-scale takes what it is given behind `=`: --noise-scale=2");
    for norm in ["0", "-1", "nan", "inf"] {
        refused(&["--clip", norm], "greater than 0 and finite");
    }
    refused(&["--clip", "tight"], "must be a number");
    for stage in ["4", "-1", "two"] {
        refused(&["--zero", stage], "0, 1, 2 or 3");
    }
    refused(&["--schedule", "slow"], "--schedule");
    refused(&["--schedule", "zb"], "possible values: gpipe, 1f1b, interleaved, zb_h1");
    refused(&["--seed", "-1"], "--seed");
    refused(&["--colour", "red"], "--colour");
    refused(&["extra"], "extra");
    refused(&["--steps", "3", "--steps", "4"], "--steps");
}

#[test]
fn flags_that_do_not_fit_together_are_refused() {
    refused(&["--dp", "1", "--zero", "3"], "--zero 3 is divided among the replicas, and with --dp 1 there is one");
    refused(&["--d-model", "10", "--heads", "4"], "--heads 4 does not divide --d-model 10");
    refused(&["--ranks", "2", "--dp", "3"], "--dp 3 x --tp 1 makes 3 ranks, but --ranks is 2");
    refused(&["--ranks", "4", "--dp", "3", "--tp", "2"], "--dp 3 x --tp 2 makes 6 ranks, but --ranks is 4");
    refused(&["--ranks", "3", "--tp", "2"], "--tp 2 does not divide --ranks 3");
    refused(&["--tp", "3"], "--tp 3 does not divide --heads 4");
    refused(&["--dp", "4", "--batch", "3"], "--batch 3 is smaller than --dp 4");
    refused(&["--ranks", "4", "--pp", "3"], "--pp 3 x --tp 1 does not divide --ranks 4");
    refused(&["--dp", "2", "--pp", "2", "--ranks", "2"], "--dp 2 x --pp 2 x --tp 1 makes 4 ranks, but --ranks is 2");
    refused(&["--pp", "2", "--micro-batch", "4"], "give --micro-batches");
    refused(&["--micro-batches", "4"], "give --pp");
    refused(&["--pp", "2", "--batch", "4", "--micro-batches", "5"], "--micro-batches 5 is more than the 4 rows");
    refused(&["--pp", "2", "--dp", "2", "--batch", "5", "--micro-batches", "3"], "more than the 2 rows of a replica");
    refused(&["--batch", "4", "--micro-batch", "5"], "--micro-batch 5 is larger than --batch 4");
    refused(&["--batch", "4", "--grow-batch", "3"], "--grow-batch 3 is smaller than --batch 4");
    refused(&["--dp", "1", "--grow-batch", "64"], "give --dp 2, or a --batch of several --micro-batch");
    refused(
        &["--pp", "2", "--dp", "1", "--grow-batch", "64"],
        "has one gradient a step, and measures no noise: give --dp 2",
    );
    refused(&["--batch", "auto", "--micro-batch", "5"], "leave --micro-batch out");
    refused(&["--memory-budget", "1G"], "--memory-budget is for --batch auto");
    refused(&["--batch", "auto", "--launch", "processes"], "give --launch threads");
    refused(&["--schedule", "zb_h1"], "--schedule zb_h1 is for pipelines: give --pp");
    refused(
        &["--pp", "64"],
        "--pp 64 with schedule 1f1b makes 64 stages, more than the 10 blocks of a model of 4 layers",
    );
    let interleaved = ["--layers", "2", "--pp", "4", "--schedule", "interleaved"];
    refused(&interleaved, "makes 8 stages, more than the 6 blocks of a model of 2 layers");
    // A terabyte.
    #[cfg(target_os = "linux")]
    refused(&["--seq", "60000"], "--seq 60000: the attention of 8 rows at once on 2 replicas takes");
}

/// What is wrong is called what the user has called it: a key of a file, not a flag.
#[test]
fn keys_of_a_file_are_called_keys() {
    let folder = Folder::new("keys");
    let file = |text: &str| folder.write("strategy.toml", text.as_bytes());
    let pipeline = "[pipeline]\nmicro_batches = 100\n";
    for (text, flags, what) in [
        ("dp = 0\n".to_owned(), &[][..], "`dp = 0` of --strategy x `tp = 1` of --strategy is no number of ranks"),
        ("dp = 4\n".into(), &["--batch", "3"], "--batch 3 is smaller than `dp = 4` of --strategy"),
        ("tp = 3\n[tensor]\nplan = 'megatron'\n".into(), &[], "`tp = 3` of --strategy does not divide --heads 4"),
        ("dp = 3\n".into(), &["--ranks", "2"], "`dp = 3` of --strategy x `tp = 1` of --strategy makes 3 ranks"),
        (
            format!("pp = 2\n{pipeline}"),
            &["--batch", "16"],
            "`pipeline.micro_batches = 100` is more than the 16 rows that a replica has of a batch: give fewer, or --batch 100",
        ),
        (
            format!("pp = 2\n{pipeline}"),
            &["--batch", "200", "--micro-batch", "4"],
            "`pipeline.micro_batches` of the file",
        ),
        (
            "pp = 12\n[pipeline]\nmicro_batches = 4\n".into(),
            &["--batch", "4"],
            "`pp = 12` of --strategy with schedule 1f1b makes 12 stages, more than the 10 blocks",
        ),
        ("dp = 1\n[data]\nsharding = 'optimizer'\n".into(), &[], "with `dp = 1` of --strategy there is one"),
        ("[tensor]\nplan = 'megatron'\n".into(), &[], "nothing reads `tensor.plan`: `tp` is 1"),
        ("pp = 2\n[pipeline]\nmicro_batches = 0\n".into(), &[], "`pipeline.micro_batches = 0`: it must be at least 1"),
        ("pp = 2\n[pipeline]\nmicro_batches = 0\n".into(), &["--batch", "auto"], "it must be at least 1"),
    ] {
        let file = file(&text);
        refused(&[&["--strategy", &file][..], flags].concat(), what);
    }
}

/// The cut that the help has as an example is one of this model.
#[test]
fn the_cut_of_the_help_fits_the_model() {
    let folder = Folder::new("cuts");
    let help = String::from_utf8(train_lm(&["--help"]).stdout).unwrap();
    let cut = help.split("{ before = ").nth(1).and_then(|rest| rest.split(" }").next()).unwrap();
    let text = format!("pp = 2\n[pipeline]\nmicro_batches = 2\ncut = {{ before = {cut} }}\n");
    let file = folder.write("strategy.toml", text.as_bytes());
    let sizes = ["--layers", "3", "--d-model", "16", "--seq", "16", "--steps", "1"];
    let output = train_lm(&[&sizes[..], &["--strategy", &file]].concat());
    assert!(output.status.success(), "{cut}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_strategy_in_a_file_is_what_the_flags_say() {
    let folder = Folder::new("strategy");
    let flags = ["--ranks", "4", "--pp", "2", "--tp", "2", "--micro-batches", "2", "--schedule", "gpipe"];
    let expected = losses(&json(&folder, &flags));
    let toml = b"pp = 2\ntp = 2\n[tensor]\nplan = 'megatron'\n[pipeline]\nmicro_batches = 2\nschedule = 'gpipe'\n";
    let json_text = br#"{"dp": 1, "pp": 2, "tp": 2, "tensor": {"plan": "megatron"},
        "pipeline": {"micro_batches": 2, "schedule": "gpipe"}}"#;
    for file in [folder.write("strategy.toml", toml), folder.write("strategy.json", json_text)] {
        assert_eq!(losses(&json(&folder, &["--ranks", "4", "--strategy", &file])), expected);
    }
    let file = folder.path("strategy.toml");
    refused(&["--strategy", &folder.path("missing.toml")], "No such file");
    refused(&["--ranks", "2", "--strategy", &file], "does not divide --ranks 2");
    refused(&["--strategy", &file, "--pp", "2"], "cannot be used with");
    refused(&["--strategy", &folder.write("wrong.toml", b"dp = 2\nzp = 3\n")], "zp");
    let eager = folder.write("eager.toml", b"tp = 2\nengine = 'eager'\n[tensor]\nplan = 'megatron'\n");
    refused(&["--strategy", &eager], "needs captured steps");
    refused(&["--strategy", &folder.write("list.json", b"[]")], "expected a table");
    refused(&["--strategy", "/dev/zero"], "/dev/zero: it is not a file");
    let forward = b"pp = 2\n[pipeline]\nmicro_batches = 2\nschedule = { forward_only = { stages_per_rank = 1 } }\n";
    refused(&["--strategy", &folder.write("forward.toml", forward)], "no backward pass");
    // What the model says to it comes when ranks have started.
    let cut = b"pp = 2\n[pipeline]\nmicro_batches = 2\ncut = { before = ['nowhere.*'] }\n";
    let output = train_lm(&["--strategy", &folder.write("cut.toml", cut)]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && stderr.contains("pattern `nowhere.*` of the cut"), "{stderr}");
}

#[test]
fn texts_that_cannot_be_learned_are_refused() {
    let folder = Folder::new("texts");
    refused(&["--text", &folder.path("missing.txt")], "cannot read the text");
    refused(&["--text", folder.0.to_str().unwrap()], "cannot read the text");
    refused(&["--text", &folder.write("empty.txt", b"")], "is empty");
    refused(&["--text", &folder.write("latin1.txt", b"caf\xe9 au lait")], "byte is number 3");
    refused(&["--text", &folder.write("short.txt", &[b'a'; 16]), "--seq", "16"], "17 that --seq 16 needs");
    refused(&["--text", &folder.path("two\nlines.txt")], "cannot read the text");
    // These would be read for ever.
    for endless in ["/dev/full", "/dev/zero"] {
        refused(&["--text", endless], "it is not a file");
    }
}

#[test]
fn json_that_cannot_be_written_is_refused_before_the_training() {
    let folder = Folder::new("json");
    refused(&["--json", &folder.path("missing/outcome.json")], "cannot write --json");
    refused(&["--json", folder.0.to_str().unwrap()], "cannot write --json");
    let text = folder.write("text.txt", b"a text that someone would be sorry to lose");
    refused(&["--text", &text, "--json", &text], "would overwrite the text");
    assert_eq!(fs::read(&text).unwrap(), b"a text that someone would be sorry to lose");

    // A refused run leaves the file of an earlier one as it was, and no new one.
    let earlier = folder.write("earlier.json", b"{}");
    refused(&["--json", &earlier, "--text", &folder.path("missing.txt")], "cannot read the text");
    assert_eq!(fs::read(&earlier).unwrap(), b"{}");
    let new = folder.path("new.json");
    refused(&["--json", &new, "--text", &folder.path("missing.txt")], "cannot read the text");
    assert!(!Path::new(&new).exists());
}

#[test]
fn help_is_no_error() {
    let output = train_lm(&["--help"]);
    let help = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    for flag in [
        "--text",
        "--ranks",
        "--dp",
        "--pp",
        "--tp",
        "--schedule",
        "--micro-batches",
        "--steps",
        "--batch",
        "--seq",
        "--noise-scale",
        "--grow-batch",
        "--engine",
    ] {
        assert!(help.contains(flag), "{flag}: {help}");
    }
    // Every key of a strategy file.
    let data = DataParallelConfig::new().with_reduce_dtype(FloatDType::BF16).with_sharding_ranks(2);
    let pipeline = PipelineConfig::new(4).with_check_inputs_every(1);
    let tensor = TensorParallelConfig::new(Plan::megatron()).with_check_inputs_every(1);
    let strategy = Strategy::new().with_dp(2).with_pp(2, pipeline).with_tp(2, tensor).with_data(data);
    let Value::Object(keys) = serde_json::to_value(&strategy).unwrap() else { panic!("a strategy is a table") };
    for (key, value) in &keys {
        assert!(help.contains(key), "{key}: {help}");
        if let Value::Object(keys) = value {
            let listed = &help[help.find(&format!("[{key}]")).unwrap()..];
            let listed = listed.split("\n  [").next().unwrap();
            keys.keys().for_each(|key| assert!(listed.contains(key), "{key}: {listed}"));
        }
    }
}

#[test]
fn the_json_tells_what_came_of_the_run() {
    let folder = Folder::new("outcome");
    let outcome = json(&folder, &[]);
    let object = outcome.as_object().unwrap();
    let mut keys: Vec<&str> = object.keys().map(String::as_str).collect();
    keys.sort();
    let expected = [
        "axes",
        "bytes_held",
        "bytes_sent_per_step",
        "calls_per_step",
        "losses",
        "parameters",
        "rows",
        "seconds_to_first_step",
        "step_processor_seconds",
        "step_seconds",
        "tokens_per_second",
    ];
    assert_eq!(keys, expected);

    let losses = losses(&outcome);
    assert_eq!(losses.len(), 3);
    // An untrained model knows no byte from another: ln 256 = 5.5 nats.
    assert!((losses[0] - 256f64.ln()).abs() < 0.3, "{losses:?}");
    assert!(losses[2] < losses[0], "{losses:?}");
    assert!(outcome["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(outcome["seconds_to_first_step"].as_f64().unwrap() > 0.0);
    for seconds in ["step_seconds", "step_processor_seconds"] {
        let of_steps = outcome[seconds].as_array().unwrap();
        assert!(of_steps.len() == 3 && of_steps.iter().all(|one| one.as_f64().unwrap() > 0.0), "{of_steps:?}");
    }

    // Embeddings of 256 bytes and 16 positions; one layer of 4 + 8 squares of the width with their biases (4, 4 and 1)
    // and two norms; the last norm; the output.
    let d = 16;
    let parameters = (256 + 16) * d + (12 * d * d + 9 * d + 4 * d) + 2 * d + 256 * d;
    assert_eq!(outcome["parameters"].as_u64(), Some(parameters));
}

#[test]
fn a_seed_gives_the_same_losses_again_and_another_seed_others() {
    let folder = Folder::new("seed");
    let first = losses(&json(&folder, &["--seed", "7"]));
    assert_eq!(first, losses(&json(&folder, &["--seed", "7"])));
    assert_ne!(first, losses(&json(&folder, &["--seed", "8"])));
}

#[test]
fn micro_batches_change_no_loss() {
    let folder = Folder::new("micro");
    let whole = losses(&json(&folder, &["--batch", "8"]));
    for rows in ["1", "3", "4"] {
        same_losses(&whole, &losses(&json(&folder, &["--batch", "8", "--micro-batch", rows])), 1e-5);
    }
}

#[test]
fn any_number_of_ranks_gives_the_losses_of_one() {
    let folder = Folder::new("ranks");
    for flags in [&["--batch", "12"][..], &["--batch", "7"], &["--batch", "7", "--micro-batch", "2"]] {
        let run = |dp| losses(&json(&folder, &[flags, &["--steps", "12", "--dp", dp]].concat()));
        let alone = run("1");
        for dp in ["2", "3", "4"] {
            same_losses(&alone, &run(dp), 1e-4);
        }
        let captured = ["--steps", "12", "--dp", "2", "--engine", "captured"];
        same_losses(&alone, &losses(&json(&folder, &[flags, &captured].concat())), 1e-4);
    }
}

#[test]
fn any_number_of_parts_gives_the_losses_of_one() {
    let folder = Folder::new("parts");
    for batch in ["8", "7"] {
        let run = |flags: &[&str]| losses(&json(&folder, &[&["--steps", "12", "--batch", batch][..], flags].concat()));
        let alone = run(&["--dp", "1"]);
        for flags in [&["--tp", "2"][..], &["--tp", "4"], &["--dp", "2", "--tp", "2"]] {
            same_losses(&alone, &run(flags), 1e-4);
        }
        same_losses(&alone, &run(&["--dp", "2", "--tp", "2", "--micro-batch", "3"]), 1e-4);
    }
}

#[test]
fn clipping_is_the_same_on_any_mesh() {
    let folder = Folder::new("clipping");
    let run = |flags: &[&str]| {
        let outcome = json(&folder, &[&["--steps", "6", "--batch", "8"][..], flags].concat());
        let norms =
            outcome["grad_norms"].as_array().map(|norms| norms.iter().map(|norm| norm.as_f64().unwrap()).collect());
        (losses(&outcome), norms.unwrap_or_default())
    };
    let (free, none): (_, Vec<f64>) = run(&["--dp", "1"]);
    assert!(none.is_empty());
    let (alone, norms) = run(&["--dp", "1", "--clip", "0.2"]);
    assert!(norms.len() == 6 && norms.iter().any(|norm| *norm > 0.2), "{norms:?}");
    assert_ne!(free, alone);
    for flags in [&["--dp", "2"][..], &["--tp", "2"], &["--pp", "2", "--dp", "1"], &["--dp", "2", "--tp", "2"]] {
        let (found, found_norms) = run(&[flags, &["--clip", "0.2"]].concat());
        same_losses(&alone, &found, 1e-4);
        same_losses(&norms, &found_norms, 1e-3);
    }
}

/// Each stage holds less than the one before it, and learns the same.
#[test]
fn zero_divides_what_the_replicas_hold() {
    let folder = Folder::new("zero");
    let common = ["--steps", "5", "--batch", "8", "--micro-batch", "2", "--clip", "0.5"];
    let alone = losses(&json(&folder, &[&common[..], &["--dp", "1"]].concat()));
    for flags in [&["--dp", "2"][..], &["--dp", "4"], &["--dp", "2", "--tp", "2"]] {
        let mut whole = 0;
        for stage in ["0", "1", "2", "3"] {
            let outcome = json(&folder, &[&common[..], flags, &["--zero", stage]].concat());
            same_losses(&alone, &losses(&outcome), 1e-4);
            let held = |what: &str| outcome["bytes_held"][what].as_u64().unwrap();
            let [parameters, gradients, optimizer] = ["parameters", "gradients", "optimizer"].map(held);
            // A step needs something, and not a hundred times the model. It may be less than its gradients: what ranks
            // hold before it has buffers of the step before, and ranks that take turns don't all need most at once.
            let step = held("step");
            assert!(step > 0 && step < 100 * parameters.max(gradients), "{step}");
            if stage == "0" {
                whole = parameters;
                assert_eq!(gradients, parameters);
                assert_eq!(optimizer, 2 * whole);
                continue;
            }
            // Rows of 16, 64 and 256 are divided evenly, and so nearly is all.
            let share = |bytes: u64| bytes as f64 * outcome["axes"]["dp"].as_u64().unwrap() as f64 / whole as f64;
            assert!((share(gradients) - 1.0).abs() < 0.05, "{gradients} of {whole}");
            assert!((share(optimizer) - 2.0).abs() < 0.1, "{optimizer} of {whole}");
            let all = if stage == "3" { share(parameters) } else { parameters as f64 / whole as f64 };
            assert!((all - 1.0).abs() < 0.05, "{parameters} of {whole}");
        }
    }
}

#[test]
fn any_pipeline_gives_the_losses_of_one_rank() {
    let folder = Folder::new("pipelines");
    let deep = ["--layers", "3", "--d-model", "16", "--seq", "16", "--steps", "8", "--batch", "9"];
    let run = |flags: &[&str]| {
        let path = folder.path("outcome.json");
        let output = train_lm(&[&deep[..], flags, &["--json", &path]].concat());
        assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        losses(&serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
    };
    let alone = run(&["--dp", "1"]);
    for schedule in ["gpipe", "1f1b", "interleaved", "zb_h1"] {
        for pp in ["2", "3"] {
            same_losses(&alone, &run(&["--pp", pp, "--dp", "1", "--schedule", schedule, "--micro-batches", "6"]), 1e-4);
        }
    }
    // Fewer micro-batches than stages; and every axis at once, on 8 ranks.
    same_losses(&alone, &run(&["--pp", "4", "--dp", "1", "--micro-batches", "2"]), 1e-4);
    same_losses(&alone, &run(&["--dp", "2", "--pp", "2", "--micro-batches", "4"]), 1e-4);
    same_losses(&alone, &run(&["--pp", "2", "--tp", "2", "--dp", "1"]), 1e-4);
    same_losses(&alone, &run(&["--dp", "2", "--pp", "2", "--tp", "2", "--schedule", "zb_h1"]), 1e-4);
}

/// A run that is killed in its middle, and one that goes on from what it left, under the same flags or others.
#[test]
fn a_run_that_was_killed_goes_on_as_if_it_had_not_been() {
    let folder = Folder::new("resume");
    let steps = ["--steps", "60", "--batch", "8", "--clip", "1"];
    let run = |axes: &[&str], more: &[&str]| losses(&json(&folder, &[&steps[..], axes, more].concat()));
    let whole = run(&["--dp", "2"], &[]);
    let saved = folder.path("saved");
    let killed = [&TINY[..], &steps, &["--dp", "2", "--save", &saved, "--save-every", "2"]].concat();
    let mut child = Command::new(example()).args(killed).stderr(std::process::Stdio::null()).spawn().unwrap();
    let has = |name: &str| fs::read_dir(&saved).is_ok_and(|mut all| all.any(|it| it.unwrap().file_name() == name));
    while !has("step-000000004") {
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(child.try_wait().unwrap().is_none(), "it was to be killed");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let left = fs::read_dir(&saved).unwrap().count();
    assert!((1..=5).contains(&left), "{left}");
    for (axes, within) in [(["--dp", "2"], 0.0), (["--tp", "2"], 1e-5), (["--pp", "2"], 1e-5), (["--dp", "4"], 1e-5)] {
        let gone_on = run(&axes, &["--resume", &saved]);
        same_losses(&whole, &gone_on, within);
    }
    // A resume of a resume, with what it saves itself.
    let again = folder.path("again");
    let both = ["--save", &again, "--resume", &again, "--keep", "1"];
    let first = run(&["--pp", "2", "--dp", "1"], &both);
    same_losses(&whole, &first, 1e-5);
    assert_eq!(fs::read_dir(&again).unwrap().count(), 1);
    same_losses(&first, &run(&["--dp", "2"], &both), 0.0);
    refused(&["--keep", "2"], "--save");
}

/// A run that saves beside it removes the latest checkpoint while that is read: the next one is the latest.
#[cfg(unix)]
#[test]
fn a_checkpoint_that_is_removed_meanwhile_is_followed_by_the_latest() {
    let folder = Folder::new("removed");
    let (saved, run) = (folder.path("saved"), ["--steps", "3", "--save-every", "1"]);
    json(&folder, &[&run[..], &["--save", &saved]].concat());
    let step = |number: u64| Path::new(&saved).join(format!("step-{number:09}"));
    fs::rename(step(3), folder.path("later")).unwrap();
    let flags = Flags::parse_from(["test", "--resume", &saved]).saving;
    let run = launch::threads(2).run(|world| {
        let mut read = Vec::new();
        let restore = |checkpoints: &mut Checkpointer, number| {
            world.barrier()?;
            // Its first value is read by now.
            if world.rank() == 0 && read.is_empty() {
                fs::rename(folder.path("later"), step(3)).unwrap();
                fs::remove_dir_all(step(2)).unwrap();
            }
            world.barrier()?;
            read.push(number);
            checkpoints.read_value::<String>(number, "none").map(drop)
        };
        let (steps, _) = flags.resume(&world, Path::to_owned, (&Strategy::new(), 4), restore)?;
        Ok((steps, read))
    });
    assert_eq!(run.unwrap(), vec![(3, vec![2, 3]); 2]);
}

/// It is one still: it is neither taken for none, nor is another run saved beside it.
#[test]
fn a_checkpoint_that_lost_its_index_is_not_passed_over() {
    let folder = Folder::new("lost");
    let saved = folder.path("saved");
    assert!(tiny(&["--save", &saved, "--dp", "1", "--steps", "1"]).status.success());
    fs::remove_file(Path::new(&saved).join("step-000000001/checkpoint.json")).unwrap();
    refused(&["--save", &saved, "--steps", "1"], "there are checkpoints already: give --resume");
    let goes_on = tiny(&["--resume", &saved, "--steps", "2"]);
    let stderr = String::from_utf8(goes_on.stderr).unwrap();
    assert!(goes_on.status.code() == Some(2) && stderr.contains("checkpoint.json: is not there"), "{stderr}");
    let one = Path::new(&saved).join("step-000000001");
    refused(&["--resume", one.to_str().unwrap(), "--steps", "2"], "--resume-step 1");
}

/// What a run is to go on from is not made where it is not, whatever starts the ranks.
#[test]
fn nothing_to_resume_is_refused_and_not_made() {
    let folder = Folder::new("nothing");
    let none = folder.path("none");
    let of_launcher = |resume: &str| {
        let mut command = Command::new(example());
        command.args(TINY).args(["--launch", "env", "--dp", "1", "--resume", resume]).env("BURN_PARALLEL_RUN", "known");
        let one = [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")];
        command.envs(one).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", free_port().to_string());
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let file = folder.write("file", b"");
    for (resume, why) in [(&none, "none: there is no checkpoint"), (&file, "file: it is not a directory")] {
        refused(&["--resume", resume], why);
        let (code, stderr) = of_launcher(resume);
        assert!(code == Some(2) && stderr.contains(why), "{code:?} {stderr}");
    }
    assert!(!Path::new(&none).exists());
    // What is only called like a checkpoint is none: neither in the way of a run, nor to go on from.
    let saved = folder.path("saved");
    fs::create_dir_all(Path::new(&saved).join("step-000000009")).unwrap();
    refused(&["--resume", &saved], "saved: there is no checkpoint");
    assert!(tiny(&["--save", &saved, "--steps", "1", "--dp", "1"]).status.success());
}

/// Another run's checkpoints are not pruned, nor gone on from, by a run that did not ask for them.
#[test]
fn checkpoints_of_another_run_are_left_alone() {
    let folder = Folder::new("taken");
    let saved = folder.path("saved");
    assert!(tiny(&["--save", &saved, "--dp", "1", "--steps", "1"]).status.success());
    refused(&["--save", &saved, "--steps", "1"], "there are checkpoints already: give --resume");
    let file = folder.write("file", b"");
    refused(&["--save", &file], "file: it is not a directory");
    refused(&["--save", &folder.path("file/below")], "file/below: Not a directory");
    assert!(Path::new(&saved).join("step-000000001").exists());
    // One checkpoint in place of all.
    for name in ["step-000000001", "step-1"] {
        let one = format!("{saved}/{name}");
        refused(
            &["--resume", &one],
            &format!("--resume {one}: it is one checkpoint: give --resume {saved} --resume-step 1"),
        );
        assert!(name == "step-000000001" || !Path::new(&one).exists());
    }
    let on = ["--save", &saved, "--resume", &saved, "--dp", "1", "--steps", "2"];
    assert!(tiny(&on).status.success());
    // With nothing left to do there is nothing to tell of what it took.
    let output = tiny(&[&on[..], &["--clip", "1"]].concat());
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && table.contains("loss, last steps"), "{table}");
    assert!(!table.contains("tokens/s") && !table.contains("NaN"), "{table}");
    // What is listed as the order of the checkpoints is none.
    fs::write(format!("{saved}/.order"), "first things first").unwrap();
    let output = tiny(&on);
    let told = String::from_utf8(output.stderr).unwrap();
    let last = told.lines().last().unwrap_or_default();
    assert!(
        output.status.code() == Some(2) && last.contains(".order") && last.contains("is no list of steps"),
        "{told}"
    );
}

/// A run in the background, when its first checkpoints are there.
fn running(saved: &str, flags: &[&str]) -> std::process::Child {
    let mut command = Command::new(example());
    command.args(TINY).args(flags).args(["--save", saved, "--resume", saved, "--save-every", "2"]);
    let mut run = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let has = |name: &str| fs::read_dir(saved).is_ok_and(|mut all| all.any(|it| it.unwrap().file_name() == name));
    while !has("step-000000004") {
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(run.try_wait().unwrap().is_none(), "it was to be disturbed");
    }
    run
}

pub fn send(signal: &str, process: &str) {
    assert!(Command::new("kill").args([signal, process]).status().unwrap().success());
}

/// A rank is killed in the middle of the training: all start again from the last checkpoint, or those that are left,
/// and end with the same losses.
#[cfg(target_os = "linux")]
#[test]
fn ranks_that_are_lost_are_started_again() {
    let folder = Folder::new("restarts");
    let steps = ["--steps", "60", "--batch", "8"];
    let whole = losses(&json(&folder, &[&steps[..], &["--dp", "2"]].concat()));
    for (name, more, started) in [
        ("again", &["--dp", "2"][..], "restart 1 of 1: 2 ranks are started, of 2 before"),
        ("fewer", &["--dp", "3", "--min-ranks", "2"], "restart 1 of 1: 2 ranks are started, of 3 before"),
        (
            "pipelines",
            &["--dp", "2", "--pp", "2", "--min-ranks", "2"],
            "restart 1 of 1: 2 ranks are started, of 4 before",
        ),
    ] {
        let (saved, path) = (folder.path(name), folder.path("restarted.json"));
        let flags = ["--launch", "processes", "--restarts", "1", "--json", &path];
        let run = running(&saved, &[&steps[..], more, &flags].concat());
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", run.id())).unwrap();
        send("-9", children.split_whitespace().next_back().unwrap());
        let output = run.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        assert!(stderr.contains("ended by signal 9") && stderr.contains(started), "{stderr}");
        assert!(stderr.contains("goes on after step") && stderr.contains("on 2 ranks"), "{stderr}");
        same_losses(&whole, &losses_in(&path), 1e-5);
    }
    refused(&["--restarts", "1", "--resume", "x"], "--launch processes");
    refused(&["--restarts", "1"], "--restarts needs --resume <DIR>, which is not given");
    refused(&["--dp", "2", "--min-ranks", "1"], "--restarts");
    let more = ["--dp", "2", "--min-ranks", "3", "--restarts", "1", "--resume", "x", "--launch", "processes"];
    refused(&more, "--min-ranks 3 is more than the 2 ranks");
}

/// A signal that asks for the end: all ranks save the same step and end, with the exit code that says so.
#[cfg(unix)]
#[test]
fn a_run_that_is_asked_to_end_saves_and_ends() {
    let folder = Folder::new("asked");
    let steps = ["--steps", "90", "--batch", "8", "--dp", "2"];
    let whole = losses(&json(&folder, &steps));
    for (launch, signal, code) in [("threads", "TERM", 143), ("processes", "TERM", 143), ("processes", "USR1", 138)] {
        let saved = folder.path(&format!("{launch}{signal}"));
        let run = running(&saved, &[&steps[..], &["--launch", launch]].concat());
        send(&format!("-{signal}"), &run.id().to_string());
        let output = run.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{launch} {signal}: {stderr}");
        assert!(stderr.contains(&format!("SIG{signal} ends the run after step")), "{stderr}");
        let after = stderr.split("after step ").last().unwrap().split(' ').next().unwrap();
        let last = fs::read_dir(&saved).unwrap().map(|it| it.unwrap().file_name().into_string().unwrap()).max();
        assert_eq!(last.unwrap(), format!("step-{:0>9}", after), "{stderr}");
        let gone_on = losses(&json(&folder, &[&steps[..], &["--resume", &saved]].concat()));
        same_losses(&whole, &gone_on, 1e-6);
    }
}

/// What does not fit a checkpoint is named by its flag, and what is done is said to be done.
#[test]
fn what_does_not_fit_a_checkpoint_is_named_by_its_flag() {
    let folder = Folder::new("unfit");
    let saved = folder.path("saved");
    let output = tiny(&["--save", &saved, "--dp", "1"]);
    assert!(output.status.success());
    let resume = |flags: &[&str]| {
        let all = [&["--seq", "16", "--layers", "1", "--d-model", "16", "--steps", "3", "--resume", &saved][..], flags];
        let mut last = Vec::new();
        // A flag that comes twice is refused: the later one counts.
        for pair in all.concat().chunks(2) {
            last.retain(|known: &[&str; 2]| known[0] != pair[0]);
            last.push([pair[0], pair[1]]);
        }
        let output = train_lm(&last.concat());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (flags, says) in [
        (["--d-model", "32"], "--d-model 32 makes another model than --resume"),
        (["--layers", "2"], "saved with --layers 1"),
        (["--heads", "2"], "saved with --heads 4"),
        (["--seq", "8"], "saved with --seq 16"),
        (["--steps", "2"], "has made 3: give more steps"),
    ] {
        let (code, stderr) = resume(&flags);
        assert!(code == Some(2) && stderr.contains(says), "{flags:?}: {stderr}");
    }
    // All of it at once.
    let (code, stderr) = resume(&["--d-model", "32", "--layers", "2"]);
    let all = ["--layers 2 and --d-model 32 make another model than", "saved with --layers 1 and with --d-model 16"];
    assert!(code == Some(2) && all.iter().all(|says| stderr.contains(says)), "{stderr}");
    let (code, stderr) = resume(&["--dp", "1"]);
    assert!(code == Some(0) && stderr.contains("nothing to do") && stderr.contains("all 3 steps"), "{stderr}");
    let output = train_lm(&["--seq", "16", "--layers", "1", "--d-model", "16", "--steps", "3", "--resume", &saved]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("loss, last steps") && !table.contains("3 steps of"), "{table}");
    assert!(!stderr.contains("--text is another"), "{stderr}");
    fs::write(folder.path("other.txt"), "another text that it learns from\n".repeat(40)).unwrap();
    let (code, stderr) = resume(&["--steps", "4", "--text", &folder.path("other.txt")]);
    assert!(code == Some(0) && stderr.contains("--text is another from here on than it was"), "{stderr}");
    let (code, stderr) = resume(&["--steps", "4", "--batch", "8"]);
    assert!(code == Some(0) && stderr.contains("--batch is 8 from here on, and was 16"), "{stderr}");
    assert!(
        stderr.contains("the whole run has 4 steps from here on, and had 3: a schedule of learning rates"),
        "{stderr}"
    );
}

/// A damaged checkpoint: the error names the flag that goes on from another one, and nothing is started again.
#[test]
fn a_run_goes_on_from_an_earlier_checkpoint() {
    let folder = Folder::new("earlier");
    let saved = folder.path("saved");
    let run = |more: &[&str]| {
        let path = folder.path("outcome.json");
        let output = tiny(&[&["--steps", "6", "--dp", "2", "--json", &path], more].concat());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned(), path)
    };
    let (_, _, path) = run(&["--save", &saved, "--save-every", "2"]);
    let whole = losses_in(&path);
    let file = Path::new(&saved).join("step-000000006/rank-00001.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let (code, stderr, _) = run(&["--resume", &saved]);
    assert!(code == Some(2) && stderr.contains("rank-00001.safetensors: bytes"), "{stderr}");
    assert!(!stderr.contains("restore_step"), "{stderr}");
    assert!(stderr.contains("--resume-step goes on from another one: 2, 4"), "{stderr}");
    let (code, stderr, _) = run(&["--resume", &saved, "--resume-step", "3"]);
    assert!(code == Some(2) && stderr.contains("has checkpoints of steps [2, 4, 6]"), "{stderr}");
    let (code, stderr, path) = run(&["--resume", &saved, "--resume-step", "4"]);
    assert!(code == Some(0) && stderr.contains("goes on after step 4 of 6"), "{stderr}");
    same_losses(&whole, &losses_in(&path), 0.0);
    if cfg!(unix) {
        let (code, stderr, _) = run(&["--resume", &saved, "--launch", "processes", "--restarts", "3"]);
        assert!(code == Some(2) && stderr.contains("the ranks are not started again"), "{stderr}");
        assert!(!stderr.contains("restart 1"), "{stderr}");
    }
    refused(&["--resume-step", "2"], "--resume-step needs --resume <DIR>");
}

/// A run that has gone back is gone on with, and ranks that are lost go on from what it has saved since.
#[cfg(target_os = "linux")]
#[test]
fn a_run_that_went_back_is_gone_on_with() {
    let folder = Folder::new("back");
    let saved = folder.path("saved");
    let flags = ["--steps", "9", "--save", &saved, "--save-every", "2", "--keep", "9", "--resume", &saved];
    let whole = losses(&json(&folder, &flags));
    let run = |steps: &str, more: &[&str]| {
        let flags: Vec<&str> = flags.iter().map(|flag| if *flag == "9" { steps } else { flag }).collect();
        let output = tiny(&[&flags[..], &["--json", &folder.path("outcome.json")], more].concat());
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{stderr}");
        stderr
    };
    // There are checkpoints of steps 2, 4, 6, 8 and 9.
    let stderr = run("5", &["--resume-step", "2"]);
    assert!(stderr.contains("goes on after step 2 of 5"), "{stderr}");
    let stderr = run("9", &[]);
    assert!(stderr.contains("goes on after step 5 of 9"), "{stderr}");
    assert_eq!(losses_in(&folder.path("outcome.json")).len(), whole.len());
    // As a start after a loss: what this run has saved since, if it has, and not what another has from the same step.
    let restarted = |step: &str, run: &str| {
        let flags: Vec<&str> = flags.iter().map(|flag| if *flag == "9" { "10" } else { flag }).collect();
        let mut command = Command::new(example());
        command.args(TINY).args(flags).args(["--resume-step", step, "--dp", "1", "--launch", "env"]);
        let one = [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")];
        let port = free_port().to_string();
        command.envs(one).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port).env("BURN_PARALLEL_RESTART", "1");
        command.env("BURN_PARALLEL_RUN", run);
        let output = command.output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    for (run, found) in
        [("a", "goes on after step 4 of 10"), ("a", "has made all 10 steps"), ("b", "goes on after step 4 of 10")]
    {
        let stderr = restarted("4", run);
        assert!(stderr.contains(found), "{run}: {stderr}");
    }
}

#[test]
fn the_json_tells_how_idle_a_pipeline_was() {
    let folder = Folder::new("idle");
    for (schedule, bound, peak) in [("gpipe", 0.2, 4), ("1f1b", 0.2, 2), ("zb_h1", 1.0 / 13.0, 2)] {
        let flags = ["--pp", "2", "--dp", "1", "--batch", "4", "--micro-batches", "4", "--schedule", schedule];
        let outcome = json(&folder, &flags);
        assert_eq!(outcome["axes"], serde_json::json!({ "dp": 1, "pp": 2, "tp": 1 }));
        let pipeline = &outcome["pipeline"];
        assert!((pipeline["bound"].as_f64().unwrap() - bound).abs() < 1e-9, "{pipeline}");
        assert_eq!(pipeline["peak_activations"].as_u64(), Some(peak), "{pipeline}");
        assert!((0.0..1.0).contains(&pipeline["idle"].as_f64().unwrap()), "{pipeline}");
    }
    assert!(json(&folder, &["--dp", "1"]).get("pipeline").is_none());
}

#[test]
fn the_json_tells_what_the_parts_of_a_layer_sent() {
    let folder = Folder::new("parts-sent");
    let outcome = json(&folder, &["--tp", "2", "--batch", "8"]);
    assert_eq!(outcome["axes"], serde_json::json!({ "dp": 1, "pp": 1, "tp": 2 }));
    // Two all-reduces forward and two backward, of 8 rows of 16 tokens and width 16; in the first of three steps the
    // ranks compare their graphs and updates and the moments of an optimizer that is new, and tell each other that it
    // has refused nothing.
    let (calls, bytes) = (outcome["calls_per_step"].as_f64(), outcome["bytes_sent_per_step"].as_f64());
    assert_eq!(calls.map(|calls| (3.0 * calls).round()), Some(15.0));
    let activations = 4.0 * 4.0 * 8.0 * 16.0 * 16.0;
    assert!((activations..activations + 14.0).contains(&bytes.unwrap()), "{bytes:?} {activations}");
}

#[test]
fn the_json_tells_of_ranks_and_what_they_sent() {
    let folder = Folder::new("sent");
    for dp in 1..=4 {
        let outcome = json(&folder, &["--dp", &dp.to_string()]);
        assert_eq!(outcome["axes"], serde_json::json!({ "dp": dp, "pp": 1, "tp": 1 }));
        // The gradients, each 4 bytes; the control numbers add little.
        let gradients = 4.0 * outcome["parameters"].as_f64().unwrap() * 2.0 * f64::from(dp - 1) / f64::from(dp);
        let sent = outcome["bytes_sent_per_step"].as_f64().unwrap();
        assert!((gradients..=1.02 * gradients).contains(&sent), "{dp} ranks sent {sent} for {gradients}");
        // One bucket with a call before and after it; and once the order of the gradients. One rank has nobody to call.
        let calls = outcome["calls_per_step"].as_f64().unwrap();
        assert_eq!((3.0 * calls).round(), if dp == 1 { 0.0 } else { 10.0 }, "{dp} ranks made {calls} calls");
    }
}

#[test]
fn ranks_that_fail_end_the_run_with_code_1() {
    let output = Command::new(example()).args(TINY).env("BURN_PARALLEL_TIMEOUT_S", "0.000001").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty());
    let told: Vec<&str> = stderr.lines().filter(|line| line.starts_with("train_lm: ")).collect();
    assert!(told.len() == 1 && told[0].contains("time-out") && told[0].contains("BURN_PARALLEL_TIMEOUT_S"), "{stderr}");
}

#[test]
fn the_shortest_text_trains_and_a_line_appears_without_a_terminal() {
    let folder = Folder::new("shortest");
    let output = tiny(&["--text", &folder.write("short.txt", &[b'a'; 17])]);
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("step 3/3: loss "), "{stderr}");
    assert!(stdout.contains("the text is too short"), "{stdout}");
}

#[test]
fn ranks_share_the_rows_of_a_batch_without_loss_or_repetition() {
    let text = text::Text::load(None, 32).unwrap();
    for (batch, step) in [(1, 0), (8, 3), (13, 700)] {
        let whole = text.rows(5, step, batch, 0, 1);
        assert_eq!(whole.len(), batch);
        assert!(whole.iter().all(|row| row.len() == 33));
        for ranks in 1..=batch {
            let parts: Vec<Vec<&[u8]>> = (0..ranks).map(|rank| text.rows(5, step, batch, rank, ranks)).collect();
            assert!(parts.iter().all(|part| part.len() == batch / ranks || part.len() == batch.div_ceil(ranks)));
            assert_eq!(parts.concat(), whole, "{ranks} ranks");
        }
    }
    assert_ne!(text.rows(5, 0, 8, 0, 1), text.rows(5, 1, 8, 0, 1), "another step");
    assert_ne!(text.rows(5, 0, 8, 0, 1), text.rows(6, 0, 8, 0, 1), "another seed");
}

#[test]
fn held_out_rows_are_never_trained_on() {
    let text = text::Text::load(None, 32).unwrap();
    let (train, held_out) = text.split();
    assert!(held_out > 5_000 && train > 9 * held_out - 10);
    let rows = text.held_out(64);
    assert_eq!(rows.len(), 64);
    let last_trained = (0..200).flat_map(|step| text.rows(0, step, 64, 0, 1)).map(|row| row.as_ptr_range().end).max();
    assert!(rows.iter().all(|row| row.len() == 33 && row.as_ptr() >= last_trained.unwrap()));
}

/// What all processes of a run write goes into one file: the first rank's.
pub fn losses_in(path: &str) -> Vec<f64> {
    losses(&serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
}

/// The losses of ranks that are threads, and of the same ranks as processes that `start` makes of these flags.
#[track_caller]
fn losses_of_threads(name: &str, flags: &[&str], start: impl Fn(&[&str]) -> Output) {
    let folder = Folder::new(name);
    let (threads, processes) = (folder.path("threads.json"), folder.path("processes.json"));
    let model: &[&str] = if flags.contains(&"--d-model") { &["--layers", "1", "--seq", "16"] } else { &TINY };
    let flags = [model, &["--steps", "6", "--batch", "10"], flags].concat();
    assert!(train_lm(&[&flags[..], &["--json", &threads]].concat()).status.success());
    let output = start(&[&flags[..], &["--json", &processes]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).matches("The model writes").count(), 1);
    same_losses(&losses_in(&threads), &losses_in(&processes), 1e-6);
}

#[cfg(unix)]
#[test]
fn processes_have_the_losses_of_threads() {
    let start = |flags: &[&str]| {
        let output = train_lm(&[flags, &["--launch", "processes"]].concat());
        assert!(String::from_utf8_lossy(&output.stderr).contains("[rank 0/4] step 6/6"));
        output
    };
    losses_of_threads("tcp-dp-tp", &["--ranks", "4", "--dp", "2", "--tp", "2"], start);
    losses_of_threads("tcp-dp", &["--dp", "4"], start);
    // Large parameters, whose rows are gathered into the memory of the others.
    losses_of_threads("tcp-zero", &["--dp", "4", "--zero", "1", "--d-model", "384"], start);
    losses_of_threads("tcp-pp-tp", &["--dp", "1", "--pp", "2", "--tp", "2", "--micro-batches", "5"], start);
}

/// As torchrun starts them, and `srun` if it sets these variables.
#[test]
fn what_a_launcher_has_started_has_the_losses_of_threads() {
    let start = |flags: &[&str]| {
        let port = free_port().to_string();
        let ranks: Vec<_> = (0..3)
            .map(|rank: usize| {
                let mut command = Command::new(example());
                command.args(flags).env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
                command.env("WORLD_SIZE", "3").env("LOCAL_WORLD_SIZE", "3");
                command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
                command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
            })
            .collect();
        let mut outputs: Vec<Output> = ranks.into_iter().map(|rank| rank.wait_with_output().unwrap()).collect();
        for output in &outputs[1..] {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        outputs.swap_remove(0)
    };
    losses_of_threads("env-dp", &["--dp", "3"], start);
}

/// Ranks that are processes, joined by MPI.
#[cfg(feature = "mpi")]
mod mpi {
    use super::*;

    /// `mpirun` with what it needs here, or `None` where there is none.
    fn mpirun(ranks: usize) -> Option<Command> {
        let version = Command::new("mpirun").arg("--version").output().ok()?;
        let mut mpirun = Command::new("mpirun");
        if String::from_utf8_lossy(&version.stdout).contains("Open MPI") {
            mpirun.args(["--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]);
        }
        mpirun.args(["-n", &ranks.to_string()]);
        Some(mpirun)
    }

    #[test]
    fn mpirun_has_the_losses_of_threads() {
        if mpirun(4).is_none() {
            println!("SKIPPED, not passed: there is no mpirun on this machine");
            return;
        }
        let start = |flags: &[&str]| mpirun(4).unwrap().arg(example()).args(flags).output().unwrap();
        losses_of_threads("mpi-dp-tp", &["--dp", "2", "--tp", "2"], start);
        losses_of_threads("mpi-dp", &["--dp", "4"], start);
        losses_of_threads("mpi-zero", &["--dp", "4", "--zero", "2", "--d-model", "384"], start);
    }

    #[test]
    fn processes_of_itself() {
        if mpirun(1).is_none() {
            println!("SKIPPED, not passed: there is no mpirun on this machine");
            return;
        }
        let start = |flags: &[&str]| {
            let output = train_lm(&[flags, &["--launch", "processes", "--transport", "mpi"]].concat());
            assert!(String::from_utf8_lossy(&output.stderr).contains("[rank 0/2] step 6/6"));
            output
        };
        losses_of_threads("mpi-processes", &["--ranks", "2"], start);
    }

    #[test]
    fn as_many_ranks_as_were_started() {
        let Some(mut mpirun) = mpirun(2) else { return };
        let output = mpirun.arg(example()).args(TINY).args(["--dp", "3"]).output().unwrap();
        assert!(!output.status.success());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("2 ranks have been started, and the flags are for 3"), "{stderr}");
    }
}

#[test]
fn ways_to_start_that_do_not_go_together() {
    refused(&["--device", "cuda"], "--device cuda: this program was built without it; build with `--features cuda`");
    refused(&["--device", "wgpu"], "--features wgpu");
    refused(&["--transport", "nccl"], "--features cuda");
    refused(&["--transport", "tcp"], "--launch processes or env");
    refused(&["--launch", "processes", "--transport", "local"], "--launch threads");
    if cfg!(not(feature = "mpi")) {
        refused(&["--launch", "processes", "--transport", "mpi"], "--features mpi");
    } else {
        refused(&["--transport", "mpi"], "--launch processes or env");
    }
    refused(&["--launch", "env"], "not started by a launcher");
    refused(&["--launch", "magic"], "magic");
}

/// What is sent stands under what it is for.
#[test]
fn the_table_tells_what_was_sent_for_what() {
    let names = ["activations of split layers", "activations between stages", "gradient norm, over parts"];
    let runs: [(&[&str], [bool; 3]); 5] = [
        (&["--dp", "2", "--clip", "1"], [false, false, false]),
        (&["--dp", "1", "--tp", "2"], [true, false, false]),
        (&["--dp", "1", "--tp", "2", "--clip", "1"], [true, false, true]),
        (&["--dp", "1", "--pp", "2", "--clip", "1", "--layers", "2"], [false, true, true]),
        (&["--dp", "1", "--pp", "2", "--tp", "2", "--clip", "1", "--layers", "2"], [true, true, true]),
    ];
    for (flags, shown) in runs {
        let sizes = ["--d-model", "16", "--seq", "16", "--steps", "3", "--batch", "8"];
        let layers: &[&str] = if flags.contains(&"--layers") { &[] } else { &["--layers", "1"] };
        let output = train_lm(&[&sizes[..], layers, flags].concat());
        assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        let table = String::from_utf8(output.stdout).unwrap();
        for (name, shown) in names.into_iter().zip(shown) {
            assert_eq!(table.contains(name), shown, "{flags:?}, {name}: {table}");
        }
        // Ranks that share a model wait for each other within its steps: of that there is no figure.
        let told = String::from_utf8(output.stderr).unwrap();
        let replicas = flags.windows(2).any(|pair| pair == ["--dp", "2"]);
        assert!(table.contains("waiting for gradients") == replicas, "{flags:?}: {table}");
        assert!(told.contains("% waiting for gradients") == replicas && told.contains("tokens/s"), "{flags:?}: {told}");
        // What batch was used, and what would help.
        assert!(table.contains("8 rows = ") && table.contains("--noise-scale says whether a larger batch"), "{table}");
        if flags.contains(&"--pp") {
            assert!(table.contains("1f1b, 8 micro-batches"), "{table}");
        }
    }
}

/// Accumulation and replicas see the same noise, and a batch that has grown goes on where the run was saved.
#[test]
fn noise_is_measured_and_the_batch_grows() {
    let folder = Folder::new("noise");
    let flags = ["--steps", "24", "--batch", "4", "--noise-scale"];
    let rows = |outcome: &Value| outcome["rows"].as_u64().unwrap();
    let noise = |more: &[&str]| {
        let outcome = json(&folder, &[&flags[..], more].concat());
        assert_eq!(rows(&outcome), 4);
        outcome["noise_scale_rows"].as_f64()
    };
    let two = noise(&["--dp", "2"]).unwrap();
    let accumulated = noise(&["--dp", "1", "--micro-batch", "2"]).unwrap();
    assert!(two > 0.0 && (accumulated / two - 1.0).abs() < 0.02, "{accumulated}, {two}");
    let divided = noise(&["--dp", "2", "--zero", "3"]).unwrap();
    assert!((divided / two - 1.0).abs() < 0.02, "{divided}, {two}");
    assert_eq!(noise(&["--dp", "1"]), None);
    // It is told before the run, and why after it.
    let output = tiny(&[&flags[..], &["--dp", "1"]].concat());
    let (begun, told) = (String::from_utf8(output.stderr).unwrap(), String::from_utf8(output.stdout).unwrap());
    let says = |text: &str| begun.find(text).unwrap_or_else(|| panic!("{text}: {begun}"));
    assert!(says("--noise-scale: one replica with one micro-batch a step measures no noise") < says("step 1/24"));
    assert!(told.contains("one micro-batch on one replica"), "{told}");

    let saved = folder.path("saved");
    let grows = ["--steps", "40", "--batch", "2", "--grow-batch", "4", "--save", &saved, "--save-every", "20"];
    let output = tiny(&[&grows[..], &["--json", &folder.path("outcome.json")]].concat());
    let (told, table) = (String::from_utf8(output.stderr).unwrap(), String::from_utf8(output.stdout).unwrap());
    assert!(output.status.success(), "{told}");
    let whole: Value = serde_json::from_slice(&fs::read(folder.path("outcome.json")).unwrap()).unwrap();
    assert_eq!(rows(&whole), 4);
    assert!(told.contains(": the batch grows from 2 to 4 rows: the noise scale is "), "{told}");
    assert!(table.contains("40 steps of 2 to 4 x 16 bytes"), "{table}");
    fs::remove_dir_all(&saved).unwrap();
    // Half of it, and on from there.
    let half: Vec<&str> = grows.iter().map(|flag| if *flag == "40" { "20" } else { flag }).collect();
    json(&folder, &half);
    let again = json(&folder, &[&grows[..], &["--resume", &saved]].concat());
    assert_eq!(rows(&again), 4);
    assert_eq!(losses(&again).len(), 40);
}

/// The number in a text that stands before these words.
fn number(said: &str, words: &str) -> u64 {
    let number = said.split_once(words).and_then(|(before, _)| before.split_whitespace().next_back()?.parse().ok());
    number.unwrap_or_else(|| panic!("no number{words}: {said}"))
}

/// Less memory, fewer rows. Trials that are known to need more than the budget are not started, others are; the largest
/// that fits is taken, and trains.
#[cfg(target_os = "linux")]
#[test]
fn the_batch_that_fits_is_found() {
    let folder = Folder::new("fits");
    // More than any trial takes.
    let text = folder.path("text");
    fs::write(&text, "what fits is found out by trying\n".repeat(20_000)).unwrap();
    let rows = |kilobytes: &str, budget: &[&str], limit: &str| {
        let path = folder.path("outcome.json");
        let script = format!("ulimit -d {kilobytes} && exec \"$0\" \"$@\"");
        let flags =
            ["--layers", "1", "--d-model", "16", "--seq", "256", "--steps", "1", "--batch", "auto", "--ranks", "2"];
        let mut limited = Command::new("sh");
        limited.args(["-c", &script]).arg(example()).args(flags).args(budget).args(["--json", &path, "--text", &text]);
        let output = limited.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && told.contains("step 1/1: loss "), "{told}");
        assert!(told.contains("at most 1024 rows at once are looked for"), "{told}");
        assert!(told.contains(&format!(" bytes ({limit})\n")), "{told}");
        let (bytes, known) = (number(&told, " bytes ("), number(&told, " rows at once may fit"));
        // The scores of attention by four heads, and of 256 bytes for each place of a row, alone, on two ranks.
        let needs = |rows: u64| 2 * rows * 5 * 256 * 256 * 4;
        assert!(needs(known) < bytes && bytes < needs(1024), "{told}");
        let tried: Vec<u64> =
            told.split("auto: tries ").skip(1).map(|rest| rest.split(' ').next().unwrap().parse().unwrap()).collect();
        assert_eq!(tried.first(), Some(&known), "{told}");
        assert!(tried.iter().all(|rows| *rows <= known), "{told}");
        let fits = |rows: &u64| !told.contains(&format!("auto: {rows} rows do not fit"));
        let largest = tried.iter().copied().filter(fits).max().unwrap();
        assert!(tried.iter().all(|rows| fits(rows) == (*rows <= largest)), "{told}");
        assert!(largest == known || tried.contains(&(largest + 1)), "{told}");
        let outcome: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        assert_eq!(outcome["rows"].as_u64(), Some(2 * largest), "{told}");
        largest
    };
    let little = rows("200000", &["--memory-budget", "120M"], "--memory-budget");
    let more = rows("200000", &[], "RLIMIT_DATA");
    assert!(1 <= little && little < more, "{little}, {more}");
}

/// Where nothing fits the flags are wrong: what is known of a step says so, or a trial.
#[cfg(target_os = "linux")]
#[test]
fn a_budget_that_holds_nothing_is_refused() {
    let auto = |more: &[&str]| {
        let output = train_lm(&[&TINY[..], &["--steps", "1", "--batch", "auto", "--ranks", "2"], more].concat());
        let told = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), told.matches("auto: tries ").count(), told.lines().last().unwrap().to_owned(), told)
    };
    let advice = "give shorter rows (--seq), a smaller model (--layers, --d-model), fewer replicas";
    let nothing = "train_lm: --batch auto: not even one row fits into the ";
    let (code, tried, last, told) = auto(&["--memory-budget", "100K"]);
    assert_eq!((code, tried), (Some(2), 0), "{told}");
    assert!(
        last.starts_with(nothing) && last.contains(&format!("102400 bytes of --memory-budget: {advice}")),
        "{told}"
    );
    assert!(last.ends_with("or a larger --memory-budget"), "{told}");
    // Less than the program takes before its first step.
    let (code, tried, last, told) = auto(&["--memory-budget", "3M"]);
    assert!(code == Some(2) && tried > 1 && told.contains("auto: 1 row does not fit: "), "{told}");
    assert!(
        last.starts_with(nothing) && last.contains(" bytes of --memory-budget (") && last.contains(advice),
        "{told}"
    );
    // A trial that takes too long says nothing of memory.
    let (code, tried, last, told) = auto(&["--trial-timeout", "0.001"]);
    assert_eq!((code, tried), (Some(1), 1), "{told}");
    assert!(last.ends_with("it did not end within 1ms; --trial-timeout gives it more"), "{told}");
}

/// A step takes no more rows than the text has, whatever would fit.
#[cfg(target_os = "linux")]
#[test]
fn no_more_rows_are_tried_than_the_text_has() {
    let folder = Folder::new("few");
    let text = folder.path("text");
    // Of the 300 bytes 270 are learned from: 16 rows of 16.
    fs::write(&text, "some words\n".repeat(60).get(..300).unwrap()).unwrap();
    let flags = ["--text", &text, "--steps", "1", "--batch", "auto", "--pp", "2", "--micro-batches", "3", "--tp", "2"];
    let output = tiny(&flags);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let most = "at most 5 rows at once are looked for (the text has 16 rows, for 3 micro-batches)";
    assert!(output.status.success() && told.contains(most) && !told.contains("tries 6 rows"), "{told}");
    // What the plan splits is warned of once, in the run, and not in what was looked for as well.
    assert_eq!(told.matches("the plan leaves").count(), 1, "{told}");
}
