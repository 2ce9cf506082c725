//! A connection whose other end is the test.

use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::frame::{CREDIT, HEAD, Head, Kind, Limits, PART, WHOLE};
use super::ops::Ops;
use super::peer::Peer;
use super::transit::{Lent, Place};

/// The two ends of a connection: one is a peer, the other whatever the test wants to be.
fn connected() -> (Peer, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    (Peer::new(Some(stream), Limits::STANDARD), other)
}

fn until(what: &str, mut there: impl FnMut() -> bool) {
    let began = Instant::now();
    while !there() {
        assert!(began.elapsed() < Duration::from_secs(10), "{what}");
    }
}

fn head(kind: Kind, len: usize, tag: u64, id: u64) -> Vec<u8> {
    Head { kind, len, tag, id }.write().to_vec()
}

/// What a peer says of bytes that it should not have been sent.
fn objection(bytes: &[u8]) -> String {
    let ((mut peer, mut other), mut ops) = (connected(), Ops::default());
    other.write_all(bytes).unwrap();
    until("an objection", || {
        peer.read(&mut ops);
        peer.closed.is_some()
    });
    assert!(!peer.wants_to_write() && !peer.is_open());
    peer.closed.unwrap()
}

#[test]
fn what_makes_no_sense_ends_the_connection() {
    let huge = (1 << 56) - 1;
    let cases: [(Vec<u8>, &str); 11] = [
        (vec![0xff; HEAD], "no message"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), "no message"),
        (head(Kind::Whole, 0, 1, 0), "0 bytes"),
        (head(Kind::Whole, WHOLE + 1, 1, 0), "262145 bytes"),
        (head(Kind::Whole, huge, 1, 0), "bytes"),
        (head(Kind::Offer, 0, 1, 0), "offer of 0"),
        (head(Kind::Accept, 0, 0, 0), "never made"),
        (head(Kind::Part, 8, 0, 3), "unasked"),
        (head(Kind::Part, huge, 0, 3), "unasked"),
        (head(Kind::Credit, 1, 0, 0), "credit for 1"),
        (vec![1; 10], "ended"),
    ];
    for (bytes, words) in cases {
        let said = if bytes.len() == 10 { hangs_up_after(&bytes) } else { objection(&bytes) };
        assert!(said.contains(words), "`{words}` is missing in: {said}");
    }
}

fn hangs_up_after(bytes: &[u8]) -> String {
    let ((mut peer, mut other), mut ops) = (connected(), Ops::default());
    other.write_all(bytes).unwrap();
    drop(other);
    until("the end", || {
        peer.read(&mut ops);
        peer.closed.is_some()
    });
    peer.closed.unwrap()
}

/// Nobody can fill this rank's memory with what it has not asked for.
#[test]
fn credit_has_an_end() {
    let ((mut peer, mut other), mut ops) = (connected(), Ops::default());
    let message = [head(Kind::Whole, WHOLE, 1, 0), vec![0; WHOLE]].concat();
    let writer = std::thread::spawn(move || (0..).take_while(|_| other.write_all(&message).is_ok()).count());
    until("an objection", || {
        peer.read(&mut ops);
        peer.closed.is_some()
    });
    assert!(peer.closed.take().unwrap().contains("8388608 of 8388608 taken"));
    assert_eq!(peer.came[&1].len(), CREDIT / WHOLE);
    // The writer goes on filling the system's buffers until the socket is gone.
    drop(peer);
    assert!(writer.join().unwrap() >= CREDIT / WHOLE);
    // An offer of any size costs nothing before it is accepted, and is not accepted if it does not fit.
    let ((mut peer, mut other), mut ops) = (connected(), Ops::default());
    other.write_all(&head(Kind::Offer, 1 << 50, 1, 0)).unwrap();
    until("the offer", || {
        peer.read(&mut ops);
        peer.offers == 1
    });
    assert!(peer.take(1, 1 << 20, &mut ops).is_none());
    assert!(peer.closed.unwrap().contains("1125899906842624 bytes came where 1048576 are the most"));
}

#[test]
fn random_bytes_do_no_harm() {
    let mut state = 7u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    };
    for _ in 0..200 {
        let ((mut peer, mut other), mut ops) = (connected(), Ops::default());
        let mut room = vec![0u8; 64];
        let op = ops.begin();
        peer.receive(2, Place { data: room.as_mut_ptr(), len: 64, op }, &mut ops);
        let mut bytes = Vec::new();
        for _ in 0..20 {
            let kind = [Kind::Whole, Kind::Offer, Kind::Accept, Kind::Part, Kind::Credit][random() as usize % 5];
            bytes.extend(head(kind, [64, random() as usize % 300][random() as usize % 2], random() % 4, random() % 4));
            bytes.extend((0..random() % 100).map(|_| random() as u8));
        }
        other.write_all(&bytes).unwrap();
        other.shutdown(Shutdown::Write).unwrap();
        until("the end", || {
            peer.read(&mut ops);
            (0..4).for_each(|tag| drop(peer.take(tag, 1000, &mut ops)));
            peer.closed.is_some()
        });
        peer.withdraw(op);
    }
}

/// Small and large messages, asked for before and after they come, in order for each tag.
#[test]
fn messages_come_in_order_whatever_their_size() {
    let (mut here, there) = connected();
    there.set_nonblocking(true).unwrap();
    let mut there = Peer::new(Some(there), Limits::STANDARD);
    let (mut ops, mut others) = (Ops::default(), Ops::default());
    let sizes = [1, 100, WHOLE, WHOLE + 1, 7, 3 * PART + 5, CREDIT - 1000, WHOLE, 24];
    let messages: Vec<Vec<u8>> =
        sizes.iter().enumerate().map(|(i, size)| (0..*size).map(|j| (i * 31 + j) as u8).collect()).collect();
    let mut places: Vec<Vec<u8>> = sizes.iter().map(|size| vec![0; *size]).collect();
    let mut waited = Vec::new();
    // Every other one is asked for before it comes.
    for early in [true, false] {
        for (i, place) in places.iter_mut().enumerate().filter(|(i, _)| (i % 2 == 0) == early) {
            let op = others.begin();
            waited.push(op);
            let place = Place { data: place.as_mut_ptr(), len: place.len(), op };
            there.receive(i as u64 % 2, place, &mut others);
        }
        if early {
            for (i, message) in messages.iter().enumerate() {
                let op = ops.begin();
                here.send(i as u64 % 2, Lent { data: message.as_ptr(), len: message.len(), op }, &mut ops);
            }
            for _ in 0..100 {
                here.write(&mut ops);
                there.read(&mut others);
                here.read(&mut ops);
            }
        }
    }
    until("all messages", || {
        here.write(&mut ops);
        there.read(&mut others);
        there.write(&mut others);
        here.read(&mut ops);
        waited.iter().all(|op| others.is_done(*op))
    });
    assert!(places == messages);
    assert!(here.closed.is_none() && there.closed.is_none());
    assert!(here.owing <= CREDIT && there.owed <= CREDIT);
}

/// What has been taken back is neither read nor written any more, and those behind it come all the same.
#[test]
fn what_is_withdrawn_is_left_alone() {
    let (mut here, there) = connected();
    there.set_nonblocking(true).unwrap();
    let mut there = Peer::new(Some(there), Limits::STANDARD);
    let (mut ops, mut others) = (Ops::default(), Ops::default());
    // Large: nobody reads yet, so that it stays half written.
    let large = vec![1u8; 40 << 20];
    let mut place = vec![0u8; 40 << 20];
    let (sent, received) = (ops.begin(), others.begin());
    there.receive(1, Place { data: place.as_mut_ptr(), len: place.len(), op: received }, &mut others);
    here.send(1, Lent { data: large.as_ptr(), len: large.len(), op: sent }, &mut ops);
    until("some of it", || {
        there.read(&mut others);
        there.write(&mut others);
        here.read(&mut ops);
        here.write(&mut ops);
        there.accepted.values().any(|accepted| accepted.got > 0) && here.wants_to_write()
    });
    here.withdraw(sent);
    there.withdraw(received);
    drop(large);
    let copy = place.clone();
    let (small, op, other) = (vec![7u8; 1000], ops.begin(), others.begin());
    let mut small_place = vec![0u8; 1000];
    there.receive(2, Place { data: small_place.as_mut_ptr(), len: 1000, op: other }, &mut others);
    here.send(2, Lent { data: small.as_ptr(), len: 1000, op }, &mut ops);
    until("the next one", || {
        here.write(&mut ops);
        there.read(&mut others);
        others.is_done(other)
    });
    assert_eq!(small_place, small);
    assert!(place == copy, "nothing is written where nobody waits");
}
