//! Fuzzes both sides of the rendezvous handshake: the other side sends any bytes.

use std::io::{self, Read, Write};
use std::time::Duration;

use super::client::Refused;
use super::messages::read_reply;
use super::{Digest, MAGIC, MAX_BLOB, Rendezvous};

/// The other side of a connection: its answers depend on what it has received.
struct Other<F> {
    received: Vec<u8>,
    says: Vec<u8>,
    said: usize,
    answer: F,
}

impl<F: FnMut(&[u8]) -> Vec<u8>> Write for Other<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.received.extend_from_slice(bytes);
        let answer = (self.answer)(&self.received);
        self.says.extend(answer);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<F> Read for Other<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = buffer.len().min(self.says.len() - self.said);
        buffer[..n].copy_from_slice(&self.says[self.said..][..n]);
        self.said += n;
        Ok(n)
    }
}

fn other<F: FnMut(&[u8]) -> Vec<u8>>(says: Vec<u8>, answer: F) -> Other<F> {
    Other { received: Vec::new(), says, said: 0, answer }
}

/// Choices that the fuzzer's bytes make, one after the other; zeros when they are all used.
struct Dice<'a>(&'a [u8]);

impl Dice<'_> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or_default()
    }

    /// Often the right value.
    fn number(&mut self, right: u64) -> u64 {
        match self.byte() {
            0..128 => right,
            128..192 => right.wrapping_add(self.byte().into()),
            _ => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = usize::from(self.byte()) * usize::from(1 + self.byte() % 16);
        (0..len).map(|_| self.byte()).collect()
    }

    fn sign(&mut self, right: Digest) -> (Digest, bool) {
        let mut digest = right;
        if self.byte() > 192 {
            digest[usize::from(self.byte() % 32)] ^= self.byte();
        }
        (digest, digest == right)
    }
}

/// A client connects to a rendezvous, or listens in place of rank 0.
pub fn handshake(bytes: &[u8]) {
    let Some((side, bytes)) = bytes.split_first() else { return };
    let rendezvous = Rendezvous::new(1, 4, "127.0.0.1", 1, b"secret", Duration::from_secs(1));
    match side % 3 {
        0 => client_connects(&rendezvous, Dice(bytes)),
        1 => server_answers(&rendezvous, Dice(bytes)),
        _ => drop(read_reply(bytes, usize::from(*side))),
    }
}

fn client_connects(rendezvous: &Rendezvous, mut dice: Dice<'_>) {
    let (own, blob) = ([7; 32], dice.bytes());
    let len = dice.number(blob.len() as u64);
    let numbers = [dice.number(2), dice.number(4), len].map(u64::to_le_bytes).concat();
    let mut header = [&MAGIC[..], &own, &numbers].concat();
    if dice.byte() > 240 {
        header[usize::from(dice.byte()) % 64] ^= dice.byte();
    }
    let mut honest = true;
    let mut stream = other(Vec::new(), |received| match received.len() {
        40 => {
            let (digest, right) = dice.sign(rendezvous.sign(&[b"call", &received[8..40], &header]));
            honest &= right;
            [&header[..], &digest].concat()
        }
        73 => {
            let (digest, right) = dice.sign(rendezvous.sign(&[b"blob", &received[8..40], &blob]));
            honest &= right;
            [&blob[..], &digest].concat()
        }
        _ => Vec::new(),
    });
    let introduced = rendezvous.server_handshake(&mut stream);
    let received = stream.received.len();
    drop(stream);
    let claimed = u64::from_le_bytes(header[56..64].try_into().unwrap_or_default());
    match introduced {
        Ok(said) => {
            assert!(
                honest && header[..8] == MAGIC && claimed == blob.len() as u64,
                "a client without the secret was accepted"
            );
            assert_eq!((&said.blob, said.blob.len() <= MAX_BLOB), (&blob, true));
            assert_eq!([said.rank as u64, said.size as u64].map(u64::to_le_bytes).concat(), header[40..56]);
        }
        Err(_) => {
            let right = honest && header[..8] == MAGIC && claimed == blob.len() as u64;
            assert!(!right, "a rank was not accepted, after {received} bytes");
        }
    }
}

fn server_answers(rendezvous: &Rendezvous, mut dice: Dice<'_>) {
    let (reply, blob) = (dice.bytes(), dice.bytes());
    let mut greeting = [&MAGIC[..], &[9; 32]].concat();
    if dice.byte() > 240 {
        greeting[usize::from(dice.byte()) % 8] ^= dice.byte();
    }
    let (greets, total) = (greeting[..8] == MAGIC, 96 + blob.len() + 32);
    let (mut honest, mut done, mut refuses) = (true, 0, false);
    let mut stream = other(greeting, |received| {
        let own = received.get(8..40).unwrap_or_default();
        match (done, received.len()) {
            (0, 96) => {
                done = 1;
                let (digest, right) = dice.sign(rendezvous.sign(&[b"known", own]));
                let known = dice.byte();
                (honest, refuses) = (right, known > 240);
                [&[u8::from(!refuses)][..], &digest].concat()
            }
            (1, len) if len == total => {
                done = 2;
                let (digest, right) = dice.sign(rendezvous.sign(&[b"reply", own, &reply]));
                let len = dice.number(reply.len() as u64);
                honest &= right && len == reply.len() as u64;
                [&len.to_le_bytes()[..], &reply, &digest].concat()
            }
            _ => Vec::new(),
        }
    });
    let told = rendezvous.client_handshake(&mut stream, &blob);
    drop(stream);
    match told {
        Ok(told) => {
            assert!(honest && greets && !refuses && told == reply, "a server without the secret was believed");
            drop(read_reply(&told, 4));
        }
        Err(Refused::Secret) => assert!(!honest || refuses, "rank 0 was taken for a server without the secret"),
        Err(Refused::Version) => assert!(!greets, "rank 0 was taken for one of another version"),
        Err(Refused::Gone(_) | Refused::Unheard(_)) => assert!(!honest || !greets, "rank 0 was not understood"),
    }
}
