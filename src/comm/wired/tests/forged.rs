//! A rank that lies: it sends what no rank would.

use burn::tensor::DType;

use super::World;
use super::line::Lines;
use crate::Error;
use crate::comm::wired::agree::{POST, Post};
use crate::comm::wired::board::Address;
use crate::comm::wired::codec::Writer;
use crate::comm::wired::group::Kind;
use crate::comm::{Call, Communicator, Extent, Operation, ReduceOp, part};

fn post(call: &Call) -> Post {
    Post { call: *call, color: 0, key: 0, reaches: false }
}

/// The word of a decider.
fn word(posts: &[Post]) -> Vec<u8> {
    let mut word = posts.iter().map(|post| post.to_bytes()).collect::<Vec<[u8; POST]>>().concat();
    word.resize(word.len() + 8 + Address::BYTES, 0);
    word
}

fn table(calls: &[Call]) -> Vec<u8> {
    word(&calls.iter().map(post).collect::<Vec<_>>())
}

fn call(operation: Operation, dtype: DType, rows: usize) -> Call {
    Call::new(operation, Some(dtype), Extent::flat(rows))
}

/// The group goes on: the next word is heard, and taken.
fn goes_on(world: &World) {
    assert_eq!(world.comms[0].failure(), None);
    let calls = [call(Operation::AllReduce(ReduceOp::Sum), DType::F64, 0); 3];
    world.lines.forge((0, 1, Kind::Verdict as u64), table(&calls));
    assert_eq!(world.comms[0].all_reduce(vec![0.0f64; 0], ReduceOp::Sum), Ok(vec![]));
}

/// Together the ranks bring 2^64 bytes: none, to whoever counts in 64 bits.
#[test]
fn sizes_that_wrap_around_are_an_error_and_no_more() {
    let half = (1 << 60) - 1;
    type Ask = fn(&Communicator) -> Result<(), Error>;
    let gather: Ask = |comm| comm.all_gather(vec![1.0f64, 2.0]).map(drop);
    let into: Ask = |comm| comm.all_gather_into(&[1.0f64, 2.0], &mut [0.0; 0]);
    for ask in [gather, into] {
        // Rank 1 is true, and rank 0 decides.
        let world = World::new(3, [1], Lines::default());
        let calls = [half, 2, half].map(|rows| call(Operation::AllGather, DType::F64, rows));
        world.lines.forge((0, 1, Kind::Verdict as u64), table(&calls));
        let error = ask(&world.comms[0]).unwrap_err();
        let Error::OutOfMemory { rank: 0, bytes: usize::MAX, operation, .. } = &error else { panic!("{error:?}") };
        assert!(operation.ends_with(&format!("to which rank 0 brings {} bytes,", 8 * half)), "{operation}");
        goes_on(&world);
    }
}

/// There are addresses for a third of what the others claim to bring, and no memory.
#[test]
fn sizes_that_nobody_has_memory_for_are_an_error_and_no_more() {
    let half = (1 << 60) - 1;
    let world = World::new(3, [1], Lines::default());
    let mut calls = [half, 2, half].map(|rows| post(&call(Operation::AllToAll, DType::F64, rows)));
    world.lines.forge((0, 1, Kind::Verdict as u64), word(&calls));
    // At the second meeting the rank says what it lacks.
    let bytes = 8 * (2 * part(half, 3, 1).len() + part(2, 3, 1).len());
    calls[1].color = bytes as u64;
    world.lines.forge((0, 1, Kind::Verdict as u64), word(&calls));
    let error = world.comms[0].all_to_all(vec![1.0f64, 2.0]).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { rank: 1, bytes: lacks, .. } if lacks == bytes), "{error:?}");
    goes_on(&world);
}

#[test]
fn a_message_that_claims_more_than_there_is_memory_is_an_error() {
    let world = World::new(2, [0], Lines::default());
    let mut header = Writer::default();
    header.number(0).number(7).dtype(Some(DType::F32)).list(&[1 << 50, 3], |w, dim| {
        w.number(*dim);
    });
    world.lines.forge((1, 0, Kind::Header as u64), header.0);
    let error = world.comms[0].recv::<Vec<f32>>(1, 7).unwrap_err().to_string();
    let bytes = 12u64 << 50;
    assert!(error.contains(&format!("rank 0 of group `world` has no memory for the {bytes} bytes")), "{error}");
    assert!(error.contains("that rank 1 sends it with tag 7"), "{error}");
}

/// Every byte but 0 and 1, in place of bools.
#[test]
fn bytes_that_are_no_bools_are_refused_and_none_is_left() {
    let bools = DType::Bool(burn::tensor::BoolStore::Native);
    for byte in [2u8, 255] {
        let world = World::new(2, [1], Lines::default());
        let calls = [call(Operation::Broadcast { root: 0 }, bools, 3); 2];
        world.lines.forge((0, 1, Kind::Verdict as u64), table(&calls));
        world.lines.forge((0, 1, Kind::Parts as u64), vec![0, byte, 1]);
        let mut mine = [false; 3];
        let error = world.comms[0].broadcast_in_place(&mut mine, 0).unwrap_err().to_string();
        assert!(error.contains("no bools"), "{error}");
        // SAFETY: the slice's own bytes.
        let bytes = unsafe { std::slice::from_raw_parts(mine.as_ptr().cast::<u8>(), 3) };
        assert_eq!(bytes, [0, 1, 1]);

        let world = World::new(2, [1], Lines::default());
        let calls = [call(Operation::AllGather, bools, 2); 2];
        world.lines.forge((0, 1, Kind::Verdict as u64), table(&calls));
        world.lines.forge((0, 1, Kind::Parts as u64), vec![byte, 1]);
        let mut all = [false; 4];
        let error = world.comms[0].all_gather_into(&[true, false], &mut all).unwrap_err().to_string();
        assert!(error.contains("no bools"), "{error}");
        // SAFETY: as above.
        let bytes = unsafe { std::slice::from_raw_parts(all.as_ptr().cast::<u8>(), 4) };
        assert_eq!(bytes, [1, 1, 1, 0]);

        let world = World::new(2, [1], Lines::default());
        let mut header = Writer::default();
        header.number(0).number(3).dtype(Some(bools)).list(&[2], |w, dim| {
            w.number(*dim);
        });
        header.0.extend([1, byte]);
        world.lines.forge((0, 1, Kind::Header as u64), header.0);
        let error = world.comms[0].recv::<Vec<bool>>(0, 3).unwrap_err().to_string();
        assert!(error.contains("garbled"), "{error}");
    }
}
