//! A signal by which a run was asked to end.

use std::fmt;

/// A signal that asks a run to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopSignal(i32);

/// SIGUSR1, SIGTERM and SIGINT.
#[cfg(unix)]
const NAMES: [(i32, &str); 3] = [(libc::SIGUSR1, "SIGUSR1"), (libc::SIGTERM, "SIGTERM"), (libc::SIGINT, "SIGINT")];
#[cfg(not(unix))]
const NAMES: [(i32, &str); 0] = [];

impl StopSignal {
    pub(crate) fn new(number: i32) -> Self {
        Self(number)
    }

    /// The signal for which a process ended with this exit code, if it did.
    #[cfg(unix)]
    pub(crate) fn of_exit(code: Option<i32>) -> Option<Self> {
        let number = code? - 128;
        [libc::SIGTERM, libc::SIGUSR1].contains(&number).then_some(Self(number))
    }

    /// Its number.
    pub fn number(self) -> i32 {
        self.0
    }

    /// The exit code of a program that ends because of it, by custom: 128 and its number, so 143 for SIGTERM.
    /// [`launch::processes`](crate::launch::processes) then starts nothing again.
    pub fn exit_code(self) -> u8 {
        (128 + self.0) as u8
    }
}

impl fmt::Display for StopSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(number, _)| *number == self.0) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "signal {}", self.0),
        }
    }
}
