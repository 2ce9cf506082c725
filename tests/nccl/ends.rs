//! How NCCL's communicators are ended: when they are dropped, when a rank is lost, when NCCL reports an error, when it
//! does not answer.
//!
//! Over a stand-in for libcuda and libnccl (`nccl.c`) whose communicators carry
//! nothing: this shows which calls the library makes and when, and nothing of a GPU. Each case is a process of its own.

use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use burn_parallel::comm::nccl;
use burn_parallel::prelude::*;
use libtest_mimic::{Failed, Trial};

use crate::stand_ins::{Built, StandIns};

/// Set in the process of a case: what happens in it.
const ROLE: &str = "BURN_PARALLEL_TEST_END";
const TIMEOUT: Duration = Duration::from_millis(1500);

struct Case {
    name: &'static str,
    settings: &'static [(&'static str, &'static str)],
    run: fn(Rank) -> Result<(), Error>,
    /// What must be said, how often, and until when.
    said: &'static [(&'static str, usize)],
}

/// A line that a rank says when it looks up again.
const LATER: &str = "rank 0 looks up";

const CASES: [Case; 6] = [
    Case {
        name: "communicators that are dropped end in order, before the rank leaves",
        settings: &[],
        run: dropped,
        said: &[
            ("finalize of rank 0", 2),
            ("finalize of rank 1", 2),
            ("destroy of rank", 4),
            ("abort", 0),
            ("well", 1),
        ],
    },
    Case {
        name: "those that peers keep are aborted after the time-out, and nobody waits for that",
        settings: &[("STAND_IN_NEVER_LEAVES", "1")],
        run: dropped,
        said: &[
            ("finalize of rank", 4),
            ("abort of rank", 4),
            ("destroy", 0),
            ("the drop took no time", 2),
            ("well", 1),
        ],
    },
    Case {
        name: "a lost rank ends all groups of the others while they are busy",
        settings: &[],
        run: lost,
        said: &[
            ("abort of rank 0", 2),
            ("aborted before rank 0 looked up", 2),
            ("failed: rank 1 failed: on purpose", 1),
        ],
    },
    Case {
        name: "an error that NCCL reports in the background fails the world in NCCL's words",
        settings: &[("STAND_IN_FAILS_AFTER_MS", "400")],
        run: waiting,
        said: &[("remote error, says the stand-in: peer 1 is gone", 1), ("abort of rank", 2), ("NCCL_DEBUG=INFO", 1)],
    },
    Case {
        name: "a group that is never joined",
        settings: &[("STAND_IN_NEVER_JOINS", "1")],
        run: waiting,
        said: &[("in joining the group: no answer in 1.", 1), ("a rank has not come", 1), ("abort of rank", 2)],
    },
    Case {
        name: "an abort",
        settings: &[],
        run: aborting,
        said: &[("abort of rank", 2), ("aborted the run: the loss is NaN", 1), ("destroy", 0)],
    },
];

/// Groups are made, divided, and dropped.
fn dropped(rank: Rank) -> Result<(), Error> {
    let comm = nccl::join(&rank, rank.rank())?;
    let part = comm.split(0, 0)?;
    assert_eq!(comm.all_reduce(vec![1.0f32], ReduceOp::Sum)?, [2.0]);
    assert_eq!(part.all_reduce(vec![1.0f32], ReduceOp::Sum)?, [2.0]);
    rank.barrier()?;
    let began = Instant::now();
    drop((comm, part));
    if began.elapsed() < TIMEOUT / 2 {
        println!("the drop took no time");
    }
    rank.barrier()
}

/// Rank 1 fails while rank 0 computes, or waits for the device.
fn lost(rank: Rank) -> Result<(), Error> {
    let comm = nccl::join(&rank, rank.rank())?;
    let part = comm.split(0, 0)?;
    rank.barrier()?;
    if rank.rank() == 1 {
        return Err(Error::user("on purpose"));
    }
    sleep(Duration::from_millis(1200));
    println!("{LATER}");
    part.barrier()
}

fn waiting(rank: Rank) -> Result<(), Error> {
    let comm = nccl::join(&rank, rank.rank())?;
    comm.recv::<Vec<f32>>(1 - rank.rank(), 7).map(drop)
}

fn aborting(rank: Rank) -> Result<(), Error> {
    let comm = nccl::join(&rank, rank.rank())?;
    rank.barrier()?;
    if rank.rank() == 0 {
        comm.abort("the loss is NaN");
    }
    comm.recv::<Vec<f32>>(1 - rank.rank(), 7).map(drop)
}

/// What happens in the process of a case.
pub fn role() -> Option<ExitCode> {
    let role = std::env::var(ROLE).ok()?;
    let case = CASES.iter().find(|case| case.name == role).unwrap();
    match launch::threads(2).timeout(TIMEOUT).run(case.run) {
        Ok(_) => println!("well"),
        Err(error) => println!("failed: {error}"),
    }
    // The watchdog may still be at work.
    sleep(Duration::from_secs(1));
    Some(ExitCode::SUCCESS)
}

pub fn trials(built: &Built) -> Vec<Trial> {
    let trial = |case: &'static Case| {
        let here = built.clone();
        let test = move || run(case, &*here?);
        Trial::test(case.name, test).with_ignored_flag(built.is_err())
    };
    CASES.iter().map(trial).collect()
}

fn run(case: &Case, stand_ins: &StandIns) -> Result<(), Failed> {
    let output = stand_ins.again(2)?.env(ROLE, case.name).envs(case.settings.iter().copied()).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let whole = format!("{said}{}", String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        return Err(format!("{}: {whole}", output.status).into());
    }
    for (words, times) in case.said {
        let found = match *words {
            "aborted before rank 0 looked up" => {
                let before = said.split(LATER).next().filter(|before| before.len() < said.len()).unwrap_or_default();
                before.matches("abort of rank 0").count()
            }
            words => said.matches(words).count(),
        };
        if found != *times {
            return Err(format!("`{words}` {found} times instead of {times}: {whole}").into());
        }
    }
    Ok(())
}
