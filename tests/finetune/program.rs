//! The program as its user meets it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::directory::{CHATML, Directory};

/// A Llama, and conversations to train it on.
pub fn prepared() -> Directory {
    prepared_with("llama_gqa")
}

/// The same with another model.
pub fn prepared_with(model: &str) -> Directory {
    let directory = Directory::new(&[]).with_template(CHATML).with_model(model);
    let line = |number: usize| {
        let (asked, said) = ("why? ".repeat(number % 3 + 1), "so. ".repeat(number % 5 + 1));
        let messages =
            serde_json::json!([{ "role": "user", "content": asked }, { "role": "assistant", "content": said }]);
        serde_json::json!({ "messages": messages }).to_string() + "\n"
    };
    directory.write("data.jsonl", (0..24).map(line).collect::<String>().as_bytes());
    directory.write("eval.jsonl", (24..29).map(line).collect::<String>().as_bytes());
    directory
}

/// The program with a directory as its model, and files of it by name after `--data` and the like. Steps are captured
/// where they must be, or as the flags say: the loops of those that could be eager take long in a program that is not
/// optimised.
pub fn command(directory: &Directory, flags: &[&str]) -> Command {
    let test = std::env::current_exe().unwrap();
    // The example beside this test: `cargo build --features finetune --example finetune` makes it.
    let example = test.parent().and_then(Path::parent).unwrap().join("examples").join("finetune");
    let place = |flag: &&str| match flag.strip_prefix("in:") {
        Some(name) => directory.path().join(name).into_os_string(),
        None => flag.into(),
    };
    let mut command = Command::new(&example);
    command.arg("--model").arg(directory.path()).args(flags.iter().map(place));
    if !["--engine", "--strategy", "--dry-run"].iter().any(|flag| flags.contains(flag)) {
        command.args(["--engine", "auto"]);
    }
    command
}

pub fn finetune(directory: &Directory, flags: &[&str]) -> Output {
    let mut command = command(directory, flags);
    command.output().unwrap_or_else(|why| panic!("{command:?}: {why}"))
}

/// The outcome of a run; on the conversations, in rows of 64 tokens, at a rate of 1e-3, where the flags say nothing
/// else.
pub fn trained(directory: &Directory, flags: &[&str]) -> Value {
    let usual = [["--data", "in:data.jsonl"], ["--seq", "64"], ["--lr", "1e-3"], ["--json", "in:outcome.json"]];
    let usual = usual.into_iter().filter(|[flag, _]| !flags.contains(flag));
    let output = finetune(directory, &[&usual.flatten().collect::<Vec<_>>()[..], flags].concat());
    assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
    outcome(directory)
}

/// What the last run has written.
pub fn outcome(directory: &Directory) -> Value {
    serde_json::from_slice(&fs::read(directory.path().join("outcome.json")).unwrap()).unwrap()
}

pub fn numbers(outcome: &Value, name: &str) -> Vec<f64> {
    outcome[name].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

#[track_caller]
pub fn same(expected: &[f64], found: &[f64], within: f64, of: &dyn std::fmt::Debug) {
    assert_eq!(expected.len(), found.len(), "{of:?}");
    let near = expected.iter().zip(found).all(|(a, b)| (a - b).abs() <= within * a.abs());
    assert!(near, "{of:?}: {expected:?} {found:?}");
}

fn held_out(outcome: &Value) -> Vec<f64> {
    outcome["held_out"].as_array().unwrap().iter().map(|one| one["loss"].as_f64().unwrap()).collect()
}

#[test]
fn any_mesh_gives_the_losses_of_one_rank() {
    let directory = prepared();
    let usual = ["--batch", "4", "--steps", "3", "--clip", "1", "--eval", "in:eval.jsonl", "--eval-every", "2"];
    let run = |flags: &[&str]| trained(&directory, &[&usual[..], flags].concat());
    let one = run(&[]);
    assert_eq!((numbers(&one, "losses").len(), held_out(&one).len()), (3, 2));
    let seconds = numbers(&one, "step_seconds");
    assert!(seconds.len() == 3 && seconds.iter().all(|step| *step > 0.0), "{seconds:?}");
    assert!(one["seconds_to_first_step"].as_f64().is_some_and(|seconds| seconds > 0.0));
    assert!(held_out(&one)[1] < held_out(&one)[0]);
    for flags in [
        &["--dp", "2"][..],
        &["--engine", "captured"],
        &["--engine", "captured", "--dp", "2", "--micro-batch", "1"],
        &["--dp", "3", "--zero", "3", "--micro-batch", "1"],
        &["--tp", "2"],
        &["--pp", "2"],
        &["--dp", "2", "--launch", "processes"],
    ] {
        let found = run(flags);
        for name in ["losses", "grad_norms"] {
            same(&numbers(&one, name), &numbers(&found, name), 1e-4, &flags);
        }
        same(&held_out(&one), &held_out(&found), 1e-4, &flags);
    }
}

/// The held-out loss is that of the file that is given, though it was saved with that of another.
#[test]
fn a_run_with_nothing_to_do_measures_the_file_that_it_is_given() {
    let directory = prepared();
    let text = fs::read_to_string(directory.path().join("eval.jsonl")).unwrap();
    directory.write("other.jsonl", text.replace("so. ", "well ").as_bytes());
    let flags = ["--batch", "4", "--steps", "2", "--scheduler", "constant"];
    let run = |more: &[&str]| held_out(&trained(&directory, &[&flags[..], more].concat()));
    let (one, other) = (run(&["--eval", "in:eval.jsonl", "--save", "in:saved"]), run(&["--eval", "in:other.jsonl"]));
    assert!((one[0] - other[0]).abs() > 1e-2, "{one:?}, {other:?}");
    for mesh in [&[][..], &["--pp", "2"]] {
        for (file, expected) in [("in:other.jsonl", &other), ("in:eval.jsonl", &one)] {
            same(expected, &run(&[&["--resume", "in:saved", "--eval", file], mesh].concat()), 1e-5, &(file, mesh));
        }
    }
}

/// Ranks whose shares of a batch are of other lengths make as many steps, and those that one rank makes.
#[test]
fn ranks_agree_on_the_steps_of_an_epoch() {
    let directory = prepared();
    let data = ["--data", "in:eval.jsonl", "--epochs", "2"];
    for size in [["--batch", "3"], ["--batch-tokens", "200"]] {
        let run = |flags: &[&str]| trained(&directory, &[&size[..], &data, flags].concat());
        let one = numbers(&run(&[]), "losses");
        let said = finetune(&directory, &[&data[..], &["--seq", "64", "--dry-run"], &size].concat());
        let said = String::from_utf8(said.stdout).unwrap();
        assert!(said.contains(&format!("\n{} steps\n", one.len())), "{size:?}: {said}");
        // The rows of both epochs are no whole number of batches: the last has fewer rows than the others.
        let rows = said.split(" rows an epoch").next().and_then(|said| said.split(' ').next_back()).unwrap();
        let rows: usize = rows.parse().unwrap();
        assert!(size[0] != "--batch" || !(2 * rows).is_multiple_of(3), "{rows} rows");
        for flags in [&["--dp", "3", "--micro-batch", "1"][..], &["--dp", "2", "--micro-batch", "1"]] {
            same(&one, &numbers(&run(flags), "losses"), 1e-4, &(size, flags));
        }
    }
}

/// The rows of a step are others, but what is learned in an epoch of them is the same: each target counts once.
#[test]
fn the_first_loss_of_all_rows_together_is_that_of_one_document_a_row() {
    let directory = prepared();
    let packed = trained(&directory, &["--batch", "100", "--steps", "1"]);
    let alone = trained(&directory, &["--batch", "24", "--steps", "1", "--unpacked", "--micro-batch", "8"]);
    let tokens = trained(&directory, &["--batch-tokens", "1600"]);
    // The batch of 100 rows goes through the data several times, with all rows equally often or once more.
    same(&numbers(&alone, "losses"), &numbers(&tokens, "losses"), 1e-4, &"tokens");
    same(&numbers(&alone, "losses"), &numbers(&packed, "losses"), 0.1, &"rows");
}

#[test]
fn a_run_that_was_interrupted_goes_on_as_if_it_had_not_been() {
    let directory = prepared();
    let usual = ["--batch", "5", "--scheduler", "constant", "--epochs", "2"];
    let run = |flags: &[&str]| trained(&directory, &[&usual[..], flags].concat());
    let whole = numbers(&run(&["--save", "in:whole"]), "losses");
    // Ends within the second epoch.
    let until = (whole.len() - 2).to_string();
    let begun =
        ["--batch", "5", "--scheduler", "constant", "--steps", &until, "--save", "in:half", "--save-every", "2"];
    trained(&directory, &begun);
    let other = run(&["--resume", "in:half", "--dp", "2"]);
    same(&whole, &numbers(&other, "losses"), 1e-4, &"dp 2");
    let resumed = run(&["--save", "in:half", "--resume", "in:half"]);
    assert_eq!(numbers(&resumed, "losses"), whole);
    // What was written is a model as the first was, and knows what the first has learned.
    let written = directory.path().join("whole").join("model");
    let again = Directory::new(&[]).with_template(CHATML);
    for entry in fs::read_dir(&written).unwrap() {
        let file = entry.unwrap().path();
        fs::copy(&file, again.path().join(file.file_name().unwrap())).unwrap();
    }
    fs::copy(directory.path().join("data.jsonl"), again.path().join("data.jsonl")).unwrap();
    assert!(numbers(&run_of(&again), "losses")[0] < whole[0] - 0.05);
    // Other rows are not what the run was on.
    let output = finetune(
        &directory,
        &["--data", "in:data.jsonl", "--scheduler", "constant", "--seq", "32", "--resume", "in:half"],
    );
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr.contains("the run was on other rows"), "{stderr}");
}

fn run_of(directory: &Directory) -> Value {
    trained(directory, &["--batch", "5", "--steps", "1"])
}

#[test]
fn adapters_are_trained_on_a_mesh_and_the_model_writes() {
    let directory = prepared();
    let lora = [
        "--lora",
        "4",
        "--lora-targets",
        "all",
        "--batch",
        "4",
        "--steps",
        "3",
        "--generate",
        "why?",
        "--generate-tokens",
        "5",
    ];
    let run = |flags: &[&str]| trained(&directory, &[&lora[..], flags].concat());
    let one = run(&["--save", "in:one"]);
    let two = run(&["--tp", "2", "--save", "in:two"]);
    same(&numbers(&one, "losses"), &numbers(&two, "losses"), 1e-4, &"tp 2");
    let captured = run(&["--engine", "captured"]);
    same(&numbers(&one, "losses"), &numbers(&captured, "losses"), 1e-4, &"captured");
    assert_eq!(one["sample"], captured["sample"]);
    assert_eq!(one["sample"], two["sample"]);
    assert!(one["sample"].as_str().unwrap().starts_with("<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"));
    for (name, file) in
        [("model", "model.safetensors"), ("model", "tokenizer.json"), ("adapter", "adapter_config.json")]
    {
        for run in ["one", "two"] {
            assert!(directory.path().join(run).join(name).join(file).exists(), "{run}/{name}/{file}");
        }
    }
    // Adapters of rank 4 are all that is trained, and their moments all that the optimizer holds.
    let held = |name: &str| one["bytes_held"][name].as_u64().unwrap();
    assert_eq!(held("optimizer"), 2 * held("gradients"));
    assert!(held("gradients") < held("parameters") / 5);
}

#[test]
fn a_dry_run_says_what_would_be_and_trains_nothing() {
    let directory = prepared();
    let flags = ["--data", "in:data.jsonl", "--seq", "64", "--batch", "2", "--dry-run", "--save", "in:save"];
    let said = |more: &[&str]| {
        let output = finetune(&directory, &[&flags[..], more].concat());
        assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let parameters = 4 * (64 * 512 * 2 + 64 + 4 * (64 * (64 + 16 + 16 + 64) + 3 * 64 * 176 + 2 * 64));
    let one = said(&[]);
    assert!(one.contains("24 documents"), "{one}");
    assert!(
        one.contains(&format!("parameters {parameters}, gradients {parameters}, optimizer {} bytes", 2 * parameters)),
        "{one}"
    );
    assert!(one.contains("<|im_start|>assistant\n⟦so."), "{one}");
    // Half of each matrix on each rank, and the state of the optimizer divided among two.
    let zero = ["--dp", "2", "--zero", "1", "--recompute"];
    let (tp, captured) = (said(&["--tp", "2", "--recompute"]), said(&zero));
    let zero = said(&[&zero[..], &["--engine", "eager"]].concat());
    // Where a flag does nothing, that is said.
    assert!(tp.contains("--recompute does nothing: --tp 2 has steps captured"), "{tp}");
    assert!(captured.contains("--recompute does nothing: --engine captured has steps captured"), "{captured}");
    assert!(captured.contains("engine = \"captured\"") && zero.contains("engine = \"eager\""), "{captured} {zero}");
    assert!(!zero.contains("--recompute does nothing"), "{zero}");
    assert!(tp.contains("rank 1") && !tp.contains(&format!("parameters {parameters}")), "{tp}");
    // A line for what lies alike in all layers, or for each.
    let gates = |said: &str| said.lines().filter(|line| line.contains("mlp.gate_proj.weight")).count();
    assert!(tp.contains("model.layers.{0-3}.mlp.gate_proj.weight (4)") && gates(&tp) == 1, "{tp}");
    let whole = flags.map(|flag| if flag == "--dry-run" { "--dry-run=whole" } else { flag });
    let whole = String::from_utf8(finetune(&directory, &[&whole[..], &["--tp", "2"]].concat()).stdout).unwrap();
    assert_eq!(gates(&whole), 4, "{whole}");
    // Of the plan what says something of this model; and its parameters also where none is split.
    assert!(whole.contains("*q_proj.weight") && !whole.contains("c_attn"), "{whole}");
    let whole = flags.map(|flag| if flag == "--dry-run" { "--dry-run=whole" } else { flag });
    let whole = String::from_utf8(finetune(&directory, &whole).stdout).unwrap();
    assert!(whole.contains("The parameters:") && gates(&whole) == 4, "{whole}");
    assert!(
        zero.contains(&format!("parameters {parameters}, gradients {}, optimizer {parameters} bytes", parameters / 2)),
        "{zero}"
    );
    let pp = said(&["--pp", "2"]);
    assert!(pp.contains("The cut into 2 stages:") && pp.contains("\nstage 1: ") && pp.contains("rank 1"), "{pp}");
    assert!(!directory.path().join("save").exists());
}

/// What is computed again is what was, with tensor parallelism and gathered parameters too; in less memory where the
/// steps are eager or a pipeline's.
#[test]
fn what_is_computed_again_needs_not_be_kept() {
    let directory = prepared();
    let run =
        |flags: &[&str]| trained(&directory, &[&["--batch", "8", "--steps", "2", "--seq", "128"], flags].concat());
    let step = |outcome: &Value| outcome["bytes_held"]["step"].as_u64().unwrap();
    let mut eager = Value::Null;
    for flags in [&["--dp", "1"][..], &["--pp", "2"], &["--tp", "2"], &["--dp", "2", "--zero", "3"], &["--lora", "2"]] {
        let (kept, again) = (run(flags), run(&[flags, &["--recompute"]].concat()));
        same(&numbers(&kept, "losses"), &numbers(&again, "losses"), 1e-6, &flags);
        // Captured steps fuse what would be computed again: they hold little of it in any case, and the flag does
        // nothing.
        if flags[0] == "--tp" || flags.contains(&"--zero") {
            continue;
        }
        assert!(step(&again) < step(&kept), "{flags:?}: {} and {}", step(&again), step(&kept));
        if flags[0] == "--dp" {
            eager = again;
        }
    }
    let captured = run(&["--engine", "captured"]);
    same(&numbers(&eager, "losses"), &numbers(&captured, "losses"), 1e-4, &"captured");
    assert!(step(&captured) < step(&eager), "{} and {}", step(&captured), step(&eager));
}

/// Products of 16 bits have nearly the losses of 32, on any mesh; what is held and written is of 32.
#[test]
fn products_of_16_bits_train_weights_of_32() {
    let directory = prepared();
    let run = |flags: &[&str]| trained(&directory, &[&["--batch", "4", "--steps", "3"], flags].concat());
    let exact = run(&[]);
    for flags in
        [&["--save", "in:narrow"][..], &["--dp", "2", "--zero", "3"], &["--tp", "2"], &["--pp", "2"], &["--lora", "2"]]
    {
        let narrow = run(&[flags, &["--dtype", "bf16"]].concat());
        let (exact, found) = (numbers(&exact, "losses"), numbers(&narrow, "losses"));
        let within = if flags[0] == "--lora" { &exact[..1] } else { &exact[..] };
        same(within, &found[..within.len()], 5e-3, &flags);
        assert_ne!(exact, found, "{flags:?}");
    }
    assert_eq!(exact["bytes_held"]["optimizer"], run(&["--dtype", "bf16"])["bytes_held"]["optimizer"]);
    let written = fs::read(directory.path().join("narrow/model/model.safetensors")).unwrap();
    assert!(!String::from_utf8_lossy(&written[..4096]).contains("BF16"));
}
