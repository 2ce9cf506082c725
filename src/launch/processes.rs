//! Starts this program several times on this machine, one process a rank, and again when ranks are lost.

use std::ffi::OsString;
use std::process::Command;
use std::time::Duration;

use super::bounded::said_within;
use super::environment::{RESTART, RUN};
use super::relay;
use super::rendezvous::SECRET;
use super::supervise::{Ended, supervise};
use super::{Process, ProcessInfo, Rank, TransportKind};
use crate::Error;
use crate::comm::tcp::{descriptors, nonce};

/// Says to a program that it has been started by itself.
const CHILD: &str = "BURN_PARALLEL_CHILD";
/// How long `mpirun` may take to say which version it is.
const VERSION_WAIT: Duration = Duration::from_secs(60);
/// How long ranks have to end once they are told to, unless the program says otherwise.
const TIME_TO_END: Duration = Duration::from_secs(5);
/// How soon ranks fail that would fail again, unless the program says otherwise.
const FAILS_AGAIN_WITHIN: Duration = Duration::from_secs(60);

/// Prepares a world of `size` ranks that are processes of this very program on this machine. [`Processes::run`] starts
/// it.
pub fn processes(size: usize) -> Processes {
    Processes {
        size,
        transport: TransportKind::Tcp,
        program: None,
        restarts: 0,
        restart_sizes: Vec::new(),
        grace: TIME_TO_END,
        fails_again_within: FAILS_AGAIN_WITHIN,
    }
}

/// A world of processes to be started.
#[derive(Debug, Clone)]
#[must_use = "nothing runs before `run`"]
pub struct Processes {
    size: usize,
    transport: TransportKind,
    program: Option<(OsString, Vec<OsString>)>,
    restarts: usize,
    restart_sizes: Vec<usize>,
    grace: Duration,
    fails_again_within: Duration,
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
    /// start it is, it finds in [`ProcessInfo::restarts`]. The log tells, as warnings, which rank was lost and how many
    /// are started again.
    ///
    /// Not started again is a run that [was asked to end](super::StopSignals), and one that would fail again: if a rank
    /// ends with exit code 2, which by custom says that what a program was given is wrong, as its flags or the
    /// checkpoint, or if twice in a row a rank fails [soon](Self::fails_again_within) with the same exit code and the
    /// same last words. What fails alike after it has run for longer, as when the network breaks now and then, is
    /// started again.
    pub fn restarts(mut self, restarts: usize) -> Self {
        self.restarts = restarts;
        self
    }

    /// Takes ranks that are lost for gone, as a GPU may be that has failed: all are started again with the largest of
    /// these numbers of ranks for which there are enough left. Without this, and where `sizes` is empty, with as many
    /// as before.
    ///
    /// Lost are those that a signal has ended, or else the first that failed.
    /// [`Strategy::resized`](crate::train::Strategy::resized) says what a strategy is on fewer ranks.
    pub fn restart_sizes(mut self, sizes: impl IntoIterator<Item = usize>) -> Self {
        self.restart_sizes = sizes.into_iter().collect();
        self
    }

    /// Sets how long ranks have to end once they are told to, before they are killed. Default 5 s: more, if they save a
    /// checkpoint then. What they have started and leave behind is killed as well, but for what has left their process
    /// group, as a daemon does: that is not waited for.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Sets how soon after its start a failure counts as one that would come again: two in a row, each within this
    /// time, with the same exit code and the same last words, end the run, whatever [restarts](Self::restarts) are
    /// left. Default 60 s: more, if ranks need longer to begin. With zero every failure is tried again, but exit code
    /// 2.
    pub fn fails_again_within(mut self, time: Duration) -> Self {
        self.fails_again_within = time;
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
        let (mut mpirun, mut asked) = (Command::new("mpirun"), Command::new("mpirun"));
        asked.arg("--version");
        let mpi = |problem| Error::Transport { transport: "mpi", problem };
        let version = said_within(asked, VERSION_WAIT)
            .map_err(|problem| mpi(format!("mpirun cannot be started: {problem}; install it (Debian: openmpi-bin)")))?
            .ok_or_else(|| {
                mpi(format!("`mpirun --version` has said nothing in {VERSION_WAIT:?}: what is in its place?"))
            })?;
        if version.contains("Open MPI") {
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
        supervise(vec![mpirun], self.size, self.grace)?.into_result().map(|()| None)
    }

    /// Starts the processes and waits for them, whatever they do. From then on this process handles SIGINT, SIGTERM and
    /// SIGUSR1 itself: it hands them on.
    ///
    /// Each finds `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, a `MASTER_ADDR` and `MASTER_PORT` on this
    /// machine, and in `BURN_PARALLEL_SECRET` a secret that was made up for this start, unless there is one already. In
    /// `BURN_PARALLEL_RUN` it finds a name that was made up for the run, the same in all starts
    /// ([`ProcessInfo::run`]). It finds nothing of what other launchers have said to this process about its rank.
    ///
    /// # Errors
    /// [`Error::ProcessFailed`] for the first that fails, after all have ended, in the last of the
    /// [starts](Self::restarts); [`Error::Launch`] if one can't be started; [`Error::Stopped`] if a signal ended the
    /// run.
    pub fn supervise(self) -> Result<(), Error> {
        let (mut size, mut words, run) = (self.size, None, made_up());
        for before in 0..self.restarts {
            let ended = self.start(size, before, &run)?;
            let Some(Error::ProcessFailed { rank, status, said, .. }) = &ended.first else {
                return ended.into_result();
            };
            if ended.refused {
                log::warn!(
                    "the ranks are not started again: by exit code 2 they say that what they were given is wrong"
                );
                return ended.into_result();
            }
            // Of one that a signal has ended nothing can be told, and one that ran for a while has got further.
            let soon = ended.lasted < self.fails_again_within;
            let tells = soon && !said.is_empty() && !status.contains("signal");
            // Where several ranks fail alike, any of them may be the first.
            let prefix = relay::prefix(*rank, size);
            let plain = |line: &String| line.strip_prefix(&prefix).unwrap_or(line).to_owned();
            let last = tells.then(|| (status.clone(), said.iter().map(plain).collect::<Vec<_>>()));
            if last.is_some() && last == words {
                log::warn!(
                    "the ranks are not started again: twice in a row they failed alike, less than {:?} after their start",
                    self.fails_again_within
                );
                return ended.into_result();
            }
            words = last;
            let left = size.saturating_sub(ended.lost);
            let next = match self.restart_sizes.is_empty() {
                true => Some(size),
                false => self.restart_sizes.iter().copied().filter(|next| (1..=left).contains(next)).max(),
            };
            let Some(next) = next else {
                log::warn!("{left} of {size} ranks are left, too few to go on with");
                return ended.into_result();
            };
            if let Some(failed) = ended.first {
                let (number, of) = (before + 1, self.restarts);
                log::warn!("{failed}; restart {number} of {of}: {next} ranks are started, of {size} before");
            }
            size = next;
        }
        self.start(size, self.restarts, &run)?.into_result()
    }

    /// Starts so many processes of a run, after so many starts, and waits for them.
    fn start(&self, size: usize, before: usize, run: &str) -> Result<Ended, Error> {
        let (program, arguments) = self.command()?;
        // What a process says comes by two pipes; a few more are open while one is started.
        let pipes = size.saturating_mul(2).saturating_add(8);
        descriptors::reserve(pipes, &format!("a world of {size} processes")).map_err(|problem| Error::Launch {
            rank: 0,
            size,
            problem,
        })?;
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
        let port = listener.map(|address| address.port()).map_err(Error::user)?;
        let secret = std::env::var_os(SECRET).filter(|secret| !secret.is_empty());
        let secret = secret.unwrap_or_else(|| made_up().into());
        let commands = (0..size).map(|rank| {
            let mut command = Command::new(&program);
            ProcessInfo::of_other_launchers().for_each(|name| {
                command.env_remove(name);
            });
            command.args(&arguments).env(CHILD, "1").env(SECRET, &secret).env(RESTART, before.to_string());
            command.env(RUN, run);
            command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
            command.env("WORLD_SIZE", size.to_string()).env("LOCAL_WORLD_SIZE", size.to_string());
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            command
        });
        supervise(commands.collect(), size, self.grace)
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

/// A name or a secret that nobody has had before.
fn made_up() -> String {
    nonce().iter().map(|byte| format!("{byte:02x}")).collect()
}
