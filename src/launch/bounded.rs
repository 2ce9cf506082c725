//! Waits for other processes that end, if they do.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::end_with_parent;

/// How often a process is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// How long a process is waited for that was killed. The kernel ends it at once, but for one that waits in the kernel
/// itself: for a file system that does not answer, or a driver; to give back much memory takes a while.
pub(super) const KILLED_WAIT: Duration = Duration::from_secs(30);

/// Whether a process has ended by then. It was waited for in that case.
///
/// # Errors
/// What the system says.
pub(super) fn has_ended_by(child: &mut Child, until: Instant) -> io::Result<bool> {
    while child.try_wait()?.is_none() {
        if Instant::now() >= until {
            return Ok(false);
        }
        thread::sleep(LOOK);
    }
    Ok(true)
}

/// What a process writes to its standard output until it closes that; none if it takes longer than the limit.
///
/// # Errors
/// Why it cannot be started, or not be read.
pub(super) fn said_within(mut command: Command, limit: Duration) -> io::Result<Option<String>> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    end_with_parent(&mut command);
    let mut child = command.spawn()?;
    let (tell, told) = mpsc::channel();
    let out = child.stdout.take();
    let read = move || {
        let mut said = Vec::new();
        let read = out.map_or(Ok(0), |mut out| out.read_to_end(&mut said));
        // Nobody listens any more if it took too long.
        let _ = tell.send(read.map(|_| said));
    };
    let reader = thread::Builder::new().name("launcher".into()).spawn(read);
    let said = match reader {
        Ok(_) => told.recv_timeout(limit),
        Err(problem) => Ok(Err(problem)),
    };
    // SAFETY: no memory is involved. The group is the process's own, which was not waited for.
    unsafe { libc::killpg(child.id() as i32, libc::SIGKILL) };
    has_ended_by(&mut child, Instant::now() + KILLED_WAIT)?;
    match said {
        Ok(said) => said.map(|said| Some(String::from_utf8_lossy(&said).into_owned())),
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn nobody_waits_longer_than_the_limit() {
        let began = Instant::now();
        assert_eq!(said_within(sh("echo mpirun; sleep 600"), Duration::from_millis(50)).unwrap(), None);
        let mut child = sh("exec sleep 600").spawn().unwrap();
        assert!(!has_ended_by(&mut child, Instant::now() + Duration::from_millis(50)).unwrap());
        child.kill().unwrap();
        assert!(has_ended_by(&mut child, Instant::now() + Duration::from_secs(60)).unwrap());
        assert!(began.elapsed() < Duration::from_secs(300));
    }

    #[test]
    fn what_a_process_says_is_read() {
        let said = said_within(sh("echo Open MPI"), Duration::from_secs(60)).unwrap();
        assert_eq!(said.as_deref(), Some("Open MPI\n"));
        assert!(said_within(Command::new("/no/such/program"), Duration::from_secs(60)).is_err());
    }
}
