//! Starts this program several times on this machine, one process a rank, and supervises them.
//!
//! The parent starts the ranks, each at the head of a process group of its own, reads what they say and writes it with
//! the rank before each line. When one fails, the groups of the others are told to end (SIGTERM), and after a few
//! seconds are ended (SIGKILL). A signal that would end the parent goes to them first. Should the parent be killed
//! outright, the kernel ends the ranks (`PR_SET_PDEATHSIG`, on Linux).

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::rendezvous::SECRET;
use super::{Process, ProcessInfo, Rank, TransportKind};
use crate::Error;
use crate::comm::tcp::{descriptors, nonce};

/// Says to a program that it has been started by itself.
const CHILD: &str = "BURN_PARALLEL_CHILD";
/// Says to a rank how often the ranks were started before.
const RESTART: &str = "BURN_PARALLEL_RESTART";
/// How long ranks have to end once they are told to.
const GRACE: Duration = Duration::from_secs(5);
/// How often the parent looks whether a rank has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Lines of a failed rank that its error holds.
const STDERR_LINES: usize = 12;

/// Prepares a world of `size` ranks that are processes of this very program on this machine. [`Processes::run`] starts
/// it.
pub fn processes(size: usize) -> Processes {
    Processes { size, transport: TransportKind::Tcp, program: None, restarts: 0 }
}

/// A world of processes to be started.
#[derive(Debug, Clone)]
#[must_use = "nothing runs before `run`"]
pub struct Processes {
    size: usize,
    transport: TransportKind,
    program: Option<(OsString, Vec<OsString>)>,
    restarts: usize,
}

impl Processes {
    /// Sets what joins the processes. Default [`TransportKind::Tcp`]. With [`TransportKind::Mpi`] they are started by
    /// `mpirun`.
    pub fn transport(mut self, transport: TransportKind) -> Self {
        self.transport = transport;
        self
    }

    /// Sets what is started in place of this program with its own arguments.
    pub fn program(mut self, program: impl Into<OsString>, arguments: impl IntoIterator<Item: Into<OsString>>) -> Self {
        self.program = Some((program.into(), arguments.into_iter().map(Into::into).collect()));
        self
    }

    /// Starts all processes again when one has failed or was killed, so many times. Default 0. A program that is to go
    /// on where it was [restores](crate::checkpoint::Checkpointer::restore) its last checkpoint when it starts; which
    /// start it is, counted from 0, it finds in `BURN_PARALLEL_RESTART`. A run that a signal to the first process ends
    /// is not started again.
    pub fn restarts(mut self, restarts: usize) -> Self {
        self.restarts = restarts;
        self
    }

    /// Runs `f` on every rank. This program is started `size` times with the arguments that it has, so it comes here
    /// again in each of them: there this runs `f` and returns its result. In the process that was started first this
    /// returns `None` when all have ended.
    ///
    /// `prepare` makes settings for the rank that this process is: its seed, its threads.
    ///
    /// # Errors
    /// [`Error::ProcessFailed`] in the first process; in the ranks those of [`Process::run`].
    pub fn run<T, F>(self, prepare: impl FnOnce(Process) -> Process, f: F) -> Result<Option<T>, Error>
    where
        T: Send,
        F: Fn(Rank) -> Result<T, Error> + Sync,
    {
        if std::env::var_os(CHILD).is_some() {
            return prepare(super::from_env()?.transport(self.transport)).run(f).map(Some);
        }
        self.transport.check()?;
        if self.transport == TransportKind::Tcp {
            return self.supervise().map(|()| None);
        }
        // MPI joins only processes that its own launcher has started.
        let mut mpirun = Command::new("mpirun");
        let version = Command::new("mpirun").arg("--version").output().map_err(|problem| Error::Transport {
            transport: "mpi",
            problem: format!("mpirun cannot be started: {problem}; install it (Debian: openmpi-bin)"),
        })?;
        if String::from_utf8_lossy(&version.stdout).contains("Open MPI") {
            mpirun.args(["--oversubscribe", "--bind-to", "none", "--tag-output"]);
            // SAFETY: always succeeds.
            if unsafe { libc::geteuid() } == 0 {
                mpirun.arg("--allow-run-as-root");
            }
        }
        let (program, arguments) = self.command()?;
        mpirun.arg("-n").arg(self.size.to_string()).arg(program).args(arguments).env(CHILD, "1");
        if self.restarts > 0 {
            let problem = "`restarts` are for processes over TCP: over MPI, its own launcher starts them again";
            return Err(Error::invalid("launch::processes", problem));
        }
        supervise(vec![mpirun], self.size).map(|()| None)
    }

    /// Starts the processes and waits for them, whatever they do. From then on this process handles SIGINT and SIGTERM
    /// itself.
    ///
    /// Each finds `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, a `MASTER_ADDR` and `MASTER_PORT` on this
    /// machine, and in `BURN_PARALLEL_SECRET` a secret that was made up for this run, unless there is one already. It
    /// finds nothing of what other launchers have said to this process.
    ///
    /// # Errors
    /// [`Error::ProcessFailed`] for the first that fails, after all have ended, in the last of the
    /// [starts](Self::restarts); [`Error::Launch`] if one can't be started; [`Error::User`] if a signal ended the run.
    pub fn supervise(self) -> Result<(), Error> {
        for start in 0..self.restarts {
            match self.start(start) {
                Err(failed @ Error::ProcessFailed { .. }) => {
                    let left = self.restarts - start - 1;
                    log::warn!("all {} ranks are started again, {left} more times if need be: {failed}", self.size);
                }
                ended => return ended,
            }
        }
        self.start(self.restarts)
    }

    /// Starts the processes, after so many starts, and waits for them.
    fn start(&self, before: usize) -> Result<(), Error> {
        let (program, arguments) = self.command()?;
        // What a process says comes by two pipes; a few more are open while one is started.
        let (size, pipes) = (self.size, self.size.saturating_mul(2).saturating_add(8));
        descriptors::reserve(pipes, &format!("a world of {size} processes")).map_err(|problem| Error::Launch {
            rank: 0,
            size,
            problem,
        })?;
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
        let port = listener.map(|address| address.port()).map_err(Error::user)?;
        let made_up = || nonce().iter().map(|byte| format!("{byte:02x}")).collect::<String>().into();
        let secret = std::env::var_os(SECRET).filter(|secret| !secret.is_empty()).unwrap_or_else(made_up);
        let commands = (0..self.size).map(|rank| {
            let mut command = Command::new(&program);
            ProcessInfo::of_other_launchers().for_each(|name| {
                command.env_remove(name);
            });
            command.args(&arguments).env(CHILD, "1").env(SECRET, &secret).env(RESTART, before.to_string());
            command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
            command.env("WORLD_SIZE", self.size.to_string()).env("LOCAL_WORLD_SIZE", self.size.to_string());
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            command
        });
        supervise(commands.collect(), self.size)
    }

    fn command(&self) -> Result<(OsString, Vec<OsString>), Error> {
        if self.size == 0 {
            return Err(Error::invalid("launch::processes", "a world needs at least 1 rank, not 0"));
        }
        match &self.program {
            Some(program) => Ok(program.clone()),
            None => Ok((std::env::current_exe().map_err(Error::user)?.into(), std::env::args_os().skip(1).collect())),
        }
    }
}

/// A process that was started, and the threads that read what it says.
struct Started {
    child: Child,
    readers: Vec<JoinHandle<()>>,
    said: Arc<Mutex<VecDeque<String>>>,
    status: Option<ExitStatus>,
}

impl Started {
    /// Sends a signal to the process and all that it has started.
    fn signal(&self, signal: i32) {
        // SAFETY: no memory is involved. The group is the process's own.
        unsafe { libc::killpg(self.child.id() as i32, signal) };
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
        if self.status.is_none() {
            let _ = self.child.wait();
        }
        // All writers of the pipes have gone.
        self.readers.drain(..).for_each(|reader| drop(reader.join()));
    }
}

/// Runs processes to their end. Each is one rank, or a launcher of all.
fn supervise(commands: Vec<Command>, size: usize) -> Result<(), Error> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(Error::user)?;
    let alone = commands.len() < size;
    let mut started = Vec::with_capacity(commands.len());
    for (rank, command) in commands.into_iter().enumerate() {
        // Those that were started are ended as they are dropped.
        started.push(start(command, (!alone).then_some(rank), size).map_err(|problem| Error::Launch {
            rank,
            size,
            problem: problem.to_string(),
        })?);
    }
    let mut first: Option<Error> = None;
    let mut ending: Option<Instant> = None;
    while started.iter().any(|process| process.status.is_none()) {
        if let Some(signal) = signals.pending().next() {
            started.iter().filter(|process| process.status.is_none()).for_each(|process| process.signal(signal));
            ending.get_or_insert_with(Instant::now);
            let name = if signal == SIGINT { "SIGINT" } else { "SIGTERM" };
            first.get_or_insert(Error::User(format!("the run was ended by {name}")));
        }
        for (rank, process) in started.iter_mut().enumerate().filter(|(_, process)| process.status.is_none()) {
            process.status = process.child.try_wait().map_err(Error::user)?;
            if let Some(status) = process.status.filter(|status| !status.success()) {
                // What it has started itself might hold its pipes.
                process.signal(libc::SIGKILL);
                process.readers.drain(..).for_each(|reader| drop(reader.join()));
                let said = process.said.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let said = said.iter().cloned().collect();
                let rank = (!alone).then_some(rank);
                first.get_or_insert(Error::ProcessFailed { rank, size, status: describe(status), said });
            }
        }
        if first.is_some() {
            let since = *ending.get_or_insert_with(|| {
                started.iter().filter(|p| p.status.is_none()).for_each(|process| process.signal(SIGTERM));
                Instant::now()
            });
            if since.elapsed() > GRACE {
                started.iter().for_each(|process| process.signal(libc::SIGKILL));
            }
        }
        thread::sleep(POLL_INTERVAL);
    }
    drop(started);
    first.map_or(Ok(()), Err)
}

fn start(mut command: Command, rank: Option<usize>, size: usize) -> std::io::Result<Started> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    #[cfg(target_os = "linux")]
    {
        let parent = std::process::id();
        // SAFETY: between fork and exec only these two system calls are made, which take no lock and no memory.
        unsafe {
            command.pre_exec(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                match libc::getppid() as u32 == parent {
                    true => Ok(()),
                    // The parent died before the kernel knew that this matters.
                    false => Err(std::io::ErrorKind::NotFound.into()),
                }
            });
        }
    }
    let mut child = command.spawn()?;
    let said = Arc::new(Mutex::new(VecDeque::new()));
    let mut readers = Vec::new();
    if let Some(out) = child.stdout.take() {
        readers.push(relay(out, std::io::stdout(), rank, size, None)?);
    }
    if let Some(err) = child.stderr.take() {
        readers.push(relay(err, std::io::stderr(), rank, size, Some(said.clone()))?);
    }
    Ok(Started { child, readers, said, status: None })
}

/// Hands on lines, with the rank before each.
fn relay(
    from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    rank: Option<usize>,
    size: usize,
    keep: Option<Arc<Mutex<VecDeque<String>>>>,
) -> std::io::Result<JoinHandle<()>> {
    thread::Builder::new().name("lines of a rank".into()).spawn(move || {
        let mut from = BufReader::new(from);
        let mut bytes = Vec::new();
        while from.read_until(b'\n', &mut bytes).is_ok_and(|len| len > 0) {
            let text = String::from_utf8_lossy(&bytes);
            let line = text.trim_end_matches(['\n', '\r']);
            let (rank, line) = match rank {
                Some(rank) => (Some(rank), line),
                None => tagged(line),
            };
            let prefix = rank.map_or_else(String::new, |rank| format!("[rank {rank}/{size}] "));
            // One write a line: lines of several ranks do not get into each other.
            let _ = to.write_all(format!("{prefix}{line}\n").as_bytes()).and_then(|()| to.flush());
            if let Some(keep) = &keep {
                let mut kept = keep.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                if kept.len() == STDERR_LINES {
                    kept.pop_front();
                }
                kept.push_back(format!("{prefix}{line}"));
            }
            bytes.clear();
        }
    })
}

/// Takes off what `mpirun --tag-output` puts before a line: `[1,0]<stderr>:`, where 0 is the rank.
fn tagged(line: &str) -> (Option<usize>, &str) {
    let parse = || {
        let (tag, rest) = line.strip_prefix('[')?.split_once(']')?;
        let (_, rank) = tag.split_once(',')?;
        let rest = rest.strip_prefix("<stdout>:").or_else(|| rest.strip_prefix("<stderr>:"))?;
        Some((rank.parse().ok()?, rest))
    };
    parse().map_or((None, line), |(rank, rest)| (Some(rank), rest))
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("with exit status {code}"),
        (None, Some(signal)) => format!("by signal {signal}"),
        (None, None) => format!("with {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::tagged;

    #[test]
    fn tags_of_mpirun() {
        assert_eq!(tagged("[1,12]<stderr>:step 3"), (Some(12), "step 3"));
        assert_eq!(tagged("[1,0]<stdout>:"), (Some(0), ""));
        for line in ["", "plain", "[1,0] is no tag", "[x,y]<stdout>:a", "[warn] it"] {
            assert_eq!(tagged(line), (None, line));
        }
    }
}
