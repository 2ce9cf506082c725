//! Tests of a connection whose other end is the test.

use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::frame::{EAGER_CREDIT, FrameHeader, FrameKind, HEADER_BYTES, Limits, MAX_DATA, MAX_EAGER};
use super::transfers::{RecvBuffer, SendBuffer};
use crate::comm::message_passing::RequestTable;

/// The two ends of a connection: one is a `Connection`, the other is played by the test.
fn connected() -> (Connection, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    (Connection::new(Some(stream), Limits::STANDARD), other)
}

fn until(what: &str, mut there: impl FnMut() -> bool) {
    let began = Instant::now();
    while !there() {
        assert!(began.elapsed() < Duration::from_secs(10), "{what}");
    }
}

fn header(kind: FrameKind, len: usize, tag: u64, id: u64) -> Vec<u8> {
    FrameHeader { kind, len, tag, id }.write().to_vec()
}

/// The error of a connection on bytes that violate the protocol.
fn objection(bytes: &[u8]) -> String {
    let ((mut connection, mut other), mut table) = (connected(), RequestTable::default());
    other.write_all(bytes).unwrap();
    until("an objection", || {
        connection.read(&mut table);
        connection.closed.is_some()
    });
    assert!(!connection.wants_to_write() && !connection.is_open());
    connection.closed.unwrap()
}

#[test]
fn what_makes_no_sense_ends_the_connection() {
    let huge = (1 << 56) - 1;
    let cases: [(Vec<u8>, &str); 11] = [
        (vec![0xff; HEADER_BYTES], "no message"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), "no message"),
        (header(FrameKind::Eager, 0, 1, 0), "0 bytes"),
        (header(FrameKind::Eager, MAX_EAGER + 1, 1, 0), "262145 bytes"),
        (header(FrameKind::Eager, huge, 1, 0), "bytes"),
        (header(FrameKind::Rts, 0, 1, 0), "offer of 0"),
        (header(FrameKind::Cts, 0, 0, 0), "never made"),
        (header(FrameKind::Data, 8, 0, 3), "unasked"),
        (header(FrameKind::Data, huge, 0, 3), "unasked"),
        (header(FrameKind::Credit, 1, 0, 0), "credit for 1"),
        (vec![1; 10], "ended"),
    ];
    for (bytes, words) in cases {
        let said = if bytes.len() == 10 { hangs_up_after(&bytes) } else { objection(&bytes) };
        assert!(said.contains(words), "`{words}` is missing in: {said}");
    }
}

fn hangs_up_after(bytes: &[u8]) -> String {
    let ((mut connection, mut other), mut table) = (connected(), RequestTable::default());
    other.write_all(bytes).unwrap();
    drop(other);
    until("the end", || {
        connection.read(&mut table);
        connection.closed.is_some()
    });
    connection.closed.unwrap()
}

/// No peer can fill this rank's memory with unexpected messages.
#[test]
fn credit_has_an_end() {
    let ((mut connection, mut other), mut table) = (connected(), RequestTable::default());
    let message = [header(FrameKind::Eager, MAX_EAGER, 1, 0), vec![0; MAX_EAGER]].concat();
    let writer = std::thread::spawn(move || (0..).take_while(|_| other.write_all(&message).is_ok()).count());
    until("an objection", || {
        connection.read(&mut table);
        connection.closed.is_some()
    });
    assert!(connection.closed.take().unwrap().contains("8388608 of 8388608 taken"));
    assert_eq!(connection.unexpected[&1].len(), EAGER_CREDIT / MAX_EAGER);
    // The writer goes on filling the system's buffers until the socket is gone.
    drop(connection);
    assert!(writer.join().unwrap() >= EAGER_CREDIT / MAX_EAGER);
    // An RTS of any size costs nothing before its CTS, and gets none if it does not fit.
    let ((mut connection, mut other), mut table) = (connected(), RequestTable::default());
    other.write_all(&header(FrameKind::Rts, 1 << 50, 1, 0)).unwrap();
    until("the offer", || {
        connection.read(&mut table);
        connection.pending_rts == 1
    });
    assert!(connection.take(1, 1 << 20, &mut table).is_none());
    assert!(connection.closed.unwrap().contains("1125899906842624 bytes came where 1048576 are the most"));
}

#[test]
fn random_bytes_do_no_harm() {
    let mut state = 7u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    };
    for _ in 0..200 {
        let ((mut connection, mut other), mut table) = (connected(), RequestTable::default());
        let mut buffer = vec![0u8; 64];
        let request = table.begin();
        connection.receive(2, RecvBuffer { data: buffer.as_mut_ptr(), len: 64, request }, &mut table);
        let mut bytes = Vec::new();
        for _ in 0..20 {
            let kind = [FrameKind::Eager, FrameKind::Rts, FrameKind::Cts, FrameKind::Data, FrameKind::Credit]
                [random() as usize % 5];
            bytes.extend(header(
                kind,
                [64, random() as usize % 300][random() as usize % 2],
                random() % 4,
                random() % 4,
            ));
            bytes.extend((0..random() % 100).map(|_| random() as u8));
        }
        other.write_all(&bytes).unwrap();
        other.shutdown(Shutdown::Write).unwrap();
        until("the end", || {
            connection.read(&mut table);
            (0..4).for_each(|tag| drop(connection.take(tag, 1000, &mut table)));
            connection.closed.is_some()
        });
        connection.reclaim(request);
    }
}

/// Small and large messages, received before and after they arrive, in order for each tag.
#[test]
fn messages_come_in_order_whatever_their_size() {
    let (mut here, there) = connected();
    there.set_nonblocking(true).unwrap();
    let mut there = Connection::new(Some(there), Limits::STANDARD);
    let (mut table, mut others) = (RequestTable::default(), RequestTable::default());
    let sizes = [1, 100, MAX_EAGER, MAX_EAGER + 1, 7, 3 * MAX_DATA + 5, EAGER_CREDIT - 1000, MAX_EAGER, 24];
    let messages: Vec<Vec<u8>> =
        sizes.iter().enumerate().map(|(i, size)| (0..*size).map(|j| (i * 31 + j) as u8).collect()).collect();
    let mut places: Vec<Vec<u8>> = sizes.iter().map(|size| vec![0; *size]).collect();
    let mut waited = Vec::new();
    // Every other receive is posted before its message arrives.
    for early in [true, false] {
        for (i, place) in places.iter_mut().enumerate().filter(|(i, _)| (i % 2 == 0) == early) {
            let request = others.begin();
            waited.push(request);
            let place = RecvBuffer { data: place.as_mut_ptr(), len: place.len(), request };
            there.receive(i as u64 % 2, place, &mut others);
        }
        if early {
            for (i, message) in messages.iter().enumerate() {
                let request = table.begin();
                here.send(
                    i as u64 % 2,
                    SendBuffer { data: message.as_ptr(), len: message.len(), request },
                    false,
                    &mut table,
                );
            }
            for _ in 0..100 {
                here.write(&mut table);
                there.read(&mut others);
                here.read(&mut table);
            }
        }
    }
    until("all messages", || {
        here.write(&mut table);
        there.read(&mut others);
        there.write(&mut others);
        here.read(&mut table);
        waited.iter().all(|request| others.is_done(*request))
    });
    assert!(places == messages);
    assert!(here.closed.is_none() && there.closed.is_none());
    assert!(here.credit_used <= EAGER_CREDIT && there.credit_held <= EAGER_CREDIT);
}

/// The message of a reclaimed receive is not taken for that of the receive behind it, eager or not.
#[test]
fn a_reclaimed_receive_keeps_its_place() {
    for size in [32, MAX_EAGER + 1] {
        let (mut here, there) = connected();
        there.set_nonblocking(true).unwrap();
        let mut there = Connection::new(Some(there), Limits::STANDARD);
        let (mut table, mut others) = (RequestTable::default(), RequestTable::default());
        let (mut first, mut second) = (vec![0u8; size], vec![0u8; 7]);
        let requests = [&mut first, &mut second].map(|buffer| {
            let request = others.begin();
            there.receive(1, RecvBuffer { data: buffer.as_mut_ptr(), len: buffer.len(), request }, &mut others);
            request
        });
        there.reclaim(requests[0]);
        drop(first);
        let messages = [vec![1u8; size], vec![2u8; 7]];
        for message in &messages {
            let request = table.begin();
            here.send(1, SendBuffer { data: message.as_ptr(), len: message.len(), request }, false, &mut table);
        }
        until("the second message", || {
            here.write(&mut table);
            there.read(&mut others);
            there.write(&mut others);
            here.read(&mut table);
            others.is_done(requests[1])
        });
        assert_eq!(second, messages[1]);
        assert!(here.closed.is_none() && there.closed.is_none());
    }
}

/// A reclaimed buffer is neither read nor written any more, and the messages behind it arrive all the same.
#[test]
fn what_is_withdrawn_is_left_alone() {
    let (mut here, there) = connected();
    there.set_nonblocking(true).unwrap();
    let mut there = Connection::new(Some(there), Limits::STANDARD);
    let (mut table, mut others) = (RequestTable::default(), RequestTable::default());
    // Large: nobody reads yet, so that it stays half written.
    let large = vec![1u8; 40 << 20];
    let mut place = vec![0u8; 40 << 20];
    let (sent, received) = (table.begin(), others.begin());
    there.receive(1, RecvBuffer { data: place.as_mut_ptr(), len: place.len(), request: received }, &mut others);
    here.send(1, SendBuffer { data: large.as_ptr(), len: large.len(), request: sent }, false, &mut table);
    until("some of it", || {
        there.read(&mut others);
        there.write(&mut others);
        here.read(&mut table);
        here.write(&mut table);
        there.data_receives.values().any(|receive| receive.got > 0) && here.wants_to_write()
    });
    here.reclaim(sent);
    there.reclaim(received);
    drop(large);
    let copy = place.clone();
    let (small, request, other) = (vec![7u8; 1000], table.begin(), others.begin());
    let mut small_place = vec![0u8; 1000];
    there.receive(2, RecvBuffer { data: small_place.as_mut_ptr(), len: 1000, request: other }, &mut others);
    here.send(2, SendBuffer { data: small.as_ptr(), len: 1000, request }, false, &mut table);
    until("the next one", || {
        here.write(&mut table);
        there.read(&mut others);
        others.is_done(other)
    });
    assert_eq!(small_place, small);
    assert!(place == copy, "nothing is written where nobody waits");
}
