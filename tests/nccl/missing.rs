//! What users are told where a part of CUDA or NCCL is missing, too old or not enough, before any of it is touched.
//!
//! Stand-ins for libcuda and libnccl (`gpu.c`) answer the questions after versions and devices, and nothing else: this
//! shows the checks and their words, and nothing of a GPU. Each case is a process of its own, for a library is loaded
//! once.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use burn_parallel::comm::nccl;
use burn_parallel::prelude::*;
use libtest_mimic::{Failed, Trial};

use crate::stand_ins::{Built, StandIns};

/// Set in the process of a case: by rank, the device that it brings.
const ROLE: &str = "BURN_PARALLEL_TEST_DEVICES";

/// Which libraries there are.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Libraries {
    None,
    Cuda,
    /// NCCL under the only name by which packages ship it.
    CudaAndVersionedNccl,
    Both,
}

struct Case {
    name: &'static str,
    libraries: Libraries,
    settings: &'static [(&'static str, &'static str)],
    devices: &'static str,
    /// What each rank's error says, or the last of these if there are more ranks.
    words: &'static [&'static str],
}

const CASES: [Case; 12] = [
    Case {
        name: "no libcuda",
        libraries: Libraries::None,
        settings: &[],
        devices: "0 0",
        words: &["libcuda was not found: install NVIDIA's driver"],
    },
    Case {
        name: "a driver without a GPU",
        libraries: Libraries::Both,
        settings: &[("STAND_IN_INIT", "100")],
        devices: "0 0",
        words: &["libcuda cannot be used (DriverError(CUDA_ERROR_NO_DEVICE"],
    },
    Case {
        name: "a driver too old for the library",
        libraries: Libraries::Both,
        settings: &[("STAND_IN_INIT", "803")],
        devices: "0",
        words: &["libcuda cannot be used (DriverError(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"],
    },
    Case {
        name: "an old driver",
        libraries: Libraries::Both,
        settings: &[("STAND_IN_DRIVER", "10020")],
        devices: "0 0",
        words: &["the driver is too old: it does CUDA 10.2, 11.2 or newer is needed"],
    },
    Case {
        name: "no device is visible",
        libraries: Libraries::Both,
        settings: &[("STAND_IN_DEVICES", "0")],
        devices: "0",
        words: &["sees no CUDA device: check CUDA_VISIBLE_DEVICES"],
    },
    Case {
        name: "no libnccl",
        libraries: Libraries::Cuda,
        settings: &[],
        devices: "0 0",
        words: &["libnccl.so was not found: install NCCL"],
    },
    Case {
        name: "libnccl.so.2 only",
        libraries: Libraries::CudaAndVersionedNccl,
        settings: &[],
        devices: "0",
        words: &["ship libnccl.so.2 only; a link of the name libnccl.so to it"],
    },
    Case {
        name: "an old NCCL",
        libraries: Libraries::Both,
        settings: &[("STAND_IN_NCCL", "21705")],
        devices: "0 0",
        words: &["NCCL 2.17.5 is too old: version 2.18.0 or newer is needed"],
    },
    Case {
        name: "a device that does not exist, on one rank",
        libraries: Libraries::Both,
        settings: &[("STAND_IN_DEVICES", "2")],
        devices: "0 2 1",
        words: &[
            "rank 1 of group `world` cannot use NCCL",
            "there is no CUDA device 2: this process sees 2, counted from 0",
            "rank 1 of group `world` cannot use NCCL",
        ],
    },
    Case {
        name: "two ranks on one GPU, NCCL 2.28",
        libraries: Libraries::Both,
        settings: &[("STAND_IN_DEVICES", "2"), ("NCCL_MULTI_RANK_GPU_ENABLE", "1")],
        devices: "0 1 1",
        words: &["ranks 1 and 2 of group `world` bring the same GPU, which NCCL 2.28.9 refuses"],
    },
    Case {
        name: "two ranks on one GPU, NCCL 2.30, not asked for",
        libraries: Libraries::Both,
        settings: &[("STAND_IN_NCCL", "23007")],
        devices: "0 0",
        words: &["bring the same GPU, which NCCL 2.30.7 refuses", "set NCCL_MULTI_RANK_GPU_ENABLE=1"],
    },
    Case {
        name: "two ranks on one GPU, NCCL 2.30, switched off",
        libraries: Libraries::Both,
        settings: &[("STAND_IN_NCCL", "23007"), ("NCCL_MULTI_RANK_GPU_ENABLE", "0")],
        devices: "0 0",
        words: &["bring the same GPU, which NCCL 2.30.7 refuses"],
    },
];

/// What happens in the process of a case.
pub fn role() -> Option<ExitCode> {
    join(&std::env::var(ROLE).ok()?);
    Some(ExitCode::SUCCESS)
}

pub fn trials(built: &Built) -> Vec<Trial> {
    // Where there is a driver, it cannot be hidden.
    let real = nccl::devices().map_or_else(|error| !error.to_string().contains("libcuda was not found"), |_| true);
    let trial = |case: &'static Case| {
        let here = built.clone();
        let ignored = built.is_err() || real && case.libraries != Libraries::Both;
        Trial::test(case.name, move || run(case, &*here?)).with_ignored_flag(ignored)
    };
    CASES.iter().map(trial).collect()
}

/// The ranks of a case: each prints its error on a line of its own.
fn join(devices: &str) {
    let devices: Vec<usize> = devices.split(' ').map(|device| device.parse().unwrap()).collect();
    let began = Instant::now();
    let said = launch::threads(devices.len()).timeout(Duration::from_secs(20)).run(|rank| {
        let error = nccl::join(&rank, devices[rank.rank()]).map(drop).expect_err("something is missing");
        assert!(matches!(error, Error::Gpu { .. }), "{error:?}");
        // The communicator below goes on working.
        rank.barrier()?;
        Ok(error.to_string())
    });
    for line in said.unwrap() {
        println!("said: {line}");
    }
    assert!(began.elapsed() < Duration::from_secs(10), "a rank waited");
}

fn run(case: &Case, stand_ins: &StandIns) -> Result<(), Failed> {
    let parts: &[&str] = match case.libraries {
        Libraries::None => &[],
        Libraries::Cuda => &["cuda"],
        Libraries::CudaAndVersionedNccl => &["cuda", "versioned"],
        Libraries::Both => &["cuda", "nccl"],
    };
    let output = Command::new(std::env::current_exe()?)
        .env("LD_LIBRARY_PATH", stand_ins.only(parts))
        .env(ROLE, case.devices)
        .env_remove("NCCL_MULTI_RANK_GPU_ENABLE")
        .envs(case.settings.iter().copied())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let whole = || format!("{said}{}", String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        return Err(format!("{}: {}", output.status, whole()).into());
    }
    let lines: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("said: ")).collect();
    let ranks = case.devices.split(' ').count();
    if lines.len() != ranks {
        return Err(format!("{} ranks spoke: {}", lines.len(), whole()).into());
    }
    for (rank, line) in lines.iter().enumerate() {
        let words = case.words[rank.min(case.words.len() - 1)];
        if !line.contains(words) {
            return Err(format!("rank {rank} did not say `{words}` but: {line}").into());
        }
    }
    Ok(())
}
