//! Tests with an endpoint that fails halfway and does not give buffers back: they are leaked.

use super::TestWorld;
use super::memory_endpoint::MemoryNetwork;
use crate::comm::message_passing::group::MessageKind;
use crate::comm::message_passing::message_store::Borrowed;

/// More than goes into a header.
const LONG: usize = 10_000;

fn network(refuses: (MessageKind, usize), holds: Option<MessageKind>) -> MemoryNetwork {
    let refuses = Some((refuses.0 as u64, refuses.1));
    MemoryNetwork::never_returning(refuses, holds.map(|kind| kind as u64))
}

/// Allocates memory of many sizes: freed memory is allocated again, and written to.
fn use_what_is_free() -> Vec<Vec<u8>> {
    (0..4000).map(|number| vec![0xAA; 16 + number % 700]).chain((0..20).map(|_| vec![0xAA; 4 * LONG])).collect()
}

fn bytes_of(lent: &Borrowed) -> &'static [u8] {
    // SAFETY: this is what is tested: the memory is leaked.
    unsafe { std::slice::from_raw_parts(lent.data, lent.len) }
}

#[test]
fn a_header_is_kept_when_its_bytes_cannot_be_sent() {
    let world = TestWorld::new(2, [0], network((MessageKind::Payload, 0), Some(MessageKind::Header)));
    let error = world.comms[0].send(vec![5u8; LONG], 1, 0x77).unwrap_err().to_string();
    assert!(error.contains("refused on purpose"), "{error}");
    let header =
        world.network.under_way().into_iter().find(|lent| lent.envelope.2 == MessageKind::Header as u64).unwrap();
    let before = bytes_of(&header).to_vec();
    let used = use_what_is_free();
    assert_eq!(bytes_of(&header), before);
    assert_eq!(before[8..16], 0x77u64.to_le_bytes(), "the tag");
    assert!(used.iter().all(|other| !other.as_ptr_range().contains(&header.data.cast_const())));
}

#[test]
fn a_call_is_kept_when_the_commit_cannot_be_awaited() {
    // Nobody commits: after a while the rank turns back, and the endpoint keeps both.
    let world = TestWorld::new(2, [1], MemoryNetwork::never_returning(None, Some(MessageKind::Call as u64)));
    let comm = world.comms[0].clone();
    let waits = std::thread::spawn(move || comm.barrier());
    let kept = loop {
        let (sent, awaited) = (world.network.under_way(), world.network.awaited());
        if let ([call], [message]) = (&sent[..], &awaited[..]) {
            break [*call, *message].map(|lent| (lent.data.addr(), lent.len));
        }
        std::thread::yield_now();
    };
    world.comms[0].abort("on purpose");
    assert!(waits.join().unwrap().is_err());
    for other in use_what_is_free() {
        let range = other.as_ptr().addr()..other.as_ptr().addr() + other.len();
        assert!(kept.iter().all(|(data, len)| data + len <= range.start || range.end <= *data));
    }
}

#[test]
fn a_commit_is_kept_when_it_cannot_be_sent_to_all() {
    let network = network((MessageKind::Commit, 1), Some(MessageKind::Commit));
    let world = TestWorld::new(3, [0], network);
    let call = crate::comm::Call::new(crate::comm::Operation::Barrier, None, crate::comm::CallShape::flat(0));
    let descriptor =
        crate::comm::message_passing::call_descriptor::CallDescriptor { call, color: 0, key: 0, attached: false };
    for from in [1, 2] {
        world.network.inject((from, 0, MessageKind::Call as u64), descriptor.to_bytes().to_vec());
    }
    let error = world.comms[0].barrier().unwrap_err().to_string();
    assert!(error.contains("refused on purpose"), "{error}");
    let message =
        world.network.under_way().into_iter().find(|lent| lent.envelope.2 == MessageKind::Commit as u64).unwrap();
    let before = bytes_of(&message).to_vec();
    let _used = use_what_is_free();
    assert_eq!(bytes_of(&message), before);
}
