//! Encodes errors as bytes.

use std::sync::Arc;
use std::time::Duration;

use super::{Reader, Writer};
use crate::Error;
use crate::comm::CallLog;

/// Most bytes of the name of an operation or a transport.
const LONGEST_WORD: usize = 128;
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
            Error::Engine { engine, problem } => self.byte(8).text(engine).text(problem),
            Error::OutOfMemory { group, rank, operation, bytes } => {
                self.byte(10).text(group).number(*rank as u64).text(operation).number(*bytes as u64)
            }
            other => self.byte(9).text(&other.to_string()),
        }
    }
}

impl Reader<'_> {
    fn name(&mut self) -> Option<Arc<str>> {
        self.text().map(Into::into)
    }

    /// A text with static lifetime, as errors hold the names of operations. A world fails once, so few are leaked; they
    /// are short, whoever sent them.
    fn message(&mut self) -> Option<&'static str> {
        self.text().filter(|text| text.len() <= LONGEST_WORD).map(|text| &*text.leak())
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
            8 => Error::Engine { engine: self.message()?, problem: self.text()? },
            9 => Error::User(self.text()?),
            10 => Error::OutOfMemory {
                group: self.name()?,
                rank: self.index()?,
                operation: self.text()?,
                bytes: self.index()?,
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
