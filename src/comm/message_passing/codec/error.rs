//! Encodes errors as bytes.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Reader, Writer};
use crate::Error;
use crate::comm::CallLog;
use crate::comm::element::number;
use crate::error::StopSignal;
use crate::lock::lock;

/// Most bytes of the name of an operation or a transport, or of an advice.
const LONGEST_WORD: usize = 128;
/// Most names that are kept.
pub(super) const MOST_NAMES: usize = 256;
/// The highest number of a signal.
const MOST_SIGNAL: u64 = 64;
/// Most nested causes of a received error.
pub(super) const DEEPEST: usize = 8;

impl Writer {
    fn log(&mut self, log: &CallLog) -> &mut Self {
        self.list(log.lines(), |w, line| {
            w.text(line);
        })
    }

    pub fn error(&mut self, error: &Error) -> &mut Self {
        match error {
            Error::Timeout { group, rank, operation, waited, missing, log } => self
                .byte(0)
                .text(group)
                .number(*rank as u64)
                .text(operation)
                .number(waited.as_nanos() as u64)
                .text(missing)
                .log(log),
            Error::Mismatch { group, sequence, calls, log } => self
                .byte(1)
                .text(group)
                .number(*sequence)
                .list(calls, |w, call| {
                    w.call(call);
                })
                .log(log),
            Error::UnexpectedMessage { group, from, to, tag, expected, found, log } => self
                .byte(2)
                .text(group)
                .number(*from as u64)
                .number(*to as u64)
                .number(*tag)
                .text(expected)
                .text(found)
                .log(log),
            Error::RankLost { group, rank, operation, log } => {
                self.byte(3).text(group).number(*rank as u64).text(operation).log(log)
            }
            Error::RankPanicked { rank, message, log } => self.byte(4).number(*rank as u64).text(message).log(log),
            Error::RankFailed { rank, cause, log } => self.byte(5).number(*rank as u64).error(cause).log(log),
            Error::Aborted { group, rank, reason, log } => {
                self.byte(6).text(group).number(*rank as u64).text(reason).log(log)
            }
            Error::InvalidArgument { operation, problem } => self.byte(7).text(operation).text(problem),
            Error::Transport { transport, problem } => self.byte(8).text(transport).text(problem),
            Error::OutOfMemory { group, rank, operation, bytes } => {
                self.byte(10).text(group).number(*rank as u64).text(operation).number(*bytes as u64)
            }
            // What is wrong with settings, which all ranks say in the same words.
            Error::Strategy { problem } => self.byte(11).text(problem),
            Error::Plan { problem } => self.byte(12).text(problem),
            Error::Mesh { problem } => self.byte(13).text(problem),
            Error::Schedule { problem } => self.byte(14).text(problem),
            Error::Pipeline { problem } => self.byte(15).text(problem),
            Error::Optimizer { problem } => self.byte(16).text(problem),
            Error::Graph { problem } => self.byte(17).text(problem),
            Error::ModelMismatch { group, rank, path, problem } => {
                self.byte(18).text(group).number(*rank as u64).text(path).text(problem)
            }
            Error::Nesting { operation, wrapper } => self.byte(19).text(operation).text(wrapper),
            Error::Environment { variable, value, expected } => self.byte(20).text(variable).text(value).text(expected),
            Error::NoSuchRank { group, rank, size, operation } => {
                self.byte(21).text(group).number(*rank as u64).number(*size as u64).text(operation)
            }
            Error::UnsupportedDType { operation, dtype } if number(*dtype).is_some() => {
                self.byte(22).text(operation).dtype(Some(*dtype))
            }
            Error::UnsupportedReduction { op, dtype, advice } if number(*dtype).is_some() => {
                self.byte(23).reduction(Some(*op)).dtype(Some(*dtype)).text(advice)
            }
            Error::Checkpoint { problem } => self.byte(24).text(problem),
            Error::Stage { group, rank, action, cause } => {
                self.byte(25).text(group).number(*rank as u64).text(action).error(cause)
            }
            Error::NonFinite { path, rank } => self.byte(26).text(path).number(*rank as u64),
            Error::Gpu { problem } => self.byte(27).text(problem),
            Error::Nccl { group, rank, operation, problem } => {
                self.byte(28).text(group).number(*rank as u64).text(operation).text(problem)
            }
            Error::Launch { rank, size, problem } => {
                self.byte(29).number(*rank as u64).number(*size as u64).text(problem)
            }
            Error::ProcessFailed { rank, size, status, said } => {
                self.byte(30).number(rank.map_or(u64::MAX, |rank| rank as u64)).number(*size as u64).text(status);
                self.list(said, |w, line| {
                    w.text(line);
                })
            }
            Error::Stopped { signal } => self.byte(31).number(signal.number() as u64),
            Error::Settings { group, rank, name, value, value_of_0 } => {
                self.byte(32).text(group).number(*rank as u64).text(name).text(value).text(value_of_0)
            }
            // Dtypes that cannot travel have no number: their error goes in words.
            Error::UnsupportedDType { .. } | Error::UnsupportedReduction { .. } | Error::User(_) => {
                self.byte(9).text(&error.to_string())
            }
        }
    }
}

/// Names of operations and transports that came from others. So few are kept, and each once, that no peer can fill the
/// memory with them; this program has fewer of its own.
pub(super) struct StaticNames(Mutex<BTreeSet<&'static str>>);

static NAMES: StaticNames = StaticNames::new();

impl StaticNames {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(BTreeSet::new()))
    }

    /// The name, for good; or what stands for it when there are too many.
    pub(super) fn keep(&self, name: &str) -> &'static str {
        let mut names = lock(&self.0);
        match names.get(name) {
            Some(name) => name,
            None if names.len() < MOST_NAMES => {
                let name: &'static str = name.to_owned().leak();
                names.insert(name);
                name
            }
            None => "an operation",
        }
    }
}

impl Reader<'_> {
    fn name(&mut self) -> Option<Arc<str>> {
        self.text().map(Into::into)
    }

    /// A text with static lifetime, as errors hold the names of operations.
    fn message(&mut self) -> Option<&'static str> {
        self.text().filter(|text| text.len() <= LONGEST_WORD).map(|text| NAMES.keep(&text))
    }

    fn log(&mut self) -> Option<CallLog> {
        self.list(Self::text).map(|lines| CallLog::new(lines.into_iter()))
    }

    pub fn error(&mut self) -> Option<Error> {
        self.error_within(DEEPEST)
    }

    fn error_within(&mut self, depth: usize) -> Option<Error> {
        Some(match self.byte()? {
            0 => Error::Timeout {
                group: self.name()?,
                rank: self.index()?,
                operation: self.text()?,
                waited: Duration::from_nanos(self.number()?),
                missing: self.text()?,
                log: self.log()?,
            },
            1 => Error::Mismatch {
                group: self.name()?,
                sequence: self.number()?,
                calls: self.list(Self::call)?,
                log: self.log()?,
            },
            2 => Error::UnexpectedMessage {
                group: self.name()?,
                from: self.index()?,
                to: self.index()?,
                tag: self.number()?,
                expected: self.text()?,
                found: self.text()?,
                log: self.log()?,
            },
            3 => {
                Error::RankLost { group: self.name()?, rank: self.index()?, operation: self.text()?, log: self.log()? }
            }
            4 => Error::RankPanicked { rank: self.index()?, message: self.text()?, log: self.log()? },
            5 => Error::RankFailed {
                rank: self.index()?,
                cause: Box::new(self.error_within(depth.checked_sub(1)?)?),
                log: self.log()?,
            },
            6 => Error::Aborted { group: self.name()?, rank: self.index()?, reason: self.text()?, log: self.log()? },
            7 => Error::InvalidArgument { operation: self.message()?, problem: self.text()? },
            8 => Error::Transport { transport: self.message()?, problem: self.text()? },
            9 => Error::User(self.text()?),
            10 => Error::OutOfMemory {
                group: self.name()?,
                rank: self.index()?,
                operation: self.text()?,
                bytes: self.index()?,
            },
            11 => Error::Strategy { problem: self.text()? },
            12 => Error::Plan { problem: self.text()? },
            13 => Error::Mesh { problem: self.text()? },
            14 => Error::Schedule { problem: self.text()? },
            15 => Error::Pipeline { problem: self.text()? },
            16 => Error::Optimizer { problem: self.text()? },
            17 => Error::Graph { problem: self.text()? },
            18 => Error::ModelMismatch {
                group: self.name()?,
                rank: self.index()?,
                path: self.text()?,
                problem: self.text()?,
            },
            19 => Error::Nesting { operation: self.message()?, wrapper: self.message()? },
            20 => Error::Environment { variable: self.message()?, value: self.text()?, expected: self.message()? },
            21 => Error::NoSuchRank {
                group: self.name()?,
                rank: self.index()?,
                size: self.index()?,
                operation: self.message()?,
            },
            22 => Error::UnsupportedDType { operation: self.message()?, dtype: self.dtype()?? },
            23 => Error::UnsupportedReduction { op: self.reduction()?, dtype: self.dtype()??, advice: self.message()? },
            24 => Error::Checkpoint { problem: self.text()? },
            25 => Error::Stage {
                group: self.name()?,
                rank: self.index()?,
                action: self.text()?,
                cause: Box::new(self.error_within(depth.checked_sub(1)?)?),
            },
            26 => Error::NonFinite { path: self.text()?, rank: self.index()? },
            27 => Error::Gpu { problem: self.text()? },
            28 => {
                Error::Nccl { group: self.name()?, rank: self.index()?, operation: self.text()?, problem: self.text()? }
            }
            29 => Error::Launch { rank: self.index()?, size: self.index()?, problem: self.text()? },
            30 => Error::ProcessFailed {
                rank: match self.number()? {
                    u64::MAX => None,
                    rank => Some(rank.try_into().ok()?),
                },
                size: self.index()?,
                status: self.text()?,
                said: self.list(Self::text)?,
            },
            31 => {
                let number = self.number().filter(|number| (1..=MOST_SIGNAL).contains(number))?;
                Error::Stopped { signal: StopSignal::new(number as i32) }
            }
            32 => Error::Settings {
                group: self.name()?,
                rank: self.index()?,
                name: self.text()?,
                value: self.text()?,
                value_of_0: self.text()?,
            },
            _ => return None,
        })
    }
}

/// Puts the last calls of all ranks into an error that has a log.
pub(in crate::comm::message_passing) fn with_log(mut error: Error, complete: CallLog) -> Error {
    match &mut error {
        Error::Timeout { log, .. }
        | Error::Mismatch { log, .. }
        | Error::UnexpectedMessage { log, .. }
        | Error::RankLost { log, .. }
        | Error::RankPanicked { log, .. }
        | Error::RankFailed { log, .. }
        | Error::Aborted { log, .. } => *log = complete,
        _ => {}
    }
    error
}
