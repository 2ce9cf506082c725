//! Signals that ask a run to end: all ranks hear of one at the same step.
#![cfg(unix)]

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use burn_parallel::launch::{self, StopSignals};
use burn_parallel::prelude::*;

const CASE: &str = "BURN_PARALLEL_TEST_STOP";

fn raise(signal: i32) {
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::raise(signal) }, 0);
}

/// The step at which each rank of three hears of a signal that comes in step 2 to one of them.
fn hears(signal: i32) -> Vec<Option<(usize, String)>> {
    let run = |world: Rank| {
        let mut signals = StopSignals::listen(&world)?;
        for step in 0..10 {
            if world.rank() == 1 && step == 2 {
                raise(signal);
            }
            if let Some(signal) = signals.asked()? {
                return Ok(Some((step, signal.to_string())));
            }
        }
        Ok(None)
    };
    launch::threads(3).run(run).unwrap()
}

/// Run by the test in a process of its own: signals are the process's.
#[test]
#[ignore = "a helper of the other test"]
fn one_case() {
    if std::env::var_os(CASE).is_none() {
        return;
    }
    for (signal, name) in [(libc::SIGTERM, "SIGTERM"), (libc::SIGUSR1, "SIGUSR1")] {
        let heard = hears(signal);
        let (step, _) = heard[0].clone().unwrap();
        assert!((2..=3).contains(&step), "{heard:?}");
        assert_eq!(heard, vec![Some((step, name.to_owned())); 3]);
    }
    // What was heard is over with those who listened; a world that is asked nothing goes on.
    assert_eq!(hears(libc::SIGCONT), [None, None, None]);
    println!("<all well>");
    // Nobody listens: it does what it does.
    raise(libc::SIGTERM);
    println!("<still there>");
}

#[test]
fn all_ranks_hear_of_a_signal_at_one_step() {
    let mut helper = Command::new(std::env::current_exe().unwrap());
    helper.args(["--exact", "launch::stop::one_case", "--ignored", "--nocapture"]).env(CASE, "1");
    let output = helper.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(out.contains("<all well>") && !out.contains("<still there>"), "{out} {err}");
    assert_eq!(output.status.signal(), Some(libc::SIGTERM), "{out} {err}");
}
