//! The transport suite of the host's data, failures included, through NCCL's communicator: it passes on what it does
//! not carry, and its ends, its watchdog and its answers are in nobody's way.
//!
//! Over a stand-in for libcuda and libnccl (`nccl.c`) whose communicators carry nothing; what NCCL carries is tested in
//! `library.rs`, where there is a GPU.

use std::process::ExitCode;

use libtest_mimic::{Failed, Trial};

use crate::common::failing::hide_panics_on_purpose;
use crate::stand_ins::{Built, StandIns};
use crate::transport_suite::{self, over_nccl};

/// Set in the process of a case: the number of ranks.
const ROLE: &str = "BURN_PARALLEL_TEST_SUITE";

/// What happens in the process of a case.
pub fn role() -> Option<ExitCode> {
    std::env::var(ROLE).ok().map(|size| ranks(size.parse().unwrap()))
}

pub fn trials(built: &Built) -> Vec<Trial> {
    let trial = |size: usize| {
        let here = built.clone();
        let test = move || case(size, &*here?);
        Trial::test(format!("the suite on {size} ranks"), test).with_ignored_flag(built.is_err())
    };
    (1..=4).map(trial).collect()
}

fn ranks(size: usize) -> ExitCode {
    hide_panics_on_purpose();
    let counts = over_nccl::run(size, size, |engine| {
        let first = engine.is_first();
        transport_suite::run(engine, &|name| {
            if first {
                println!("{name}");
            }
        })
    });
    let expected = if size == 1 { 13 } else { 21 };
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
