//! Both sides of a meeting, whose other side is made of any bytes.

use std::io::{self, Read, Write};
use std::time::Duration;

use super::guest::Refused;
use super::words::read_word;
use super::{MAGIC, MOST, Rendezvous, Seal};

/// The other side of a connection: what it says follows from what it has heard.
struct Other<F> {
    heard: Vec<u8>,
    says: Vec<u8>,
    said: usize,
    answer: F,
}

impl<F: FnMut(&[u8]) -> Vec<u8>> Write for Other<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.extend_from_slice(bytes);
        let answer = (self.answer)(&self.heard);
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
    Other { heard: Vec::new(), says, said: 0, answer }
}

/// What the bytes decide, one after the other; zeros when they are all used.
struct Dice<'a>(&'a [u8]);

impl Dice<'_> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or_default()
    }

    /// Often what it should be.
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

    fn seal(&mut self, right: Seal) -> (Seal, bool) {
        let mut seal = right;
        if self.byte() > 192 {
            seal[usize::from(self.byte() % 32)] ^= self.byte();
        }
        (seal, seal == right)
    }
}

/// Somebody comes to a meeting, or listens where one should be.
pub fn handshake(bytes: &[u8]) {
    let Some((side, bytes)) = bytes.split_first() else { return };
    let meeting = Rendezvous::new(1, 4, "127.0.0.1", 1, b"secret", Duration::from_secs(1));
    match side % 3 {
        0 => somebody_comes(&meeting, Dice(bytes)),
        1 => somebody_listens(&meeting, Dice(bytes)),
        _ => drop(read_word(bytes, usize::from(*side))),
    }
}

fn somebody_comes(meeting: &Rendezvous, mut dice: Dice<'_>) {
    let (own, blob) = ([7; 32], dice.bytes());
    let len = dice.number(blob.len() as u64);
    let numbers = [dice.number(2), dice.number(4), len].map(u64::to_le_bytes).concat();
    let mut head = [&MAGIC[..], &own, &numbers].concat();
    if dice.byte() > 240 {
        head[usize::from(dice.byte()) % 64] ^= dice.byte();
    }
    let mut honest = true;
    let mut stream = other(Vec::new(), |heard| match heard.len() {
        40 => {
            let (seal, right) = dice.seal(meeting.seal(&[b"call", &heard[8..40], &head]));
            honest &= right;
            [&head[..], &seal].concat()
        }
        73 => {
            let (seal, right) = dice.seal(meeting.seal(&[b"blob", &heard[8..40], &blob]));
            honest &= right;
            [&blob[..], &seal].concat()
        }
        _ => Vec::new(),
    });
    let introduced = meeting.interview(&mut stream);
    let heard = stream.heard.len();
    drop(stream);
    let claimed = u64::from_le_bytes(head[56..64].try_into().unwrap_or_default());
    match introduced {
        Ok(said) => {
            assert!(honest && head[..8] == MAGIC && claimed == blob.len() as u64, "a stranger was let in");
            assert_eq!((&said.blob, said.blob.len() <= MOST), (&blob, true));
            assert_eq!([said.rank as u64, said.size as u64].map(u64::to_le_bytes).concat(), head[40..56]);
        }
        Err(_) => {
            let right = honest && head[..8] == MAGIC && claimed == blob.len() as u64;
            assert!(!right, "a rank was not let in, after {heard} bytes");
        }
    }
}

fn somebody_listens(meeting: &Rendezvous, mut dice: Dice<'_>) {
    let (word, blob) = (dice.bytes(), dice.bytes());
    let mut greeting = [&MAGIC[..], &[9; 32]].concat();
    if dice.byte() > 240 {
        greeting[usize::from(dice.byte()) % 8] ^= dice.byte();
    }
    let (greets, total) = (greeting[..8] == MAGIC, 96 + blob.len() + 32);
    let (mut honest, mut done, mut refuses) = (true, 0, false);
    let mut stream = other(greeting, |heard| {
        let own = heard.get(8..40).unwrap_or_default();
        match (done, heard.len()) {
            (0, 96) => {
                done = 1;
                let (seal, right) = dice.seal(meeting.seal(&[b"known", own]));
                let known = dice.byte();
                (honest, refuses) = (right, known > 240);
                [&[u8::from(!refuses)][..], &seal].concat()
            }
            (1, len) if len == total => {
                done = 2;
                let (seal, right) = dice.seal(meeting.seal(&[b"word", own, &word]));
                let len = dice.number(word.len() as u64);
                honest &= right && len == word.len() as u64;
                [&len.to_le_bytes()[..], &word, &seal].concat()
            }
            _ => Vec::new(),
        }
    });
    let told = meeting.introduce(&mut stream, &blob);
    drop(stream);
    match told {
        Ok(told) => {
            assert!(honest && greets && !refuses && told == word, "a stranger was believed");
            drop(read_word(&told, 4));
        }
        Err(Refused::Secret) => assert!(!honest || refuses, "rank 0 was taken for a stranger"),
        Err(Refused::Gone(_) | Refused::Unheard(_)) => assert!(!honest || !greets, "rank 0 was not understood"),
    }
}
