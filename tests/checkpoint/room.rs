//! A disk that is full, a directory that may not be written to, one that vanishes: an error on all ranks, and training
//! goes on.
//!
//! Limits and users are of a process: each case runs in one of its own.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;
use burn_parallel::train::Parallel;

use crate::Dir;
use crate::common::reference::{optimizer, values};
use crate::net::{Axes, Net, train};

const CASE: &str = "BURN_PARALLEL_TEST_CASE";
const DIR: &str = "BURN_PARALLEL_TEST_DIR";

/// Files may have so many bytes: the next write beyond fails, as on a disk that is full.
fn limit(bytes: u64) {
    let limit = |bytes| {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the structure lives as long as the calls.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit), 0);
            limit.rlim_cur = bytes;
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
        }
    };
    // SAFETY: no handler is put in.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    limit(if bytes == 0 { libc::RLIM_INFINITY } else { bytes });
}

/// Nobody in particular, if this is root, who may do anything; or root again.
fn user(id: u32) {
    // SAFETY: no memory is involved.
    unsafe {
        if libc::getuid() == 0 {
            assert_eq!(libc::seteuid(id), 0);
        }
    }
}

fn break_it(case: &str, root: &Path) {
    match case {
        // The first tensors still fit.
        "full" => limit(4096),
        "forbidden" => {
            fs::set_permissions(root, fs::Permissions::from_mode(0o555)).unwrap();
            user(65_534);
        }
        _ => fs::rename(root, root.with_extension("gone")).unwrap(),
    }
}

fn mend_it(case: &str, root: &Path) {
    match case {
        "full" => limit(0),
        "forbidden" => {
            user(0);
            fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
        }
        _ => fs::rename(root.with_extension("gone"), root).unwrap(),
    }
}

/// On rank 0, while the others wait.
fn alone(world: &Rank, run: impl FnOnce()) -> Result<(), Error> {
    world.barrier()?;
    if world.rank() == 0 {
        run();
    }
    world.barrier()
}

/// Run by the test in a process of its own.
#[test]
#[ignore = "a helper of the other test"]
fn one_case() {
    let (Ok(case), Ok(root)) = (std::env::var(CASE), std::env::var(DIR)) else { return };
    let root = Path::new(&root);
    let net = Net::wide(64);
    let run = |world: Rank| {
        let mut optim = optimizer();
        let (mut model, _) = train(Axes::new(2, 1, 1).wrap(&world, &net)?, &mut optim, (0, 1))?;
        let mut checkpoints = Checkpointer::new(&world, root, CheckpointConfig::new().with_keep_last(1))?;
        let save = |checkpoints: &mut Checkpointer, step, model: &mut Parallel<Net>, optim: &mut _| {
            checkpoints.save(step, TrainState::new(model).with_optimizer("adamw", optim))
        };
        save(&mut checkpoints, 1, &mut model, &mut optim)?;
        let good = values(model.local());
        alone(&world, || break_it(&case, root))?;
        let now = save(&mut checkpoints, 2, &mut model, &mut optim).unwrap_err();
        // In the background as well.
        let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
        let later = checkpoints.save_async(2, state).and_then(|()| checkpoints.wait()).unwrap_err();
        alone(&world, || mend_it(&case, root))?;
        let left: Vec<_> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["step-000000001"]);
        model = train(model, &mut optim, (1, 2))?.0;
        checkpoints.restore(TrainState::new(&mut model))?;
        assert_eq!(values(model.local()), good);
        save(&mut checkpoints, 2, &mut model, &mut optim)?;
        assert_eq!(checkpoints.steps()?, [2]);
        Ok([now, later].map(|error| error.to_string()))
    };
    let errors = launch::threads(2).run(run).unwrap();
    assert_eq!(errors[0], errors[1]);
    println!("<{}>", errors[0].join("; "));
}

#[test]
fn what_cannot_be_written_is_an_error_and_training_goes_on() {
    for (case, words) in [
        ("full", "cannot be written: File too large"),
        ("forbidden", "Permission denied"),
        ("gone", "is not there any more"),
    ] {
        let dir = Dir::fresh();
        let root = dir.path().join("runs");
        let mut helper = Command::new(std::env::current_exe().unwrap());
        helper.args(["--exact", "room::one_case", "--ignored", "--nocapture"]).env(CASE, case).env(DIR, &root);
        let output = helper.output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{case}: {out} {err}");
        assert_eq!(out.matches(words).count(), 2, "{case}: {out}");
        assert!(out.contains("/runs"), "{case}: {out}");
    }
}

/// Run by the test in a process of its own: a checkpoint that is replaced cannot be emptied.
#[test]
#[ignore = "a helper of the other test"]
fn one_that_stays() {
    let Ok(root) = std::env::var(DIR) else { return };
    user(65_534);
    let forbid = || {
        let forbidden = fs::Permissions::from_mode(0o555);
        fs::set_permissions(Path::new(&root).join("step-000000001"), forbidden).unwrap();
    };
    let run = launch::threads(2).run(|world| {
        let mut model = Axes::new(2, 1, 1).wrap(&world, &Net::new())?;
        let mut checkpoints = Checkpointer::new(&world, &root, CheckpointConfig::new())?;
        checkpoints.save(1, TrainState::new(&mut model))?;
        alone(&world, forbid)?;
        checkpoints.save(1, TrainState::new(&mut model))?;
        checkpoints.save(2, TrainState::new(&mut model))?;
        checkpoints.restore_step(1, TrainState::new(&mut model))?;
        checkpoints.steps()
    });
    assert_eq!(run.unwrap(), [[1, 2]; 2]);
    // Under its hidden name.
    assert_eq!(fs::read_dir(&root).unwrap().count(), 3);
}

/// It is there all the same: what is left of the old one is a matter of the log.
#[test]
fn a_checkpoint_is_saved_though_the_one_before_cannot_be_removed() {
    let dir = Dir::fresh();
    let root = dir.path().join("runs");
    fs::create_dir(&root).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o777)).unwrap();
    let mut helper = Command::new(std::env::current_exe().unwrap());
    let output = helper.args(["--exact", "room::one_that_stays", "--ignored"]).env(DIR, &root).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
