//! The ways to start its ranks, ranks that are lost, and runs that are asked to end.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::common::ports::free_port;
use crate::directory::Directory;
use crate::program::{command, numbers, outcome, prepared, prepared_with, same, trained};

const STEPS: [&str; 6] = ["--data", "in:data.jsonl", "--seq", "64", "--batch", "8"];

fn losses(directory: &Directory) -> Vec<f64> {
    numbers(&outcome(directory), "losses")
}

/// Two ranks with flags of their own, as torchrun starts them, which says by variables which rank a process is.
fn ranks_of_torchrun(directory: &Directory, flags: [&[&str]; 2]) -> Vec<Output> {
    ranks_of_torchrun_in([directory; 2], flags)
}

/// The same, each with a directory of its own.
fn ranks_of_torchrun_in(directories: [&Directory; 2], flags: [&[&str]; 2]) -> Vec<Output> {
    let port = free_port().to_string();
    let ranks: Vec<Child> = ["0", "1"]
        .iter()
        .zip(directories.iter().zip(flags))
        .map(|(rank, (directory, flags))| {
            let mut command = command(directory, flags);
            command.env("RANK", rank).env("LOCAL_RANK", rank).env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port).env("TORCHELASTIC_RUN_ID", "a");
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    ranks.into_iter().map(|rank| rank.wait_with_output().unwrap()).collect()
}

/// Of a model whose weights are the same and whose config is not, that is said.
#[test]
fn a_config_that_is_another_is_named() {
    let (one, other) = (prepared(), prepared());
    let config = fs::read_to_string(other.path().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["rms_norm_eps"] = (2.0 * config["rms_norm_eps"].as_f64().unwrap()).into();
    other.write("config.json", config.to_string().as_bytes());
    let flags = [&STEPS[..], &["--steps", "1", "--dp", "2"]].concat();
    for output in ranks_of_torchrun_in([&one, &other], [&flags, &flags]) {
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && stderr.contains("`config.json of --model` is "), "{stderr}");
    }
}

/// Ranks whose files or flags differ would not make as many steps, or other ones: found out before the first.
#[test]
fn ranks_that_are_given_something_else_are_refused() {
    let directory = prepared();
    let (data, eval) = ("in:data.jsonl", "in:eval.jsonl");
    let flags =
        |data, eval| ["--data", data, "--eval", eval, "--seq", "64", "--batch", "4", "--steps", "1", "--dp", "2"];
    let other_seed = [&flags(data, eval)[..], &["--seed", "1"]].concat();
    for (other, what) in [
        (&flags(eval, eval)[..], "`rows of --data` is "),
        (&flags(data, data), "`rows of --eval` is "),
        (&other_seed, "`--seed` is 1 on rank 1"),
        (
            &[&flags(data, eval)[..], &["--lr", "1e-3"]].concat(),
            "`--lr` is 0.001 on rank 1 of group `world`, and 0.00005 on",
        ),
    ] {
        for output in ranks_of_torchrun(&directory, [&flags(data, eval), other]) {
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{stderr}");
            let said: Vec<&str> = stderr.lines().filter(|line| line.starts_with("finetune: ")).collect();
            assert!(said.len() == 1 && said[0].contains(what), "{what}: {stderr}");
        }
    }
}

#[test]
fn ranks_of_a_launcher_have_the_losses_of_threads() {
    let directory = prepared();
    let flags = ["--batch", "4", "--steps", "2", "--tp", "2"];
    let threads = numbers(&trained(&directory, &flags), "losses");
    fs::remove_file(directory.path().join("outcome.json")).unwrap();
    let usual = ["--data", "in:data.jsonl", "--seq", "64", "--lr", "1e-3", "--json", "in:outcome.json"];
    let flags = [&usual[..], &flags].concat();
    let outputs = ranks_of_torchrun(&directory, [&flags, &flags]);
    for output in &outputs {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    // The first alone tells what came of it.
    assert!(!outputs[0].stdout.is_empty() && outputs[1].stdout.is_empty());
    same(&threads, &losses(&directory), 1e-6, &"env");
}

#[cfg(feature = "mpi")]
#[test]
fn ranks_of_mpirun_have_the_losses_of_threads() {
    let Ok(version) = Command::new("mpirun").arg("--version").output() else {
        println!("SKIPPED, not passed: there is no mpirun on this machine");
        return;
    };
    let directory = prepared();
    let flags = ["--batch", "4", "--steps", "2", "--pp", "2"];
    let threads = numbers(&trained(&directory, &flags), "losses");
    fs::remove_file(directory.path().join("outcome.json")).unwrap();
    let usual = ["--data", "in:data.jsonl", "--seq", "64", "--lr", "1e-3", "--json", "in:outcome.json"];
    let program = command(&directory, &[&usual[..], &flags].concat());
    let mut mpirun = Command::new("mpirun");
    if String::from_utf8_lossy(&version.stdout).contains("Open MPI") {
        mpirun.args(["--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]);
    }
    let output = mpirun.args(["-n", "2"]).arg(program.get_program()).args(program.get_args()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    same(&threads, &losses(&directory), 1e-6, &"mpi");
}

/// A run in the background, when its first checkpoints are there.
fn running(directory: &Directory, saved: &str, flags: &[&str]) -> Child {
    running_in(directory, saved, &[&STEPS[..], flags].concat())
}

/// The same with all flags but those of saving.
fn running_in(directory: &Directory, saved: &str, flags: &[&str]) -> Child {
    let place = format!("in:{saved}");
    let more = ["--save", &place, "--resume", &place, "--save-every", "2", "--json", "in:outcome.json"];
    let mut command = command(directory, &[&more[..], flags].concat());
    let mut run = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let checkpoint = directory.path().join(saved).join("checkpoints/step-000000004");
    while !checkpoint.exists() {
        std::thread::sleep(Duration::from_millis(1));
        assert!(run.try_wait().unwrap().is_none(), "it was to be disturbed");
    }
    run
}

fn send(signal: &str, process: &str) {
    assert!(Command::new("kill").args([signal, process]).status().unwrap().success());
}

fn whole(directory: &Directory, steps: &str) -> Vec<f64> {
    numbers(&trained(directory, &["--lr", "5e-5", "--batch", "8", "--steps", steps]), "losses")
}

/// A rank is killed: the others go on from the last checkpoint, with the same losses.
#[cfg(target_os = "linux")]
#[test]
fn ranks_that_are_lost_are_started_again_or_left_out() {
    let directory = prepared();
    let expected = whole(&directory, "16");
    let flags = ["--steps", "16", "--dp", "2", "--launch", "processes", "--restarts", "1", "--min-ranks", "1"];
    let run = running(&directory, "lost", &flags);
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", run.id())).unwrap();
    send("-9", children.split_whitespace().next_back().unwrap());
    let output = run.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("restart 1 of 1: 1 ranks are started, of 2 before"), "{stderr}");
    assert!(stderr.contains("goes on after step") && stderr.contains("on 1 rank"), "{stderr}");
    same(&expected, &losses(&directory), 1e-5, &"lost");
    assert!(directory.path().join("lost/model/model.safetensors").exists());
}

/// A tied embedding, which the first stage and the last hold: each goes on with its moments after a kill, on the same
/// mesh to the bit.
#[cfg(unix)]
#[test]
fn a_tied_model_that_is_killed_goes_on_on_any_mesh() {
    let directory = prepared_with("qwen2_tied");
    let flags = ["--data", "in:data.jsonl", "--seq", "64", "--batch", "2", "--steps", "10", "--lr", "1e-3"];
    let pipeline = [&flags[..], &["--pp", "2"]].concat();
    let expected = numbers(&trained(&directory, &pipeline), "losses");
    let run = running_in(&directory, "tied", &pipeline);
    send("-9", &run.id().to_string());
    run.wait_with_output().unwrap();
    let saved = directory.path().join("tied");
    assert!(!saved.join("model").exists() && last(&saved) < 10);
    for (mesh, within) in
        [(&["--pp", "2"][..], 0.0), (&["--dp", "2", "--zero", "1"], 1e-5), (&["--pp", "2", "--tp", "2"], 1e-5)]
    {
        let gone_on = trained(&directory, &[&flags[..], &["--resume", "in:tied"], mesh].concat());
        same(&expected, &numbers(&gone_on, "losses"), within, &mesh);
    }
}

/// A signal that asks for the end: all ranks save the same step and end, with the exit code that says so.
#[cfg(unix)]
#[test]
fn a_run_that_is_asked_to_end_saves_and_ends() {
    let directory = prepared();
    let expected = whole(&directory, "24");
    let run = running(&directory, "asked", &["--steps", "24", "--dp", "2"]);
    send("-TERM", &run.id().to_string());
    let output = run.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(143), "{stderr}");
    assert!(stderr.contains("finetune: SIGTERM ends the run after step"), "{stderr}");
    let saved = directory.path().join("asked");
    assert!(!saved.join("model").exists() && last(&saved) < 24, "{stderr}");
    let resumed: Value =
        trained(&directory, &["--lr", "5e-5", "--batch", "8", "--steps", "24", "--resume", "in:asked"]);
    same(&expected, &numbers(&resumed, "losses"), 1e-5, &"asked");
}

/// The last step that was saved.
fn last(saved: &Path) -> usize {
    let names = fs::read_dir(saved.join("checkpoints")).unwrap().map(|it| it.unwrap().file_name());
    names.map(|name| name.to_str().unwrap().trim_start_matches("step-").parse().unwrap()).max().unwrap()
}
