//! Tests with a peer that sends malformed messages.

use burn::tensor::DType;

use super::TestWorld;
use super::memory_endpoint::MemoryNetwork;
use crate::Error;
use crate::comm::message_passing::call_descriptor::{CallDescriptor, DESCRIPTOR_BYTES};
use crate::comm::message_passing::codec::Writer;
use crate::comm::message_passing::group::MessageKind;
use crate::comm::message_passing::shared_memory::Address;
use crate::comm::{Call, CallShape, Communicator, Operation, ReduceOp, part};

fn descriptor(call: &Call) -> CallDescriptor {
    CallDescriptor { call: *call, color: 0, key: 0, attached: false }
}

/// The commit of a group root.
fn commit_message(descriptors: &[CallDescriptor]) -> Vec<u8> {
    let mut bytes =
        descriptors.iter().map(|descriptor| descriptor.to_bytes()).collect::<Vec<[u8; DESCRIPTOR_BYTES]>>().concat();
    bytes.resize(bytes.len() + 8 + Address::BYTES, 0);
    bytes
}

fn table(calls: &[Call]) -> Vec<u8> {
    commit_message(&calls.iter().map(descriptor).collect::<Vec<_>>())
}

fn call(operation: Operation, dtype: DType, rows: usize) -> Call {
    Call::new(operation, Some(dtype), CallShape::flat(rows))
}

/// The group goes on: the next commit is accepted.
fn goes_on(world: &TestWorld) {
    assert_eq!(world.comms[0].failure(), None);
    let calls = [call(Operation::AllReduce(ReduceOp::Sum), DType::F64, 0); 3];
    world.network.inject((0, 1, MessageKind::Commit as u64), table(&calls));
    assert_eq!(world.comms[0].all_reduce(vec![0.0f64; 0], ReduceOp::Sum), Ok(vec![]));
}

/// Together the ranks contribute 2^64 bytes, which wrap around to none in 64 bits.
#[test]
fn sizes_that_wrap_around_are_an_error_and_no_more() {
    let half = (1 << 60) - 1;
    type Gather = fn(&Communicator) -> Result<(), Error>;
    let gather: Gather = |comm| comm.all_gather(vec![1.0f64, 2.0]).map(drop);
    let into: Gather = |comm| comm.all_gather_into(&[1.0f64, 2.0], &mut [0.0; 0]);
    for run in [gather, into] {
        // Rank 1 is real, and rank 0 is the group root.
        let world = TestWorld::new(3, [1], MemoryNetwork::default());
        let calls = [half, 2, half].map(|rows| call(Operation::AllGather, DType::F64, rows));
        world.network.inject((0, 1, MessageKind::Commit as u64), table(&calls));
        let error = run(&world.comms[0]).unwrap_err();
        let Error::OutOfMemory { rank: 0, bytes: usize::MAX, operation, .. } = &error else { panic!("{error:?}") };
        assert!(operation.ends_with(&format!("to which rank 0 brings {} bytes,", 8 * half)), "{operation}");
        goes_on(&world);
    }
}

/// There are addresses for a third of what the others claim to contribute, and no memory.
#[test]
fn sizes_that_nobody_has_memory_for_are_an_error_and_no_more() {
    let half = (1 << 60) - 1;
    let world = TestWorld::new(3, [1], MemoryNetwork::default());
    let mut calls = [half, 2, half].map(|rows| descriptor(&call(Operation::AllToAll, DType::F64, rows)));
    world.network.inject((0, 1, MessageKind::Commit as u64), commit_message(&calls));
    // In the second agreement the rank says what it lacks.
    let bytes = 8 * (2 * part(half, 3, 1).len() + part(2, 3, 1).len());
    calls[1].color = bytes as u64;
    world.network.inject((0, 1, MessageKind::Commit as u64), commit_message(&calls));
    let error = world.comms[0].all_to_all(vec![1.0f64, 2.0]).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { rank: 1, bytes: lacks, .. } if lacks == bytes), "{error:?}");
    goes_on(&world);
}

#[test]
fn a_message_that_claims_more_than_there_is_memory_is_an_error() {
    let world = TestWorld::new(2, [0], MemoryNetwork::default());
    let mut header = Writer::default();
    header.number(0).number(7).dtype(Some(DType::F32)).list(&[1 << 50, 3], |w, dim| {
        w.number(*dim);
    });
    world.network.inject((1, 0, MessageKind::Header as u64), header.0);
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
        let world = TestWorld::new(2, [1], MemoryNetwork::default());
        let calls = [call(Operation::Broadcast { root: 0 }, bools, 3); 2];
        world.network.inject((0, 1, MessageKind::Commit as u64), table(&calls));
        world.network.inject((0, 1, MessageKind::Contributions as u64), vec![0, byte, 1]);
        let mut mine = [false; 3];
        let error = world.comms[0].broadcast_in_place(&mut mine, 0).unwrap_err().to_string();
        assert!(error.contains("no bools"), "{error}");
        // SAFETY: the slice's own bytes.
        let bytes = unsafe { std::slice::from_raw_parts(mine.as_ptr().cast::<u8>(), 3) };
        assert_eq!(bytes, [0, 1, 1]);

        let world = TestWorld::new(2, [1], MemoryNetwork::default());
        let calls = [call(Operation::AllGather, bools, 2); 2];
        world.network.inject((0, 1, MessageKind::Commit as u64), table(&calls));
        world.network.inject((0, 1, MessageKind::Contributions as u64), vec![byte, 1]);
        let mut all = [false; 4];
        let error = world.comms[0].all_gather_into(&[true, false], &mut all).unwrap_err().to_string();
        assert!(error.contains("no bools"), "{error}");
        // SAFETY: as above.
        let bytes = unsafe { std::slice::from_raw_parts(all.as_ptr().cast::<u8>(), 4) };
        assert_eq!(bytes, [1, 1, 1, 0]);

        let world = TestWorld::new(2, [1], MemoryNetwork::default());
        let mut header = Writer::default();
        header.number(0).number(3).dtype(Some(bools)).list(&[2], |w, dim| {
            w.number(*dim);
        });
        header.0.extend([1, byte]);
        world.network.inject((0, 1, MessageKind::Header as u64), header.0);
        let error = world.comms[0].recv::<Vec<bool>>(0, 3).unwrap_err().to_string();
        assert!(error.contains("garbled"), "{error}");
    }
}
