//! The transport suite of the host's data, failures included, through NCCL's communicator: it passes on what it does not carry,
//! and its ends, its keeper and its answers are in nobody's way.
//!
//! Over a stand-in for libcuda and libnccl (`stand_ins/nccl.c`) whose communicators carry nothing; what NCCL carries is tested in
//! `nccl.rs`, where there is a GPU. Without a C compiler the cases are reported as ignored.

mod stand_ins;
mod transport_suite;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};

use crate::stand_ins::StandIns;
use crate::transport_suite::{failures, over_nccl};

/// Set in the process of a case: the number of ranks.
const ROLE: &str = "BURN_PARALLEL_TEST_ROLE";

fn main() -> ExitCode {
    if let Ok(size) = std::env::var(ROLE) {
        return ranks(size.parse().unwrap());
    }
    let built = StandIns::build("nccl.c").map(Arc::new);
    if let Err(why) = &built {
        println!("the stand-in cannot be built, the cases are ignored: {why}");
    }
    let trial = |size: usize| {
        let here = built.clone();
        let test = move || case(size, &*here?);
        Trial::test(format!("{size} ranks"), test).with_ignored_flag(built.is_err())
    };
    // Some checks have short time-outs.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let conclusion = libtest_mimic::run(&arguments, (1..=4).map(trial).collect());
    drop(built);
    conclusion.exit_code()
}

fn ranks(size: usize) -> ExitCode {
    failures::hide_panics_on_purpose();
    let counts = over_nccl::run(size, size, |engine| {
        let first = engine.is_first();
        transport_suite::run(engine, &|name| {
            if first {
                println!("{name}");
            }
        })
    });
    let expected = if size == 1 { 12 } else { 20 };
    match counts == vec![Some(expected); size] {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn case(size: usize, stand_ins: &StandIns) -> Result<(), Failed> {
    let output = stand_ins.again(size)?.env(ROLE, size.to_string()).output()?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            Err(format!("{}: {}{}", output.status, said(&output.stdout), said(&output.stderr)).into())
        }
    }
}
