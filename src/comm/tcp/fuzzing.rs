//! A connection whose other end says anything.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::frame::{HEAD, Head, Kind, Limits};
use super::ops::Ops;
pub use super::rendezvous::fuzzing::handshake;
use super::transit::{Lent, Place};

type Peer = super::peer::Peer<TcpStream>;

/// Bytes around a place that nobody may write to, and what is in them.
const AROUND: usize = 64;
const UNTOUCHED: u8 = 0xa5;
const LIMITS: Limits = Limits::STANDARD;
/// Tags in use: few, so that messages meet.
const TAGS: u64 = 4;

/// Two ends of a connection: sockets of the system, which are cheaper to make than those over TCP.
fn connected() -> (Peer, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    ours.set_nonblocking(true).and_then(|()| theirs.set_nonblocking(true)).expect("a socket that does not block");
    (Peer::new(Some(TcpStream::from(OwnedFd::from(ours))), LIMITS), theirs)
}

/// What the bytes decide.
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
            6 => LIMITS.whole + low - 128,
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

/// What is done to a peer by its own rank and by the other end, as the bytes say.
pub fn frames(bytes: &[u8]) {
    let ((mut peer, mut other), mut ops, mut dice) = (connected(), Ops::default(), Dice(bytes));
    // Lent to the peer until it is gone.
    let mut lent: Vec<(Box<[u8]>, usize)> = Vec::new();
    while play(&mut peer, &mut other, &mut ops, &mut dice, &mut lent).is_some() {
        work(&mut peer, &mut other, &mut ops);
    }
    let _ = other.shutdown(Shutdown::Write);
    for _ in 0..100_000 {
        work(&mut peer, &mut other, &mut ops);
        (0..TAGS).for_each(|tag| drop(peer.take(tag, LIMITS.whole, &mut ops)));
        if peer.closed.is_some() {
            break;
        }
    }
    assert!(peer.closed.is_some(), "the connection is over, and the peer does not know");
    assert!(!peer.is_open() && peer.owed <= LIMITS.credit && peer.owing <= LIMITS.credit);
    for (_, op) in &lent {
        peer.withdraw(*op);
    }
    drop(peer);
    for (room, _) in &lent {
        let edges = room[..AROUND].iter().chain(&room[room.len() - AROUND..]);
        assert!(edges.into_iter().all(|byte| *byte == UNTOUCHED), "something was written beside its place");
    }
}

fn work(peer: &mut Peer, other: &mut UnixStream, ops: &mut Ops) {
    peer.write(ops);
    peer.read(ops);
    let mut heard = [0; 1 << 16];
    while other.read(&mut heard).is_ok_and(|n| n > 0) {}
}

fn play(
    peer: &mut Peer,
    other: &mut UnixStream,
    ops: &mut Ops,
    dice: &mut Dice<'_>,
    lent: &mut Vec<(Box<[u8]>, usize)>,
) -> Option<()> {
    let (what, tag) = (dice.byte()?, u64::from(dice.byte()?) % TAGS);
    match what % 8 {
        0 | 1 => {
            let (len, op) = (dice.len()?.max(1), ops.begin());
            let mut room = vec![UNTOUCHED; AROUND + len + AROUND].into_boxed_slice();
            let data = room[AROUND..].as_mut_ptr();
            lent.push((room, op));
            match what % 8 {
                0 => peer.receive(tag, Place { data, len, op }, ops),
                _ => peer.send(tag, Lent { data, len, op }, ops),
            }
        }
        2 => drop(peer.take(tag, LIMITS.whole, ops)),
        3 => {
            if let Some((_, op)) = lent.get(usize::from(dice.byte()?)) {
                peer.withdraw(*op);
            }
        }
        4 => {
            let mut bytes = [0; HEAD];
            bytes.iter_mut().for_each(|byte| *byte = dice.byte().unwrap_or_default());
            let _ = other.write_all(&bytes);
        }
        _ => {
            let kind = [Kind::Whole, Kind::Whole, Kind::Offer, Kind::Accept, Kind::Part, Kind::Part, Kind::Credit];
            let kind = kind[usize::from(dice.byte()?) % kind.len()];
            let (len, id) = (dice.len()?, dice.any()?);
            let _ = other.write_all(&Head { kind, len, tag, id }.write());
            if matches!(kind, Kind::Whole | Kind::Part) {
                // As many as said, as a rule.
                let follow = if dice.byte()? < 230 { len } else { usize::from(dice.byte()?) };
                let _ = other.write_all(&vec![what; follow]);
            }
        }
    }
    Some(())
}
