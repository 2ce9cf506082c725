//! The transport suite on processes of MPI, and what becomes of a rank that dies. Without arguments this starts itself
//! under `mpirun`; where there is none it says that it was skipped.

mod transport_suite;

use std::process::{Command, ExitCode};
use std::time::Duration;

use burn_parallel::comm::Communicator;
use burn_parallel::comm::local::WorldConfig;
use burn_parallel::comm::mpi::Session;

use crate::transport_suite::{Engine, failures};

const ROLE: &str = "BURN_PARALLEL_TEST_ROLE";

struct Mpi(Session);

impl Engine for Mpi {
    fn world(&self, timeout: Duration) -> Communicator {
        self.0.world(WorldConfig::from_env().unwrap().with_timeout(timeout)).unwrap()
    }
}

fn main() -> ExitCode {
    match std::env::var(ROLE).as_deref() {
        Ok("suite") => suite(),
        Ok(role) => panic!("no such role: {role}"),
        Err(_) => return start(),
    }
    ExitCode::SUCCESS
}

/// One rank of the suite.
fn suite() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let said = info.payload().downcast_ref::<String>().map_or("", String::as_str);
        if !said.contains(failures::PURPOSE) {
            usual(info);
        }
    }));
    let engine = Mpi(Session::start().unwrap());
    let first = engine.world(Duration::from_secs(60)).rank() == 0;
    let count = transport_suite::run(&engine, &|name| {
        if first {
            println!("  {name}");
        }
    });
    if first {
        println!("  {count} checks passed");
    }
}

/// Starts the roles under mpirun.
fn start() -> ExitCode {
    let Ok(version) = Command::new("mpirun").arg("--version").output() else {
        println!("SKIPPED, not passed: there is no mpirun on this machine (Debian: apt-get install openmpi-bin)");
        return ExitCode::SUCCESS;
    };
    let open_mpi = String::from_utf8_lossy(&version.stdout).contains("Open MPI");
    let mut failed = Vec::new();
    for size in 1..=4 {
        let mut mpirun = Command::new("mpirun");
        if open_mpi {
            mpirun.args(["--oversubscribe", "--allow-run-as-root"]);
        }
        mpirun.args(["-n", &size.to_string()]).arg(std::env::current_exe().unwrap()).env(ROLE, "suite");
        println!("the suite on {size} ranks");
        let status = mpirun.status().unwrap();
        println!("the suite on {size} ranks ... {}", if status.success() { "ok" } else { "FAILED" });
        if !status.success() {
            failed.push(size);
        }
    }
    match failed.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
