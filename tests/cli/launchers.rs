//! Runs whose ranks other launchers start again: they go on from the last checkpoint, and end with the losses of an
//! undisturbed run.
#![cfg(target_os = "linux")]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::common::ports::free_port;
use crate::train_lm::{Folder, TINY, example, json, losses, losses_in, same_losses, send};

const STEPS: [&str; 4] = ["--steps", "60", "--batch", "8"];
/// A launcher and all that it waits for take no longer.
const TIME_OUT: Duration = Duration::from_secs(120);

/// What a run is told that may be started again.
fn flags(saved: &str, outcome: &str) -> Vec<String> {
    let again =
        ["--save", saved, "--resume", saved, "--save-every", "2", "--dp", "2", "--launch", "env", "--json", outcome];
    [&TINY[..], &STEPS, &again].concat().into_iter().map(String::from).collect()
}

/// Waits for a checkpoint of a run that is to be disturbed.
fn wait_for(saved: &str, step: &str, run: &mut Child) {
    let began = Instant::now();
    while !Path::new(saved).join(step).exists() {
        std::thread::sleep(Duration::from_millis(1));
        assert!(run.try_wait().unwrap().is_none() && began.elapsed() < TIME_OUT, "{step} does not come");
    }
}

/// How often a run went on from a checkpoint that a run before had left.
fn restored(stderr: &str) -> usize {
    stderr.matches("goes on after step ").count() - stderr.matches("goes on after step 0 ").count()
}

/// Processes that a process has started, whichever of its threads did, in the order of their numbers.
fn children(process: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let lists = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("children")).unwrap_or_default());
    let mut all: Vec<u32> =
        lists.flat_map(|list| list.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<_>>()).collect();
    all.sort_unstable();
    all
}

/// The so many ranks of a job that was requeued so often.
fn slurm((requeued, ranks): (usize, usize), job: u64, flags: &[String]) -> Vec<Child> {
    let start = |rank: usize| {
        let mut command = Command::new(example());
        command.args(flags).env("SLURM_JOB_ID", job.to_string()).env("SLURM_STEP_NODELIST", "127.0.0.1");
        command.env("SLURM_PROCID", rank.to_string()).env("SLURM_LOCALID", rank.to_string());
        command.env("SLURM_NTASKS", ranks.to_string());
        if requeued > 0 {
            command.env("SLURM_RESTART_COUNT", requeued.to_string());
        }
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    (0..ranks).map(start).collect()
}

/// As `srun` starts ranks, and again in a job that is requeued, which may get fewer nodes: a rank is killed, the other
/// ends with an error that names it.
#[test]
fn a_job_of_slurm_that_is_requeued_goes_on() {
    let folder = Folder::new("slurm");
    let whole = losses(&json(&folder, &[&STEPS[..], &["--dp", "2"]].concat()));
    for left in [2, 1] {
        let (saved, outcome) = (folder.path(&format!("saved{left}")), folder.path(&format!("again{left}.json")));
        let mut flags = flags(&saved, &outcome);
        flags.extend(["--min-ranks".into(), left.to_string()]);
        // Slurm's ranks meet at a port made of the number of the job: one below those that the system gives away.
        let first = u64::from(std::process::id());
        let port = |job: u64| 20_000 + (job % 20_000) as u16;
        let free = |job: &u64| port(*job) < 32_000 && TcpListener::bind(("127.0.0.1", port(*job))).is_ok();
        let job = (first..first + 20_000).find(free).unwrap();

        let mut ranks = slurm((0, 2), job, &flags);
        wait_for(&saved, "step-000000004", &mut ranks[0]);
        ranks[1].kill().unwrap();
        let mut ended = ranks.into_iter().map(|rank| rank.wait_with_output().unwrap());
        let (survivor, _) = (ended.next().unwrap(), ended.next().unwrap());
        let stderr = String::from_utf8_lossy(&survivor.stderr);
        assert!(survivor.status.code() == Some(1) && stderr.contains("rank 1"), "{stderr}");
        assert!(!Path::new(&outcome).exists());

        for (rank, done) in slurm((1, left), job, &flags).into_iter().enumerate() {
            let output = done.wait_with_output().unwrap();
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{stderr}");
            assert_eq!(restored(&stderr), usize::from(rank == 0), "{stderr}");
        }
        same_losses(&whole, &losses_in(&outcome), 1e-5);
    }
}

/// `torchrun` of the Python that `BURN_PARALLEL_PYTHON` names.
fn torchrun(arguments: &[&str], flags: &[String]) -> Child {
    let python = std::env::var_os("BURN_PARALLEL_PYTHON").expect("BURN_PARALLEL_PYTHON names no Python");
    let mut command = Command::new(python);
    command.args(["-m", "torch.distributed.run", "--no-python", "--nproc-per-node", "2"]).args(arguments);
    command.arg(example()).args(flags).env("OMP_NUM_THREADS", "1");
    command.env_remove("OPENBLAS_CORETYPE").env_remove("OPENBLAS_L2_SIZE");
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn ended(run: Child) -> (Output, String) {
    let output = run.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, stderr)
}

/// torchrun starts all ranks again when one is killed, twice here, and they go on.
#[test]
#[ignore = "needs a Python with torch, which BURN_PARALLEL_PYTHON names"]
fn torchrun_starts_lost_ranks_again() {
    let folder = Folder::new("torchrun");
    let whole = losses(&json(&folder, &[&STEPS[..], &["--dp", "2"]].concat()));
    let (saved, outcome) = (folder.path("saved"), folder.path("again.json"));
    let mut run = torchrun(&["--standalone", "--max-restarts", "2"], &flags(&saved, &outcome));
    let mut before = Vec::new();
    for step in ["step-000000004", "step-000000020"] {
        wait_for(&saved, step, &mut run);
        let ranks = children(run.id());
        let ranks: Vec<u32> = ranks.into_iter().filter(|rank| !before.contains(rank)).collect();
        send("-9", &ranks.last().unwrap().to_string());
        before.extend(ranks);
    }
    let (output, stderr) = ended(run);
    assert!(output.status.success(), "{stderr}");
    assert_eq!((restored(&stderr), stderr.matches("(exitcode: -9)").count()), (2, 2), "{stderr}");
    assert!(stderr.contains("has lost rank 1"), "{stderr}");
    same_losses(&whole, &losses_in(&outcome), 1e-5);
}

/// A node is lost, torchrun's own process on it and all of its ranks: the one that is left starts its ranks again,
/// fewer, and they go on from the last checkpoint, with the same batches.
#[test]
#[ignore = "needs a Python with torch, which BURN_PARALLEL_PYTHON names"]
fn torchrun_goes_on_with_fewer_nodes() {
    let folder = Folder::new("torchrun-nodes");
    let whole = losses(&json(&folder, &[&STEPS[..], &["--dp", "4"]].concat()));
    let (saved, outcome) = (folder.path("saved"), folder.path("again.json"));
    let mut flags = flags(&saved, &outcome);
    let ranks = flags.iter().position(|flag| flag == "--dp").unwrap() + 1;
    flags[ranks] = "4".into();
    flags.extend(["--min-ranks".into(), "2".into()]);
    let port = free_port();
    let endpoint = format!("127.0.0.1:{port}");
    // Nodes that say nothing for two seconds are lost; nobody is waited for longer than a second.
    let node = |host: bool| {
        let conf = "join_timeout=60,last_call_timeout=1,close_timeout=5,heartbeat_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2";
        let conf = format!("{conf},is_host={}", u8::from(host));
        let id = format!("nodes-{}", std::process::id());
        let more = ["--nnodes", "1:2", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", &id];
        torchrun(&[&more[..], &["--rdzv-endpoint", &endpoint, "--rdzv-conf", &conf]].concat(), &flags)
    };
    let (mut first, mut second) = (node(true), node(false));
    wait_for(&saved, "step-000000004", &mut first);
    let lost: Vec<u32> = children(second.id()).into_iter().chain([second.id()]).collect();
    for process in lost.into_iter().rev() {
        send("-9", &process.to_string());
    }
    second.wait().unwrap();
    let (output, stderr) = ended(first);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("goes on after step") && stderr.contains("on 2 ranks"), "{stderr}");
    same_losses(&whole, &losses_in(&outcome), 1e-5);
}

/// torchrun hands on the signal by which it is asked to end: the ranks save the same step, and the next run goes on
/// from there.
#[test]
#[ignore = "needs a Python with torch, which BURN_PARALLEL_PYTHON names"]
fn torchrun_is_asked_to_end() {
    let folder = Folder::new("torchrun-asked");
    let whole = losses(&json(&folder, &[&STEPS[..], &["--dp", "2"]].concat()));
    let (saved, outcome) = (folder.path("saved"), folder.path("again.json"));
    let mut run = torchrun(&["--standalone", "--max-restarts", "2"], &flags(&saved, &outcome));
    wait_for(&saved, "step-000000004", &mut run);
    send("-TERM", &run.id().to_string());
    let (output, stderr) = ended(run);
    assert!(!output.status.success() && stderr.contains("SIGTERM ends the run after step"), "{stderr}");
    assert_eq!(restored(&stderr), 0, "{stderr}");
    let (output, stderr) = ended(torchrun(&["--standalone"], &flags(&saved, &outcome)));
    assert!(output.status.success() && restored(&stderr) == 1, "{stderr}");
    same_losses(&whole, &losses_in(&outcome), 1e-5);
}
