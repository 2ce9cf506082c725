//! The transport suite on processes of MPI, and what becomes of a rank that dies. Without arguments this starts itself
//! under `mpirun`; where there is none it says that it was skipped.

mod common {
    pub mod failing;
}
#[path = "common/transport_suite/mod.rs"]
mod transport_suite;

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use burn_parallel::Error;
use burn_parallel::comm::WorldConfig;
use burn_parallel::comm::mpi::Session;
use burn_parallel::comm::{Communicator, ReduceOp};
use burn_parallel::launch;

use crate::common::failing::hide_panics_on_purpose;
use crate::transport_suite::{WorldFactory, short_of_memory};

const ROLE: &str = "BURN_PARALLEL_TEST_ROLE";

struct Mpi(Session);

impl WorldFactory for Mpi {
    fn world(&self, timeout: Duration) -> Communicator {
        self.0.world(WorldConfig::from_env().unwrap().with_timeout(timeout)).unwrap()
    }
}

fn main() -> ExitCode {
    match std::env::var(ROLE).as_deref() {
        Ok("suite") => suite(),
        Ok(role) if role.starts_with("stopped") => stopped(role),
        Ok(role) => one_rank(role),
        Err(_) => return start(),
    }
    ExitCode::SUCCESS
}

/// One rank of the suite.
fn suite() {
    hide_panics_on_purpose();
    let factory = Mpi(Session::start().unwrap());
    let first = factory.world(Duration::from_secs(60)).rank() == 0;
    let count = transport_suite::run(&factory, &|name| {
        if first {
            println!("  {name}");
        }
    });
    if first {
        println!("  {count} checks passed");
    }
}

/// One rank of a world in which something happens to rank 1.
fn one_rank(role: &str) {
    let outcome = launch::from_env().unwrap().timeout(Duration::from_secs(60)).run(|rank| {
        rank.barrier()?;
        match role {
            "short" => return short_of_memory::for_large(&rank, 1),
            "short-of-little" => return short_of_memory::for_little(&rank, 1),
            _ => {}
        }
        if rank.rank() == 1 {
            match role {
                "error" => return Err(Error::user("the disk is full")),
                "panic" => panic!("on purpose"),
                "killed" => {
                    let _ = Command::new("kill").args(["-9", &std::process::id().to_string()]).status();
                }
                // Nobody receives it, and nobody waits for it.
                "unread" => rank.send(vec![0u8; 1 << 22], 0, 5)?,
                role => panic!("no such role: {role}"),
            }
        }
        if role == "unread" {
            return rank.barrier();
        }
        rank.all_reduce(vec![1.0f32; 1000], ReduceOp::Sum).map(drop)
    });
    // In one piece: the lines of several processes come together.
    print!(
        "{}",
        format!("<{}>\n", outcome.map_or_else(|error| error.to_string(), |()| "well".into())).replace("\n ", " ")
    );
}

/// Rank 0 stops rank 1, whose words have been announced and are not there: its call of a collective, or a message. The
/// time-out is over all the same, and so is the process.
fn stopped(role: &str) {
    let began = Instant::now();
    let outcome = launch::from_env().unwrap().timeout(Duration::from_secs(2)).run(|rank| {
        let processes = rank.all_gather(vec![std::process::id()])?;
        if rank.rank() == 0 {
            std::thread::sleep(Duration::from_millis(500));
            let _ = Command::new("kill").args(["-STOP", &processes[1].to_string()]).status();
            wait_until_stopped(processes[1]);
        }
        match (role, rank.rank()) {
            ("stopped-call", _) => rank.barrier(),
            (_, 0) => rank.recv::<Vec<f32>>(1, 7).map(drop),
            _ => {
                rank.send(vec![1.0f32; 300], 0, 7)?;
                rank.barrier()
            }
        }
    });
    let in_time = if began.elapsed() < Duration::from_secs(15) { "in time" } else { "late" };
    let said = outcome.map_or_else(|error| error.to_string(), |()| "well".into());
    print!("{}", format!("<{in_time}: {said}>\n").replace("\n ", " "));
}

/// Waits until no thread of a process runs any more: on busy cores a signal takes a while to reach all of them, and one
/// that still runs sends what was announced.
fn wait_until_stopped(process: u32) {
    let is_stopped = |task: &std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("stat")).is_ok_and(|stat| stat.contains(") T "))
    };
    for _ in 0..500 {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task"));
        if tasks.is_ok_and(|tasks| tasks.flatten().all(|task| is_stopped(&task))) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_open_mpi() -> bool {
    let version = Command::new("mpirun").arg("--version").output().unwrap();
    String::from_utf8_lossy(&version.stdout).contains("Open MPI")
}

fn mpirun(size: usize, role: &str) -> Command {
    let mut mpirun = Command::new("mpirun");
    if is_open_mpi() {
        mpirun.args(["--oversubscribe", "--allow-run-as-root"]);
    }
    mpirun.args(["-n", &size.to_string()]).arg(std::env::current_exe().unwrap()).env(ROLE, role);
    mpirun
}

/// All ranks say this, and the run ends in time, well or not.
fn scenario(role: &str, words: &str, ends_well: bool) -> bool {
    const RANKS: usize = 3;
    let began = Instant::now();
    let output = mpirun(RANKS, role).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let times = if ends_well { RANKS } else { 1 };
    let passed = output.status.success() == ends_well
        && began.elapsed() < Duration::from_secs(30)
        && said.matches(words).count() >= times;
    println!("{role} ... {}", if passed { "ok" } else { "FAILED" });
    if !passed {
        println!("after {:?}, {}: {said}", began.elapsed(), output.status);
    }
    passed
}

/// Two ranks, over a network whose messages are announced before they are sent.
fn stops(role: &str, words: &str) -> bool {
    let mut mpirun = mpirun(2, role);
    let settings = [("pml", "ob1"), ("btl", "tcp,self"), ("btl_tcp_eager_limit", "128")];
    mpirun.envs(settings.map(|(name, value)| (format!("OMPI_MCA_{name}"), value)));
    let mut limited = Command::new("timeout");
    limited.arg("40").arg(mpirun.get_program()).args(mpirun.get_args());
    let output = limited.envs(mpirun.get_envs().filter_map(|(name, value)| Some((name, value?)))).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let passed = said.contains("<in time: ") && said.contains(words);
    println!("{role} ... {}", if passed { "ok" } else { "FAILED" });
    if !passed {
        println!("{}: {said}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    passed
}

/// Starts the roles under mpirun.
fn start() -> ExitCode {
    if Command::new("mpirun").arg("--version").output().is_err() {
        println!("SKIPPED, not passed: there is no mpirun on this machine (Debian: apt-get install openmpi-bin)");
        return ExitCode::SUCCESS;
    }
    let mut passed = true;
    for size in 1..=4 {
        println!("the suite on {size} ranks");
        let well = mpirun(size, "suite").status().unwrap().success();
        println!("the suite on {size} ranks ... {}", if well { "ok" } else { "FAILED" });
        passed &= well;
    }
    passed &= scenario("error", "<rank 1 failed: the disk is full", true);
    passed &= scenario("panic", "<rank 1 panicked: on purpose", true);
    passed &= scenario("unread", "<well>", true);
    // Linux alone says how much a process may still take.
    if cfg!(target_os = "linux") {
        passed &= scenario("short", "<well>", true);
        passed &= scenario("short-of-little", "<well>", true);
    }
    // The launcher's own words, for the rank has none left. MPICH's names the process in place of the rank.
    passed &= scenario("killed", if is_open_mpi() { "rank 1" } else { "Killed (signal 9)" }, false);
    if is_open_mpi() {
        passed &= stops("stopped-call", "waited 2.");
        passed &= stops("stopped-message", "waited 2.");
    }
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
