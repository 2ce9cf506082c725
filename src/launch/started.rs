//! Processes that were started, each at the head of a process group of its own.
//!
//! The number of a process, which is that of its group, may be another program's once the process was waited for. So
//! none is waited for while it may still be sent a signal: the system tells that it has ended, and keeps the number for
//! it.

use std::collections::VecDeque;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::bounded::{KILLED_WAIT, has_ended_by};
use super::end_with_parent;
use super::reader::ended_by;
use super::relay::relay;

/// How long what a process has said is waited for after its end. All of its group have ended by then: what holds its
/// output still has left the group, as a daemon does (`setsid`).
pub(super) const OUTPUT_WAIT: Duration = Duration::from_secs(1);

/// Of a process that was killed, why it may not have ended.
pub(super) const STUCK: &str =
    "as one that waits in the kernel, for a file system or a driver: nobody waits for it any longer";

/// A process, and the threads that read what it says.
pub(super) struct Started {
    child: Child,
    /// As lines name it.
    name: String,
    readers: Vec<JoinHandle<()>>,
    said: Arc<Mutex<VecDeque<String>>>,
    status: Option<ExitStatus>,
}

impl Started {
    /// Starts one of `size` processes; the rank is none for a launcher of all.
    ///
    /// # Errors
    /// Why it cannot be started, or its output not be read.
    pub fn new(mut command: Command, rank: Option<usize>, size: usize) -> io::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        end_with_parent(&mut command);
        let (child, said) = (command.spawn()?, Arc::default());
        let name =
            rank.map_or_else(|| command.get_program().to_string_lossy().into_owned(), |rank| format!("rank {rank}"));
        // From here on it is ended if anything fails.
        let mut started = Self { child, name, readers: Vec::new(), said, status: None };
        if let Some(out) = started.child.stdout.take() {
            started.readers.push(relay(out, io::stdout(), rank, size, None)?);
        }
        if let Some(err) = started.child.stderr.take() {
            started.readers.push(relay(err, io::stderr(), rank, size, Some(started.said.clone()))?);
        }
        Ok(started)
    }

    /// How it has ended, if it has.
    pub fn status(&self) -> Option<ExitStatus> {
        self.status
    }

    /// Looks whether it has ended.
    ///
    /// # Errors
    /// What the system says.
    pub fn look(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = ended(self.child.id())?;
        }
        Ok(self.status)
    }

    /// Sends a signal to the process and all that it has started.
    pub fn signal(&self, signal: i32) {
        // SAFETY: no memory is involved. The group is the process's own: it is waited for in `drop` alone.
        unsafe { libc::killpg(self.child.id() as i32, signal) };
    }

    /// Ends it with what it has started, and waits until then for the last of what it has said.
    pub fn end(&mut self, until: Instant) {
        self.signal(libc::SIGKILL);
        let readers = std::mem::take(&mut self.readers);
        if !readers.iter().all(|reader| ended_by(reader, until)) {
            log::warn!(
                "{} has ended, and something that it has started and that has left its process group, as a daemon does, still holds \
                 its output: nobody waits for that any longer",
                self.name
            );
        }
    }

    /// The last lines that it wrote to standard error.
    pub fn said(&self) -> Vec<String> {
        self.said.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).iter().cloned().collect()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.end(Instant::now() + OUTPUT_WAIT);
        if matches!(has_ended_by(&mut self.child, Instant::now() + KILLED_WAIT), Ok(false)) {
            log::warn!("{} was killed and has not ended, {STUCK}", self.name);
        }
    }
}

/// How a child process has ended, if it has. It stays one that was not waited for.
fn ended(id: u32) -> io::Result<Option<ExitStatus>> {
    // SAFETY: all zeros are such a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is valid for the time of the call.
    if unsafe { libc::waitid(libc::P_PID, id as libc::id_t, &mut info, options) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has filled these in for a child, or left the zeros.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    // As `wait` gives it.
    Ok(Some(ExitStatus::from_raw(match info.si_code {
        libc::CLD_EXITED => (status & 0xff) << 8,
        libc::CLD_DUMPED => status | 0x80,
        _ => status,
    })))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn sh(script: &str) -> Started {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Started::new(command, Some(0), 1).unwrap()
    }

    fn status(started: &mut Started) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = started.look().unwrap() {
                return status;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether a number is that of a process, ended or not, which is still known.
    fn is_known(id: u32) -> bool {
        // SAFETY: no memory is involved, and nothing is sent.
        unsafe { libc::kill(id as i32, 0) == 0 }
    }

    #[test]
    fn the_number_of_a_process_is_kept_while_signals_may_be_sent_to_it() {
        for (script, code, signal) in
            [("exit 0", Some(0), None), ("exit 7", Some(7), None), ("kill -9 $$", None, Some(9))]
        {
            let mut started = sh(script);
            let found = status(&mut started);
            assert_eq!((found.code(), found.signal()), (code, signal), "{script}");
            let id = started.child.id();
            for _ in 0..2 {
                started.signal(libc::SIGKILL);
                assert!(is_known(id), "another process may have its number");
                assert_eq!(started.look().unwrap(), Some(found));
            }
            started.end(Instant::now() + OUTPUT_WAIT);
            assert!(is_known(id));
            drop(started);
            assert!(!is_known(id), "it was not waited for");
        }
    }
}
