//! Calls and errors as bytes.
//!
//! All ranks of a world return the same error, so an error crosses from process to process as the variant that it is. What
//! is not an error of a world itself, but of the code that ran in it, crosses as [`Error::User`] with its text.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{BoolStore, DType};

use crate::Error;
use crate::comm::{Call, CallLog, Extent, Operation, ReduceOp};

/// The element types that travel, by code.
const DTYPES: [DType; 14] = [
    DType::F64,
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::I64,
    DType::I32,
    DType::I16,
    DType::I8,
    DType::U64,
    DType::U32,
    DType::U16,
    DType::U8,
    DType::Bool(BoolStore::Native),
    DType::Bool(BoolStore::U8),
];
const NO_DTYPE: u8 = u8::MAX;
/// Bytes of the name of an operation or an engine.
const LONGEST_WORD: usize = 128;
/// Causes of causes that an error from elsewhere may have.
const DEEPEST: usize = 8;

/// Bytes being written.
#[derive(Debug, Default)]
pub(super) struct Writer(pub Vec<u8>);

impl Writer {
    pub fn byte(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    pub fn number(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub fn text(&mut self, value: &str) -> &mut Self {
        self.number(value.len() as u64);
        self.0.extend_from_slice(value.as_bytes());
        self
    }

    pub fn dtype(&mut self, dtype: Option<DType>) -> &mut Self {
        let code = dtype.and_then(|dtype| DTYPES.iter().position(|other| *other == dtype));
        self.byte(code.map_or(NO_DTYPE, |code| code as u8))
    }

    pub fn list<T>(&mut self, items: &[T], mut write: impl FnMut(&mut Self, &T)) -> &mut Self {
        self.number(items.len() as u64);
        items.iter().for_each(|item| write(self, item));
        self
    }

    pub fn call(&mut self, call: &Call) -> &mut Self {
        let (op, root, tag) = match call.operation {
            Operation::AllReduce(op) | Operation::ReduceScatter(op) => (Some(op), 0, 0),
            Operation::Reduce { op, root } => (Some(op), root, 0),
            Operation::Broadcast { root } | Operation::Gather { root } | Operation::Scatter { root } => (None, root, 0),
            Operation::Send { to, tag } => (None, to, tag),
            Operation::Receive { from, tag } => (None, from, tag),
            _ => (None, 0, 0),
        };
        let (code, factor) = match op {
            Some(ReduceOp::Sum) | None => (0, 0.0),
            Some(ReduceOp::Mean) => (1, 0.0),
            Some(ReduceOp::Max) => (2, 0.0),
            Some(ReduceOp::Min) => (3, 0.0),
            Some(ReduceOp::Product) => (4, 0.0),
            Some(ReduceOp::PreMulSum(factor)) => (5, factor),
        };
        self.byte(call.operation.index() as u8).byte(code).dtype(call.dtype);
        self.number(f64::to_bits(factor)).number(root as u64).number(tag).number(call.pieces as u64).number(call.cut);
        self.list(call.extent.dims(), |w, dim| {
            w.number(*dim as u64);
        })
    }

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
            other => self.byte(9).text(&other.to_string()),
        }
    }
}

/// Bytes being read; `None` when they are not what was expected.
pub(super) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn byte(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    pub fn number(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    pub fn index(&mut self) -> Option<usize> {
        self.number()?.try_into().ok()
    }

    pub fn text(&mut self) -> Option<String> {
        let len = self.index()?;
        Some(String::from_utf8_lossy(self.take(len)?).into_owned())
    }

    fn name(&mut self) -> Option<Arc<str>> {
        self.text().map(Into::into)
    }

    /// A text that lives as long as the program: an error holds the names of operations like this. A world fails once, so
    /// few are made; they are short, whoever sent them.
    fn word(&mut self) -> Option<&'static str> {
        self.text().filter(|text| text.len() <= LONGEST_WORD).map(|text| &*text.leak())
    }

    pub fn list<T>(&mut self, mut read: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let len = self.index()?;
        (0..len).map(|_| read(self)).collect()
    }

    pub fn dtype(&mut self) -> Option<Option<DType>> {
        match self.byte()? {
            NO_DTYPE => Some(None),
            code => DTYPES.get(code as usize).copied().map(Some),
        }
    }

    pub fn call(&mut self) -> Option<Call> {
        let (operation, code, dtype) = (self.byte()?, self.byte()?, self.dtype()?);
        let (factor, root, tag) = (f64::from_bits(self.number()?), self.index()?, self.number()?);
        let (pieces, cut) = (self.index()?, self.number()?);
        let dims = self.list(Self::index)?;
        // Whatever is worked out from these must not overflow.
        if dims.len() > 8 || dims.iter().try_fold(16usize, |bytes, dim| bytes.checked_mul((*dim).max(1))).is_none() {
            return None;
        }
        let op = match code {
            0 => ReduceOp::Sum,
            1 => ReduceOp::Mean,
            2 => ReduceOp::Max,
            3 => ReduceOp::Min,
            4 => ReduceOp::Product,
            5 => ReduceOp::PreMulSum(factor),
            _ => return None,
        };
        let operation = match *Operation::NAMES.get(operation as usize)? {
            "all_reduce" => Operation::AllReduce(op),
            "reduce_scatter" => Operation::ReduceScatter(op),
            "all_gather" => Operation::AllGather,
            "broadcast" => Operation::Broadcast { root },
            "reduce" => Operation::Reduce { op, root },
            "gather" => Operation::Gather { root },
            "scatter" => Operation::Scatter { root },
            "all_to_all" => Operation::AllToAll,
            "barrier" => Operation::Barrier,
            "split" => Operation::Split,
            "send" => Operation::Send { to: root, tag },
            "recv" => Operation::Receive { from: root, tag },
            _ => return None,
        };
        let mut call = Call::new(operation, dtype, Extent::new(&dims));
        (call.pieces, call.cut) = (pieces, cut);
        Some(call)
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
            7 => Error::InvalidArgument { operation: self.word()?, problem: self.text()? },
            8 => Error::Engine { engine: self.word()?, problem: self.text()? },
            9 => Error::User(self.text()?),
            _ => return None,
        })
    }
}

/// Puts the calls of all ranks into an error that tells of them.
pub(super) fn with_log(mut error: Error, complete: CallLog) -> Error {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(error: &Error) -> Option<Error> {
        let mut writer = Writer::default();
        writer.error(error);
        let mut reader = Reader(&writer.0);
        let back = reader.error();
        assert!(reader.0.is_empty() || back.is_none());
        back
    }

    #[test]
    fn every_error_of_a_world_survives() {
        let (group, log): (Arc<str>, _) =
            ("world/tp1".into(), CallLog::new(["rank 0: nothing yet".to_owned()].into_iter()));
        let op = ReduceOp::PreMulSum(-0.3);
        let operations = [
            Operation::AllReduce(op),
            Operation::ReduceScatter(ReduceOp::Mean),
            Operation::AllGather,
            Operation::Broadcast { root: 3 },
            Operation::Reduce { op: ReduceOp::Min, root: 1 },
            Operation::Gather { root: 2 },
            Operation::Scatter { root: 0 },
            Operation::AllToAll,
            Operation::Barrier,
            Operation::Split,
            Operation::Send { to: 1, tag: u64::MAX },
            Operation::Receive { from: 2, tag: 7 },
        ];
        let mut calls = Vec::new();
        for (place, operation) in operations.into_iter().enumerate() {
            let dtype = if place == 8 { None } else { Some(DTYPES[place]) };
            let mut call = Call::new(operation, dtype, Extent::new(&vec![place; place.min(8)]));
            (call.pieces, call.cut) = (place, u64::MAX - place as u64);
            calls.push(call);
        }
        let lost = Error::RankLost { group: group.clone(), rank: 2, operation: "barrier".into(), log: log.clone() };
        let errors = [
            Error::Timeout {
                group: group.clone(),
                rank: 1,
                operation: "barrier".into(),
                waited: Duration::from_nanos(1_234_567_891),
                missing: "ranks 2, 3".into(),
                log: log.clone(),
            },
            Error::Mismatch { group: group.clone(), sequence: 9, calls, log: log.clone() },
            Error::UnexpectedMessage {
                group: group.clone(),
                from: 1,
                to: 0,
                tag: 5,
                expected: "a".into(),
                found: "b".into(),
                log: log.clone(),
            },
            Error::RankPanicked { rank: 0, message: "häßlich".into(), log: log.clone() },
            Error::RankFailed { rank: 3, cause: Box::new(lost.clone()), log: log.clone() },
            lost,
            Error::Aborted { group, rank: 0, reason: String::new(), log },
            Error::InvalidArgument { operation: "scatter", problem: "no".into() },
            Error::Engine { engine: "mpi", problem: "no".into() },
            Error::User("the disk is full".into()),
        ];
        for error in &errors {
            assert_eq!(there_and_back(error).as_ref(), Some(error));
        }
        let other = Error::Plan { problem: "does not fit".into() };
        assert_eq!(there_and_back(&other), Some(Error::User(other.to_string())));
    }

    #[test]
    fn what_would_overflow_is_garbled() {
        let garbled = |dims: &[usize]| {
            let mut writer = Writer::default();
            writer.call(&Call::new(Operation::AllGather, Some(DType::F32), Extent::flat(0)));
            // The dims are the last that is written.
            writer.0.truncate(writer.0.len() - 16);
            writer.list(dims, |w, dim| {
                w.number(*dim as u64);
            });
            Reader(&writer.0).call().is_none()
        };
        assert!(!garbled(&[3, 4]));
        assert!(garbled(&[usize::MAX, 2]));
        assert!(garbled(&[0, usize::MAX / 2]));
        assert!(garbled(&[1; 9]));
        let mut error = Error::User(String::new());
        for _ in 0..DEEPEST + 1 {
            error = Error::RankFailed { rank: 0, cause: Box::new(error), log: CallLog::default() };
        }
        assert_eq!(there_and_back(&error), None);
    }

    #[test]
    fn cut_bytes_are_no_error() {
        let mut writer = Writer::default();
        writer.error(&Error::User("the disk is full".into()));
        for len in 0..writer.0.len() {
            assert_eq!(Reader(&writer.0[..len]).error(), None);
        }
    }
}
