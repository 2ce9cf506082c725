//! NCCL: on a machine with a GPU what ranks do with device tensors is right; on every other, what is missing is told,
//! and over stand-ins for libcuda and libnccl the library makes the calls it should.
//!
//! Without a C compiler what needs the stand-ins is reported as ignored.

#[path = "../common"]
mod common {
    pub mod failing;
}
#[path = "../common/transport_suite/mod.rs"]
mod transport_suite;

mod ends;
mod library;
mod missing;
mod stand_ins;
mod suite;
mod train_lm;

use std::process::ExitCode;

use libtest_mimic::Arguments;

use crate::stand_ins::StandIns;

fn main() -> ExitCode {
    // A process that one of the cases below has started.
    if let Some(code) = ends::role().or_else(missing::role).or_else(suite::role) {
        return code;
    }
    let arguments = Arguments::from_args();
    let (answering, joining) = (StandIns::build("gpu.c"), StandIns::build("nccl.c"));
    for why in [&answering, &joining].into_iter().filter_map(|built| built.as_ref().err()) {
        println!("stand-ins cannot be built, their cases are ignored: {why}");
    }
    let trials = [ends::trials(&joining), missing::trials(&answering), train_lm::trials(&answering)];
    let together = libtest_mimic::run(&arguments, trials.into_iter().flatten().collect());

    // NCCL takes one test at a time, and some checks of the suite have short time-outs.
    common::failing::hide_panics_on_purpose();
    let trials = [suite::trials(&joining), library::trials()];
    let alone =
        libtest_mimic::run(&Arguments { test_threads: Some(1), ..arguments }, trials.into_iter().flatten().collect());
    if together.has_failed() || alone.has_failed() { ExitCode::from(101) } else { ExitCode::SUCCESS }
}
