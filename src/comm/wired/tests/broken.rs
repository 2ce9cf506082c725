//! A wire that fails halfway, and does not give back what it was lent: it stays where it is.

use super::World;
use super::line::{Lent, Lines};
use crate::comm::wired::group::Kind;

/// More than goes into a header.
const LONG: usize = 10_000;

fn lines(refuses: (Kind, usize), holds: Option<Kind>) -> Lines {
    let refuses = Some((refuses.0 as u64, refuses.1));
    Lines::keeping(refuses, holds.map(|kind| kind as u64))
}

/// Asks for memory of many sizes: what was given back is had again, and written to.
fn use_what_is_free() -> Vec<Vec<u8>> {
    (0..4000).map(|number| vec![0xAA; 16 + number % 700]).chain((0..20).map(|_| vec![0xAA; 4 * LONG])).collect()
}

fn bytes_of(lent: &Lent) -> &'static [u8] {
    // SAFETY: this is what is tested: whoever lent it keeps it.
    unsafe { std::slice::from_raw_parts(lent.data, lent.len) }
}

#[test]
fn a_header_is_kept_when_its_bytes_cannot_be_sent() {
    let world = World::new(2, [0], lines((Kind::Payload, 0), Some(Kind::Header)));
    let error = world.comms[0].send(vec![5u8; LONG], 1, 0x77).unwrap_err().to_string();
    assert!(error.contains("refused on purpose"), "{error}");
    let header = world.lines.under_way().into_iter().find(|lent| lent.way.2 == Kind::Header as u64).unwrap();
    let before = bytes_of(&header).to_vec();
    let used = use_what_is_free();
    assert_eq!(bytes_of(&header), before);
    assert_eq!(before[8..16], 0x77u64.to_le_bytes(), "the tag");
    assert!(used.iter().all(|other| !other.as_ptr_range().contains(&header.data.cast_const())));
}

#[test]
fn a_call_is_kept_when_the_word_cannot_be_awaited() {
    // Nobody decides: after a while the rank turns back, and the wire keeps both.
    let world = World::new(2, [1], Lines::keeping(None, Some(Kind::Call as u64)));
    let comm = world.comms[0].clone();
    let waits = std::thread::spawn(move || comm.barrier());
    let kept = loop {
        let (sent, awaited) = (world.lines.under_way(), world.lines.awaited());
        if let ([call], [word]) = (&sent[..], &awaited[..]) {
            break [*call, *word].map(|lent| (lent.data.addr(), lent.len));
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
fn a_verdict_is_kept_when_it_cannot_be_sent_to_all() {
    let lines = lines((Kind::Verdict, 1), Some(Kind::Verdict));
    let world = World::new(3, [0], lines);
    let call = crate::comm::Call::new(crate::comm::Operation::Barrier, None, crate::comm::Extent::flat(0));
    let post = crate::comm::wired::agree::Post { call, color: 0, key: 0, reaches: false };
    for from in [1, 2] {
        world.lines.forge((from, 0, Kind::Call as u64), post.to_bytes().to_vec());
    }
    let error = world.comms[0].barrier().unwrap_err().to_string();
    assert!(error.contains("refused on purpose"), "{error}");
    let word = world.lines.under_way().into_iter().find(|lent| lent.way.2 == Kind::Verdict as u64).unwrap();
    let before = bytes_of(&word).to_vec();
    let _used = use_what_is_free();
    assert_eq!(bytes_of(&word), before);
}
