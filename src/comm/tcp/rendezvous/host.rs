//! The side of who listens.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::crowd::{Came, Crowd};
use super::words::{Limited, framed, read_bytes, write_word};
use super::{MAGIC, MOST, Rendezvous, Seal, failure, nonce};
use crate::Error;

/// How long a connection may take to say who it is.
const HEARING: Duration = Duration::from_secs(5);
/// Most missing ranks that an error names.
const NAMED: usize = 16;

/// A rank that has shown that it knows the secret.
pub(in crate::comm::tcp) struct Guest {
    pub rank: usize,
    size: usize,
    nonce: [u8; 32],
    pub blob: Vec<u8>,
    pub stream: TcpStream,
}

/// What a rank says of itself.
pub(super) struct Introduction {
    pub rank: usize,
    pub size: usize,
    nonce: [u8; 32],
    pub blob: Vec<u8>,
}

impl Rendezvous {
    pub(super) fn listen(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let point = format!("{}:{}", self.address, self.port);
        let listener = TcpListener::bind((self.address.as_str(), self.port)).map_err(|problem| match problem.kind() {
            io::ErrorKind::AddrInUse => failure(format!(
                "the address {point} is in use: does another run, or the rest of one, use it? Set another MASTER_PORT"
            )),
            _ => failure(format!(
                "rank 0 cannot listen at {point}: {problem}; MASTER_ADDR must be an address of rank 0's machine"
            )),
        })?;
        let open = listener.local_addr().is_ok_and(|own| !own.ip().is_loopback());
        if open && self.secret.is_empty() {
            log::warn!(
                "rank 0 meets the others at {point}, and there is no secret: whoever reaches this address can take the place \
                 of a rank; set BURN_PARALLEL_SECRET alike on all ranks"
            );
        }
        let (mut guests, outcome) = self.receive(&listener, 1..self.size, |_| None);
        let mut blobs = vec![blob.to_vec()];
        blobs.extend(guests.iter_mut().map(|guest| std::mem::take(&mut guest.blob)));
        self.tell(&mut guests, outcome.as_ref().map(|()| blobs.as_slice()));
        outcome.map(|()| blobs)
    }

    /// Hears whoever comes, until all ranks of `expected` have: then they are in order of rank. `other` says what else is
    /// wrong with a guest.
    pub(in crate::comm::tcp) fn receive(
        &self,
        listener: &TcpListener,
        expected: Range<usize>,
        other: impl Fn(&Guest) -> Option<String>,
    ) -> (Vec<Guest>, Result<(), Error>) {
        let mut come: Vec<Guest> = Vec::new();
        if let Err(problem) = listener.set_nonblocking(true) {
            return (come, Err(failure(format!("rank {} cannot listen: {problem}", self.rank))));
        }
        let (mut crowd, since) = (Crowd::new(expected.len()), Instant::now());
        let outcome = loop {
            if come.len() == expected.len() {
                break Ok(());
            }
            if since.elapsed() > self.timeout {
                break Err(self.missing(expected, &come, &crowd));
            }
            match crowd.welcome(listener, |stream| {
                let own = self.clone();
                move || own.hear(stream)
            }) {
                Came::Nobody => {}
                Came::Guest(guest) => {
                    let problem = self.objection(&guest, &expected, &come).or_else(|| other(&guest));
                    come.push(guest);
                    if let Some(problem) = problem {
                        break Err(failure(problem));
                    }
                }
                Came::NoRoom(problem) => break Err(failure(problem)),
            }
        };
        come.sort_by_key(|guest| guest.rank);
        (come, outcome)
    }

    /// Tells the guests what came of it.
    pub(in crate::comm::tcp) fn tell(&self, guests: &mut [Guest], outcome: Result<&[Vec<u8>], &Error>) {
        let word = write_word(match outcome {
            Ok(blobs) => Ok(blobs),
            Err(Error::Engine { problem, .. }) => Err(problem.as_str()),
            Err(_) => Err("the host failed"),
        });
        for guest in guests {
            // Whoever has gone meanwhile has its reasons.
            let _ = guest.stream.write_all(&framed(&word, self.seal(&[b"word", &guest.nonce, &word])));
        }
    }

    /// The listener's side of a connection, up to where the other has shown that it knows the secret, and what it brings.
    fn hear(&self, mut stream: TcpStream) -> io::Result<Guest> {
        // Some systems hand the listener's setting on.
        stream.set_nonblocking(false)?;
        let until = Instant::now() + HEARING.min(self.timeout);
        let said = self.interview(&mut Limited { until, stream: &mut stream })?;
        stream.set_write_timeout(Some(HEARING))?;
        let Introduction { rank, size, nonce, blob } = said;
        Ok(Guest { rank, size, nonce, blob, stream })
    }

    /// What is said on such a connection. Nothing is kept of what the other side says before it has shown the secret.
    pub(super) fn interview(&self, stream: &mut (impl Read + Write)) -> io::Result<Introduction> {
        let greeting = nonce();
        stream.write_all(&[&MAGIC[..], &greeting].concat())?;
        let (mut head, mut seal) = ([0; 8 + 32 + 8 + 8 + 8], Seal::default());
        stream.read_exact(&mut head)?;
        let number = |place: usize| u64::from_le_bytes(head[place..place + 8].try_into().unwrap_or_default());
        let (rank, size, len) = (number(40), number(48), number(56));
        if head[..8] != MAGIC || len > MOST as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.read_exact(&mut seal)?;
        // The other side is told at once, or it would wait for all to come before it knew.
        if !self.check(&[b"call", &greeting, &head], &seal) {
            stream.write_all(&[0])?;
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let nonce: [u8; 32] = head[8..40].try_into().unwrap_or_default();
        stream.write_all(&[&[1u8][..], &self.seal(&[b"known", &nonce])].concat())?;
        let blob = read_bytes(stream, len as usize)?;
        stream.read_exact(&mut seal)?;
        if !self.check(&[b"blob", &greeting, &blob], &seal) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Introduction { rank: rank as usize, size: size as usize, nonce, blob })
    }

    /// Why a rank that knows the secret cannot be let in.
    fn objection(&self, guest: &Guest, expected: &Range<usize>, come: &[Guest]) -> Option<String> {
        let Guest { rank, size, .. } = guest;
        if *size != self.size {
            return Some(format!(
                "rank {rank} is of a world of {size} ranks, rank {} of one of {}",
                self.rank, self.size
            ));
        }
        if *rank >= self.size {
            return Some(format!("rank {rank} does not exist in a world of {size}"));
        }
        if !expected.contains(rank) || come.iter().any(|other| other.rank == *rank) {
            return Some(format!("two processes say that they are rank {rank} of {size}"));
        }
        None
    }

    fn missing(&self, expected: Range<usize>, come: &[Guest], crowd: &Crowd) -> Error {
        let count = expected.len() - come.len();
        let mut missing: Vec<String> = expected
            .filter(|rank| come.iter().all(|guest| guest.rank != *rank))
            .take(NAMED)
            .map(|rank| rank.to_string())
            .collect();
        if count > missing.len() {
            missing.push(format!("and {} more", count - missing.len()));
        }
        let word = if count == 1 { "rank" } else { "ranks" };
        failure(format!(
            "{word} {} of {} did not come to {}:{} within {:.1?}{crowd}; start all of them, or raise \
             BURN_PARALLEL_TIMEOUT_S if they were only slow",
            missing.join(", "),
            self.size,
            self.address,
            self.port,
            self.timeout
        ))
    }
}
