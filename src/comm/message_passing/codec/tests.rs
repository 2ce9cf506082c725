//! Tests that what is encoded is decoded again, and that malformed bytes are refused.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::DType;

use super::error::{DEEPEST, MOST_NAMES, StaticNames};
use super::{Reader, Writer};
use crate::Error;
use crate::comm::{Call, CallLog, CallShape, Operation, ReduceOp, StepPart, agreed_names, element};

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
        Operation::AllReduce(ReduceOp::PreMulSum(f64::NAN)),
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
        let dtype = element::numbered(place as u8).filter(|_| place != 8);
        let mut call = Call::new(operation, dtype, CallShape::new(&vec![place; place.min(8)]));
        (call.buffers, call.fingerprint) = (place, u64::MAX - place as u64);
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
        Error::OutOfMemory { group: group.clone(), rank: 2, operation: "all_gather".into(), bytes: usize::MAX },
        Error::RankPanicked { rank: 0, message: "häßlich".into(), log: log.clone() },
        Error::RankFailed { rank: 3, cause: Box::new(lost.clone()), log: log.clone() },
        lost,
        Error::Aborted { group: group.clone(), rank: 0, reason: String::new(), log },
        Error::InvalidArgument { operation: "scatter", problem: "no".into() },
        Error::Transport { transport: "mpi", problem: "no".into() },
        Error::User("the disk is full".into()),
        Error::Strategy { problem: "1".into() },
        Error::Plan { problem: "2".into() },
        Error::Mesh { problem: "3".into() },
        Error::Schedule { problem: "4".into() },
        Error::Pipeline { problem: "5".into() },
        Error::Optimizer { problem: "6".into() },
        Error::Graph { problem: "7".into() },
        Error::ModelMismatch { group: "world".into(), rank: 1, path: "a.weight".into(), problem: "8".into() },
        Error::Nesting { operation: "data_parallel", wrapper: "Sharded" },
        Error::Environment { variable: "RANK", value: "x".into(), expected: "a number" },
        Error::NoSuchRank { group: group.clone(), rank: 7, size: 4, operation: "send" },
        Error::UnsupportedDType { operation: "send over NCCL", dtype: DType::I16 },
        Error::UnsupportedReduction { op: ReduceOp::Mean, dtype: DType::I32, advice: "cast it" },
        Error::Checkpoint { problem: "9".into() },
        Error::Stage {
            group: group.clone(),
            rank: 1,
            action: "1B3".into(),
            cause: Box::new(Error::User("the disk is full".into())),
        },
        Error::NonFinite { path: "a.weight".into(), rank: 2 },
        Error::Gpu { problem: "there is none".into() },
        Error::Nccl { group, rank: 0, operation: "send".into(), problem: "10".into() },
        Error::Launch { rank: 1, size: 2, problem: "11".into() },
        Error::ProcessFailed { rank: Some(2), size: 3, status: "by signal 9".into(), said: vec!["a".into()] },
        Error::ProcessFailed { rank: None, size: 3, status: "with exit status 1".into(), said: Vec::new() },
        Error::Settings {
            group: "world".into(),
            rank: 1,
            name: "clip".into(),
            value: "2".into(),
            value_of_0: "not given".into(),
        },
        Error::Stopped { signal: crate::error::StopSignal::new(15) },
    ];
    for error in &errors {
        assert_eq!(there_and_back(error).as_ref(), Some(error));
        // As all ranks say what the function of one of them returned.
        let failed = Error::RankFailed { rank: 2, cause: Box::new(error.clone()), log: CallLog::default() };
        assert_eq!(there_and_back(&failed).map(|failed| failed.to_string()), Some(failed.to_string()));
    }
    // A dtype that does not travel has no number.
    let dtype = DType::QFloat(Default::default());
    let other = Error::UnsupportedDType { operation: "send", dtype };
    assert_eq!(there_and_back(&other), Some(Error::User(other.to_string())));
}

#[test]
fn what_would_overflow_is_garbled() {
    let garbled = |dims: &[usize]| {
        let mut writer = Writer::default();
        writer.call(&Call::new(Operation::AllGather, Some(DType::F32), CallShape::flat(0)));
        // Its one dim and the name are the last that is written.
        writer.0.truncate(writer.0.len() - 24);
        writer.list(dims, |w, dim| {
            w.number(*dim as u64);
        });
        writer.text("");
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

/// What another rank splits a group for is said by its name, if it does not lie.
#[test]
fn names_of_splits_travel() {
    let there = |number: u64, name: &str| {
        let mut call = Call::split("");
        call.fingerprint = number;
        let mut writer = Writer::default();
        writer.call(&call);
        // Nobody here knows the name, which comes last.
        writer.0.truncate(writer.0.len() - 8);
        writer.text(name);
        Reader(&writer.0).call().map(|call| call.to_string())
    };
    let number = agreed_names::number("what only another rank has");
    assert_eq!(there(number, "something else"), Some(format!("split by a name of hash {number:016x}")));
    assert_eq!(there(number, "what only another rank has").as_deref(), Some("split(what only another rank has)"));
    let number = agreed_names::number("two\nlines");
    assert_eq!(there(number, "two\nlines"), Some(format!("split by a name of hash {number:016x}")));
}

/// What all ranks can make of a number themselves does not travel.
#[test]
fn parts_of_steps_need_no_name() {
    let call = Call::new(Operation::AllGather, Some(DType::F64), CallShape::flat(7)).agreeing(StepPart::Norm.of(3));
    let mut writer = Writer::default();
    writer.call(&call);
    assert!(writer.0.ends_with(&0u64.to_le_bytes()), "a text of no bytes comes last");
    let back = Reader(&writer.0).call().unwrap();
    assert_eq!((back, back.to_string().as_str()), (call, "all_gather of F64 [7] (the norm of step 3)"));
}

#[test]
fn cut_bytes_are_no_error() {
    let mut writer = Writer::default();
    writer.error(&Error::User("the disk is full".into()));
    for len in 0..writer.0.len() {
        assert_eq!(Reader(&writer.0[..len]).error(), None);
    }
}

#[test]
fn names_of_others_take_no_more_and_more_memory() {
    let names = StaticNames::new();
    for number in 0..2 * MOST_NAMES {
        let name = format!("operation {number}");
        let kept = names.keep(&name);
        assert_eq!(kept, if number < MOST_NAMES { name.as_str() } else { "an operation" });
        // The same name is kept once.
        assert_eq!(kept.as_ptr(), names.keep(&name).as_ptr());
    }
    let operation = "operation".repeat(20).leak();
    assert_eq!(there_and_back(&Error::InvalidArgument { operation, problem: String::new() }), None);
}
