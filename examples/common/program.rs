//! What `main` of a program is: flags, a run, an exit code.

use std::error::Error;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use burn_parallel::launch::StopSignal;

use super::flags::one_line;
use super::start::tell_others;

/// The name of the program.
pub const NAME: &str = env!("CARGO_CRATE_NAME");

/// When it was started.
static STARTED: OnceLock<Instant> = OnceLock::new();

/// Whether a rank has found that what it was given is wrong.
static REFUSED: AtomicBool = AtomicBool::new(false);

/// How a training has ended.
pub enum Ended<T> {
    /// All steps were made.
    Complete(T),
    /// A signal asked for the end, and the run was saved.
    Stopped(StopSignal),
}

impl<T> Ended<T> {
    /// The same with something made of the outcome.
    pub fn map<U>(self, make: impl FnOnce(T) -> U) -> Ended<U> {
        match self {
            Self::Complete(outcome) => Ended::Complete(make(outcome)),
            Self::Stopped(signal) => Ended::Stopped(signal),
        }
    }
}

/// Why a program has not done what it was to do.
pub enum Failure {
    /// What it was given makes no sense: exit code 2.
    Refused(String),
    /// Something went wrong on the way: exit code 1.
    Failed(Box<dyn Error>),
}

impl<E: Into<Box<dyn Error>>> From<E> for Failure {
    fn from(why: E) -> Self {
        Self::Failed(why.into())
    }
}

/// Runs a program with the flags of its command line. `program` returns the signal that has ended it, if one has.
pub fn run<A>(
    args: Result<A, clap::Error>,
    program: impl FnOnce(&A) -> Result<Option<StopSignal>, Failure>,
) -> ExitCode {
    STARTED.get_or_init(Instant::now);
    // Ranks that were lost and started again are a warning.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let args = match args {
        Ok(args) => args,
        Err(help) if !help.use_stderr() => {
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
        Err(wrong) => return refuse(&one_line(&wrong)),
    };
    match program(&args) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(signal)) => ExitCode::from(signal.exit_code()),
        Err(Failure::Refused(wrong)) => refuse(&wrong),
        Err(Failure::Failed(why)) => match why.downcast_ref() {
            Some(burn_parallel::Error::Stopped { signal }) => fail(signal.exit_code(), why),
            // A rank that is a process of its own has said so.
            Some(burn_parallel::Error::ProcessFailed { status, .. }) if status == "with exit status 2" => fail(2, why),
            _ if REFUSED.load(Ordering::Relaxed) => fail(2, why),
            _ => fail(1, why),
        },
    }
}

/// The error of a rank that was given what is wrong: the program ends with exit code 2, and is not started again.
pub fn refused(why: burn_parallel::Error) -> burn_parallel::Error {
    REFUSED.store(true, Ordering::Relaxed);
    why
}

/// The error of a strategy that does not suit the model, in one line: what was given is wrong. Others go through.
pub fn unsuited(why: burn_parallel::Error) -> burn_parallel::Error {
    use burn_parallel::Error::{InvalidArgument, Pipeline, Plan, Schedule, Strategy, User};
    match why {
        InvalidArgument { .. } | Pipeline { .. } | Plan { .. } | Schedule { .. } | Strategy { .. } => {
            refused(User(why.to_string().replace('\n', " ")))
        }
        why => why,
    }
}

/// For how long the program has been running.
pub fn running() -> Duration {
    STARTED.get().map_or(Duration::ZERO, Instant::elapsed)
}

/// Writes what a run tells at its end. That nobody reads it is no failure.
pub fn tell(text: &str) -> io::Result<()> {
    match writeln!(io::stdout(), "{text}") {
        Err(why) if why.kind() != io::ErrorKind::BrokenPipe => Err(why),
        _ => Ok(()),
    }
}

/// What this process was given is wrong: nothing has been started yet.
fn refuse(wrong: &str) -> ExitCode {
    let code = fail(2, wrong);
    tell_others(wrong);
    code
}

fn fail(code: u8, message: impl Display) -> ExitCode {
    eprintln!("{NAME}: {message}");
    ExitCode::from(code)
}
