//! Tries a step in a child process, whose death is the answer.

use std::io::{ErrorKind, Read};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::Trial;
use crate::Error;
use crate::launch::{end_with_parent, ended_by};
use crate::lock::lock;

/// How often the child is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// The most that is kept of what the child says.
const SAID: usize = 64 << 10;

/// How long the last of that is waited for after the end of the child: what it has started may hold the pipe for ever.
const SAID_WAIT: Duration = Duration::from_secs(1);

/// Runs a program that takes a step, with at most `bytes` of memory of its own, and says whether it went through: this
/// process, its model and its optimizer are not touched. The program is most often this one, started with other
/// arguments, and runs all ranks of a machine as it would in earnest.
///
/// On Linux the limit is on memory that is private and writable (`RLIMIT_DATA`: heap, stacks, and anonymous mappings;
/// address space that is reserved and never written does not count); on other Unix systems on address space
/// (`RLIMIT_AS`). A child that reaches it is refused memory and aborts; one that the system kills, as where a control
/// group is full, died of the same. Either is [`Trial::TooLarge`]. On Linux a child ends with this process, also where
/// that is killed. It prints no backtraces (`RUST_BACKTRACE` is 0 in it).
///
/// # Errors
/// [`Error::User`] if the program cannot be started, fails for another reason, with the end of what it wrote to
/// standard error, or does not end within `timeout`: it is killed then.
pub fn try_in_child(command: &mut Command, bytes: u64, timeout: Duration) -> Result<Trial, Error> {
    let name = command.get_program().to_string_lossy().into_owned();
    limit(command, bytes);
    end_with_parent(command);
    // Without memory a backtrace is never done: what prints it holds a lock, and is refused memory in turn.
    command.env("RUST_BACKTRACE", "0").env("RUST_LIB_BACKTRACE", "0");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|why| Error::user(format!("cannot start {name} for a trial: {why}")))?;
    let (errors, said) = (child.stderr.take(), Arc::new(Mutex::new(Vec::new())));
    let kept = said.clone();
    let reader = thread::spawn(move || errors.map(|errors| read(errors, &kept)));
    let began = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if began.elapsed() < timeout => thread::sleep(LOOK),
            late => {
                let _ = child.kill();
                let _ = child.wait();
                let why = late.map_or_else(|why| why.to_string(), |_| format!("it did not end within {timeout:?}"));
                return Err(Error::user(format!("a trial of {name} was given up: {why}")));
            }
        }
    };
    if !ended_by(&reader, Instant::now() + SAID_WAIT) {
        log::warn!("a trial of {name} has ended, and something that it has started still holds its standard error");
    }
    let said = String::from_utf8_lossy(&lock(&said)).into_owned();
    answer(&name, status, &said)
}

/// Keeps what is read, as far as that goes. The rest is read as well, or the child would wait.
fn read(mut errors: impl Read, kept: &Mutex<Vec<u8>>) {
    let mut piece = [0; 4 << 10];
    loop {
        match errors.read(&mut piece) {
            Ok(0) => return,
            Ok(len) => {
                let mut kept = lock(kept);
                let more = len.min(SAID - kept.len());
                kept.extend_from_slice(&piece[..more]);
            }
            Err(why) if why.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// What programs say that are refused memory, or whose device is.
const REFUSED: [&str; 10] = [
    "memory allocation of",
    "memory allocation failed",
    "Cannot allocate memory",
    "os error 12",
    "failed to spawn thread",
    // Of a thread without memory for its stack: EAGAIN.
    "os error 11",
    "Resource temporarily unavailable",
    // Of the loader.
    "cannot map zero-fill pages",
    "out of memory",
    // Of [`Error::OutOfMemory`].
    "has no memory for the",
];

fn answer(name: &str, status: ExitStatus, said: &str) -> Result<Trial, Error> {
    if status.success() {
        return Ok(Trial::Fits);
    }
    let refused = said.lines().find(|line| REFUSED.iter().any(|words| line.contains(words)));
    match (refused, signal(status)) {
        (Some(line), _) => Ok(Trial::TooLarge(line.trim().into())),
        // Killed by the system.
        (None, Some(9)) => Ok(Trial::TooLarge("the system killed the trial".into())),
        // A stack was not allowed to grow, or a thread had none.
        (None, Some(11)) if said.trim().is_empty() => Ok(Trial::TooLarge(format!("the trial was ended by {status}"))),
        (None, _) => {
            // With what is indented below it.
            let lines: Vec<&str> = said.trim().lines().collect();
            let from = lines.iter().rposition(|line| !line.starts_with(' ')).unwrap_or(0);
            let last = if lines.is_empty() { "it said nothing".into() } else { lines[from..].join("\n") };
            Err(Error::user(format!("a trial of {name} failed ({status}), not for want of memory: {last}")))
        }
    }
}

#[cfg(unix)]
fn signal(status: ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

#[cfg(not(unix))]
fn signal(_: ExitStatus) -> Option<i32> {
    None
}

#[cfg(unix)]
fn limit(command: &mut Command, bytes: u64) {
    use std::os::unix::process::CommandExt;
    #[cfg(target_os = "linux")]
    let resource = libc::RLIMIT_DATA;
    #[cfg(not(target_os = "linux"))]
    let resource = libc::RLIMIT_AS;
    let most = bytes as libc::rlim_t;
    // No dump of what was in memory: it would be as large as the limit.
    let limits = [(resource, most), (libc::RLIMIT_CORE, 0)];
    let set = move || {
        for (resource, most) in limits {
            let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
            // SAFETY: `limit` is a valid `rlimit` for the time of the call, which keeps nothing of it.
            if unsafe { libc::setrlimit(resource, &limit) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it calls `setrlimit` alone, which is async-signal-safe, and reads `errno`; nothing
    // is allocated.
    unsafe { command.pre_exec(set) };
}

#[cfg(not(unix))]
fn limit(_: &mut Command, _: u64) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::path::Path;

    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn death_is_the_answer_and_other_failures_are_errors() {
        let second = Duration::from_secs(20);
        assert_eq!(try_in_child(&mut sh("exit 0"), 1 << 30, second).unwrap(), Trial::Fits);
        assert!(matches!(try_in_child(&mut sh("kill -9 $$"), 1 << 30, second).unwrap(), Trial::TooLarge(_)));
        assert!(matches!(try_in_child(&mut sh("kill -11 $$"), 1 << 30, second).unwrap(), Trial::TooLarge(_)));
        let crash = try_in_child(&mut sh("echo index out of bounds >&2; kill -11 $$"), 1 << 30, second);
        assert!(crash.unwrap_err().to_string().contains("not for want of memory: index out of bounds"));
        let mut silent = sh("[ $RUST_BACKTRACE$RUST_LIB_BACKTRACE = 00 ]");
        assert_eq!(try_in_child(silent.env("RUST_BACKTRACE", "1"), 1 << 30, second).unwrap(), Trial::Fits);
        let told = try_in_child(&mut sh("echo 'memory allocation of 5 bytes failed' >&2; kill -6 $$"), 1 << 30, second);
        assert_eq!(told.unwrap(), Trial::TooLarge("memory allocation of 5 bytes failed".into()));
        let problem = try_in_child(&mut sh("echo no such flag >&2; exit 2"), 1 << 30, second).unwrap_err().to_string();
        assert!(problem.contains("not for want of memory: no such flag"), "{problem}");
        let problem = try_in_child(&mut sh("sleep 20"), 1 << 30, Duration::from_millis(50)).unwrap_err().to_string();
        assert!(problem.contains("did not end within 50ms"), "{problem}");
        assert!(try_in_child(&mut Command::new("/no/such/program"), 1 << 30, second).is_err());
    }

    #[test]
    fn a_daemon_that_holds_the_pipe_is_not_waited_for() {
        let began = Instant::now();
        let mut trial = sh("setsid sleep 60 & echo $! >&2; exit 3");
        let problem = try_in_child(&mut trial, 1 << 30, Duration::from_secs(90)).unwrap_err().to_string();
        assert!(began.elapsed() < Duration::from_secs(30), "the daemon was waited for");
        let daemon: i32 = problem.rsplit(' ').next().and_then(|id| id.parse().ok()).expect(&problem);
        // SAFETY: no memory is involved.
        unsafe { libc::kill(daemon, libc::SIGKILL) };
    }

    /// This test binary is its own child: as one it has a trial, which ends when it is killed.
    #[test]
    fn a_trial_ends_with_the_process_that_made_it() {
        const NAME: &str = "batch::child::tests::a_trial_ends_with_the_process_that_made_it";
        const FILE: &str = "BURN_PARALLEL_TEST_TRIAL";
        if let Some(file) = std::env::var_os(FILE) {
            let mut trial = sh("echo $$ > $TRIAL.new && mv $TRIAL.new $TRIAL && exec sleep 60");
            drop(try_in_child(trial.env("TRIAL", file), 1 << 30, Duration::from_secs(60)));
            return;
        }
        let file = std::env::temp_dir().join(format!("burn-parallel-trial-{}", std::process::id()));
        let mut parent = Command::new(std::env::current_exe().unwrap());
        parent.args(["--exact", NAME, "--nocapture", "--test-threads", "1"]).env(FILE, &file).stdout(Stdio::null());
        let mut parent = parent.spawn().unwrap();
        let until = |what: &dyn Fn() -> bool| {
            let began = Instant::now();
            while !what() && began.elapsed() < Duration::from_secs(20) {
                thread::sleep(LOOK);
            }
            what()
        };
        let began = until(&|| file.exists());
        parent.kill().unwrap();
        parent.wait().unwrap();
        assert!(began);
        let trial: i32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        std::fs::remove_file(&file).unwrap();
        // One that nobody waits for any more has no command line.
        let ended = until(&|| {
            std::fs::read(format!("/proc/{trial}/cmdline")).is_ok_and(|line| line.is_empty())
                || !Path::new(&format!("/proc/{trial}")).exists()
        });
        if !ended {
            // SAFETY: no memory is involved.
            unsafe { libc::kill(trial, libc::SIGKILL) };
        }
        assert!(ended, "process {trial} still runs");
    }

    /// This test binary is its own child: as one it takes memory, page by page.
    #[test]
    fn a_child_that_takes_too_much_does_not_fit() {
        const NAME: &str = "batch::child::tests::a_child_that_takes_too_much_does_not_fit";
        if let Ok(megabytes) = std::env::var("BURN_PARALLEL_TEST_TAKE") {
            let taken = vec![1u8; megabytes.parse::<usize>().unwrap() << 20];
            assert!(std::hint::black_box(&taken).iter().step_by(4096).all(|byte| *byte == 1));
            return;
        }
        let take = |megabytes: &str| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args(["--exact", NAME, "--nocapture", "--test-threads", "1"])
                .env("BURN_PARALLEL_TEST_TAKE", megabytes);
            try_in_child(&mut command, 256 << 20, Duration::from_secs(60)).unwrap()
        };
        assert_eq!(take("16"), Trial::Fits);
        let Trial::TooLarge(said) = take("400") else { panic!("400 MiB fit into 256") };
        assert!(said.contains("memory allocation of"), "{said}");
    }
}
