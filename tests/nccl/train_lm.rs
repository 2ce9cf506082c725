//! The example `train_lm` on GPUs, as far as it can be seen without one: which GPU each rank takes, and what its user
//! is told.
//!
//! Over stand-ins for libcuda and libnccl (`gpu.c`) that answer questions and do nothing else: an NCCL too old for
//! ranks that share a GPU names those that would. The example must have been built with the same features before.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use burn_parallel::comm::nccl;
use libtest_mimic::{Failed, Trial};

use crate::stand_ins::{Built, StandIns};

/// A model so small that what is not refused at once is seen to be.
const TINY: [&str; 8] = ["--layers", "1", "--d-model", "16", "--seq", "16", "--steps", "1"];

fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(|deps| deps.parent()).unwrap().join("examples").join("train_lm")
}

/// The program on a machine without libraries, or with the stand-ins and so many GPUs.
fn train_lm(stand_ins: Option<(&StandIns, usize)>, flags: &[&str]) -> Command {
    let mut command = Command::new(example());
    command.args(TINY).args(flags).env_remove("NCCL_MULTI_RANK_GPU_ENABLE");
    if let Some((stand_ins, devices)) = stand_ins {
        command.env("LD_LIBRARY_PATH", stand_ins.both()).env("STAND_IN_DEVICES", devices.to_string());
    }
    command
}

/// It ended with this code, and said these words without a panic.
fn says(output: &Output, code: i32, words: &str) -> Result<(), Failed> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    match output.status.code() == Some(code) && stderr.contains(words) && !stderr.contains("panicked") {
        true => Ok(()),
        false => Err(format!("{}, not {code} and `{words}`: {stderr}", output.status).into()),
    }
}

/// No rank waits for another that has nothing to join with.
fn soon(body: impl FnOnce() -> Result<(), Failed>) -> Result<(), Failed> {
    let began = Instant::now();
    body()?;
    match began.elapsed() {
        elapsed if elapsed < Duration::from_secs(20) => Ok(()),
        elapsed => Err(format!("it took {elapsed:.1?}").into()),
    }
}

fn nccl_is_for_nvidias_gpus() -> Result<(), Failed> {
    for flags in [&["--transport", "nccl"][..], &["--transport", "nccl", "--device", "flex"]] {
        says(&train_lm(None, flags).output()?, 2, "--transport nccl joins NVIDIA GPUs: give --device cuda")?;
    }
    Ok(())
}

fn no_driver() -> Result<(), Failed> {
    for flags in [
        &["--device", "cuda"][..],
        &["--device", "cuda", "--launch", "processes"],
        &["--device", "cuda", "--transport", "nccl"],
        &["--device", "cuda", "--transport", "nccl", "--dp", "2", "--tp", "2"],
        &["--device", "cuda", "--transport", "nccl", "--launch", "processes", "--pp", "2", "--micro-batches", "2"],
    ] {
        soon(|| says(&train_lm(None, flags).output()?, 1, "libcuda was not found: install NVIDIA's driver"))?;
    }
    Ok(())
}

/// Ranks take the GPUs of a machine in turns, however the ranks are divided, whatever a launcher's variables say of
/// others.
fn in_turns(here: &StandIns) -> Result<(), Failed> {
    let nccl = ["--device", "cuda", "--transport", "nccl"];
    for (devices, flags, first, second) in [
        (1, &["--ranks", "2"][..], 0, 1),
        (2, &["--dp", "2", "--tp", "2"], 0, 2),
        (3, &["--dp", "2", "--tp", "2"], 0, 3),
        (3, &["--dp", "2", "--tp", "2", "--launch", "processes"], 0, 3),
        (2, &["--ranks", "3", "--launch", "processes"], 0, 2),
    ] {
        let words =
            format!("ranks {first} and {second} of group `world` bring the same GPU, which NCCL 2.28.9 refuses");
        let mut command = train_lm(Some((here, devices)), &[&nccl[..], flags].concat());
        let others = [("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")];
        if !flags.contains(&"processes") {
            command.args(["--launch", "threads"]).envs(others);
        }
        soon(|| says(&command.output()?, 1, &words))?;
    }
    Ok(())
}

/// Under a launcher a rank takes the GPU of its number on the machine.
fn by_the_launchers_number(here: &StandIns) -> Result<(), Failed> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let rank = |rank: &str, local_rank: &str| {
        let mut command = train_lm(Some((here, 4)), &["--device", "cuda", "--transport", "nccl", "--launch", "env"]);
        command.envs([("RANK", rank), ("WORLD_SIZE", "3"), ("LOCAL_RANK", local_rank)]);
        command.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port), ("BURN_PARALLEL_TIMEOUT_S", "15")]);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn()
    };
    // Two that say they are the first of their machine: the stand-in has but one.
    let ranks = [rank("0", "0")?, rank("1", "1")?, rank("2", "0")?];
    for rank in ranks {
        says(&rank.wait_with_output()?, 1, "ranks 0 and 2 of group `world` bring the same GPU")?;
    }
    Ok(())
}

pub fn trials(built: &Built) -> Vec<Trial> {
    // Where there is a driver, it cannot be hidden.
    let real = nccl::devices().map_or_else(|error| !error.to_string().contains("libcuda was not found"), |_| true);
    let over = |name: &str, case: fn(&StandIns) -> Result<(), Failed>| {
        let here = built.clone();
        Trial::test(name, move || case(&*here?)).with_ignored_flag(built.is_err())
    };
    vec![
        Trial::test("nccl_is_for_nvidias_gpus", nccl_is_for_nvidias_gpus),
        Trial::test("no_driver", no_driver).with_ignored_flag(real),
        over("in_turns", in_turns),
        over("by_the_launchers_number", by_the_launchers_number),
    ]
}
