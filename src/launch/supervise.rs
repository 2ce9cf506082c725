//! Watches over processes that were started, and ends all when one fails.
//!
//! The parent starts the ranks, each at the head of a process group of its own, reads what they say and writes it with
//! the rank before each line. When one fails, the groups of the others are told to end (SIGTERM), and after a few
//! seconds are ended (SIGKILL). A signal that would end the parent goes to them first. Should the parent be killed
//! outright, the kernel ends the ranks (`PR_SET_PDEATHSIG`, on Linux).

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use super::StopSignal;
use super::bounded::KILLED_WAIT;
use super::started::{OUTPUT_WAIT, STUCK, Started};
use crate::Error;

/// How often the parent looks whether a rank has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The exit code, by custom, of a program that was given what makes no sense.
const REFUSED: i32 = 2;

/// How processes have ended.
pub(super) struct Ended {
    /// What ended the run before its time.
    pub first: Option<Error>,
    /// How many ranks were lost, and not ended by the loss of others.
    pub lost: usize,
    /// Whether one says by its exit code that what it was given is wrong.
    pub refused: bool,
    /// How long all of them ran before something ended the run.
    pub lasted: Duration,
}

impl Ended {
    /// # Errors
    /// What ended the run before its time.
    pub fn into_result(self) -> Result<(), Error> {
        self.first.map_or(Ok(()), Err)
    }
}

/// Runs processes to their end. Each is one rank, or a launcher of all.
///
/// # Errors
/// [`Error::Launch`] if one can't be started.
pub(super) fn supervise(commands: Vec<Command>, size: usize, grace: Duration) -> Result<Ended, Error> {
    let began = Instant::now();
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1]).map_err(Error::user)?;
    let alone = commands.len() < size;
    let mut started = Vec::with_capacity(commands.len());
    for (rank, command) in commands.into_iter().enumerate() {
        // Those that were started are ended as they are dropped.
        started.push(Started::new(command, (!alone).then_some(rank), size).map_err(|problem| Error::Launch {
            rank,
            size,
            problem: problem.to_string(),
        })?);
    }
    let mut ended = Ended { first: None, lost: 0, refused: false, lasted: Duration::MAX };
    let mut ending: Option<Instant> = None;
    while started.iter().any(|process| process.status().is_none()) {
        for signal in signals.pending() {
            started.iter().filter(|process| process.status().is_none()).for_each(|process| process.signal(signal));
            // What SIGUSR1 means is for the ranks to say.
            if signal != SIGUSR1 {
                ending.get_or_insert_with(Instant::now);
                ended.first.get_or_insert(Error::Stopped { signal: StopSignal::new(signal) });
            }
        }
        let (mut failed, until) = (Vec::new(), Instant::now() + OUTPUT_WAIT);
        for (rank, process) in started.iter_mut().enumerate().filter(|(_, process)| process.status().is_none()) {
            let status = process.look().map_err(Error::user)?;
            if let Some(status) = status.filter(|status| !status.success()) {
                // What it has started itself might hold its pipes.
                process.end(until);
                failed.push((rank, status));
            }
        }
        if ended.first.is_none() && !failed.is_empty() {
            // Ranks that end with an error may have done so because a signal has ended another.
            let signalled = failed.iter().filter(|(_, status)| status.signal().is_some());
            ended.lost = signalled.clone().count().max(1);
            let (rank, status) = *signalled.chain(&failed).next().unwrap_or(&failed[0]);
            ended.first = Some(match StopSignal::of_exit(status.code()) {
                Some(signal) => Error::Stopped { signal },
                None => {
                    let said = started[rank].said();
                    Error::ProcessFailed { rank: (!alone).then_some(rank), size, status: describe(status), said }
                }
            });
        }
        if ended.first.is_some() {
            ended.lasted = ended.lasted.min(began.elapsed());
            let since = *ending.get_or_insert_with(|| {
                for process in started.iter().filter(|process| process.status().is_none()) {
                    process.signal(SIGTERM);
                    // One that is stopped hears of it when it goes on.
                    process.signal(libc::SIGCONT);
                }
                Instant::now()
            });
            if since.elapsed() > grace {
                started.iter().for_each(|process| process.signal(libc::SIGKILL));
            }
            if since.elapsed() > grace.saturating_add(KILLED_WAIT) {
                log::warn!("the ranks were killed, and some have not ended, {STUCK}");
                break;
            }
        }
        thread::sleep(POLL_INTERVAL);
    }
    ended.refused = started.iter().any(|process| process.status().and_then(|status| status.code()) == Some(REFUSED));
    let until = Instant::now() + OUTPUT_WAIT;
    started.iter_mut().for_each(|process| process.end(until));
    Ok(ended)
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("with exit status {code}"),
        (None, Some(signal)) => format!("by signal {signal}"),
        (None, None) => format!("with {status}"),
    }
}
