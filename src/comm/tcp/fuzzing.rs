//! Fuzzes a connection: its other end sends anything.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::frame::{FrameHeader, FrameKind, HEADER_BYTES, Limits};
pub use super::rendezvous::fuzzing::handshake;
use super::transfers::{RecvBuffer, SendBuffer};
use crate::comm::message_passing::RequestTable;

type Connection = super::connection::Connection<TcpStream>;

/// Bytes around a buffer that nobody may write to, and their value.
const AROUND: usize = 64;
const UNTOUCHED: u8 = 0xa5;
const LIMITS: Limits = Limits::STANDARD;
/// Tags in use: few, so that sends and receives match.
const TAGS: u64 = 4;

/// Two ends of a connection: sockets of the system, which are cheaper to make than those over TCP.
fn connected() -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    ours.set_nonblocking(true).and_then(|()| theirs.set_nonblocking(true)).expect("a socket that does not block");
    (Connection::new(Some(TcpStream::from(OwnedFd::from(ours))), LIMITS), theirs)
}

/// Choices that the fuzzer's bytes make.
struct Dice<'a>(&'a [u8]);

impl Dice<'_> {
    fn byte(&mut self) -> Option<u8> {
        self.0.split_off_first().copied()
    }

    /// The length of a message: small as a rule, at times around the limits.
    fn len(&mut self) -> Option<usize> {
        let (kind, low) = (self.byte()?, usize::from(self.byte()?));
        Some(match kind % 8 {
            0..5 => low,
            5 => low * 64,
            6 => LIMITS.eager + low - 128,
            _ => LIMITS.credit + low - 128,
        })
    }

    fn any(&mut self) -> Option<u64> {
        Some(match self.byte()? {
            low @ 0..200 => u64::from(low % 8),
            _ => u64::from_le_bytes(std::array::from_fn(|_| self.byte().unwrap_or(0xff))),
        })
    }
}

/// Drives a connection, from its own rank and from the other end, as the bytes say.
pub fn frames(bytes: &[u8]) {
    let ((mut connection, mut other), mut table, mut dice) = (connected(), RequestTable::default(), Dice(bytes));
    // Borrowed by the connection until it is gone.
    let mut borrowed: Vec<(Box<[u8]>, usize)> = Vec::new();
    while play(&mut connection, &mut other, &mut table, &mut dice, &mut borrowed).is_some() {
        progress(&mut connection, &mut other, &mut table);
    }
    let _ = other.shutdown(Shutdown::Write);
    for _ in 0..100_000 {
        progress(&mut connection, &mut other, &mut table);
        (0..TAGS).for_each(|tag| drop(connection.take(tag, LIMITS.eager, &mut table)));
        if connection.closed.is_some() {
            break;
        }
    }
    assert!(connection.closed.is_some(), "the stream is closed, and the connection does not know");
    assert!(
        !connection.is_open() && connection.credit_held <= LIMITS.credit && connection.credit_used <= LIMITS.credit
    );
    for (_, request) in &borrowed {
        connection.reclaim(*request);
    }
    drop(connection);
    for (buffer, _) in &borrowed {
        let edges = buffer[..AROUND].iter().chain(&buffer[buffer.len() - AROUND..]);
        assert!(edges.into_iter().all(|byte| *byte == UNTOUCHED), "something was written outside its buffer");
    }
}

fn progress(connection: &mut Connection, other: &mut UnixStream, table: &mut RequestTable) {
    connection.write(table);
    connection.read(table);
    let mut received = [0; 1 << 16];
    while other.read(&mut received).is_ok_and(|n| n > 0) {}
}

fn play(
    connection: &mut Connection,
    other: &mut UnixStream,
    table: &mut RequestTable,
    dice: &mut Dice<'_>,
    borrowed: &mut Vec<(Box<[u8]>, usize)>,
) -> Option<()> {
    let (what, tag) = (dice.byte()?, u64::from(dice.byte()?) % TAGS);
    match what % 8 {
        0 | 1 => {
            let (len, request) = (dice.len()?.max(1), table.begin());
            let mut buffer = vec![UNTOUCHED; AROUND + len + AROUND].into_boxed_slice();
            let data = buffer[AROUND..].as_mut_ptr();
            borrowed.push((buffer, request));
            match what % 8 {
                0 => connection.receive(tag, RecvBuffer { data, len, request }, table),
                _ => connection.send(tag, SendBuffer { data, len, request }, false, table),
            }
        }
        2 => drop(connection.take(tag, LIMITS.eager, table)),
        3 => {
            if let Some((_, request)) = borrowed.get(usize::from(dice.byte()?)) {
                connection.reclaim(*request);
            }
        }
        4 => {
            let mut bytes = [0; HEADER_BYTES];
            bytes.iter_mut().for_each(|byte| *byte = dice.byte().unwrap_or_default());
            let _ = other.write_all(&bytes);
        }
        _ => {
            let kind = [
                FrameKind::Eager,
                FrameKind::Eager,
                FrameKind::Rts,
                FrameKind::Cts,
                FrameKind::Data,
                FrameKind::Data,
                FrameKind::Credit,
            ];
            let kind = kind[usize::from(dice.byte()?) % kind.len()];
            let (len, id) = (dice.len()?, dice.any()?);
            let _ = other.write_all(&FrameHeader { kind, len, tag, id }.write());
            if matches!(kind, FrameKind::Eager | FrameKind::Data) {
                // As many bytes as the header says, as a rule.
                let follow = if dice.byte()? < 230 { len } else { usize::from(dice.byte()?) };
                let _ = other.write_all(&vec![what; follow]);
            }
        }
    }
    Some(())
}
