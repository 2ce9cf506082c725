//! The side of who listens.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::words::{Limited, framed, write_word};
use super::{MAGIC, MOST, Rendezvous, Seal, failure, nonce};
use crate::Error;

/// How long a connection may take to say who it is.
const HEARING: Duration = Duration::from_secs(5);
/// Most connections that are heard at a time.
const CROWD: usize = 4096;

/// A rank that has shown that it knows the secret.
pub(in crate::comm::tcp) struct Guest {
    pub rank: usize,
    size: usize,
    nonce: [u8; 32],
    pub blob: Vec<u8>,
    pub stream: TcpStream,
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
        let (tell, guests) = mpsc::channel();
        let (since, mut strangers, mut heard) = (Instant::now(), 0, 0);
        let outcome = loop {
            if come.len() == expected.len() {
                break Ok(());
            }
            if since.elapsed() > self.timeout {
                break Err(self.missing(expected, &come, strangers));
            }
            match self.welcome(listener, &tell, &guests, &mut heard) {
                None => {}
                Some(None) => strangers += 1,
                Some(Some(guest)) => {
                    let problem = self.objection(&guest, &expected, &come).or_else(|| other(&guest));
                    come.push(guest);
                    if let Some(problem) = problem {
                        break Err(failure(problem));
                    }
                }
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

    /// Hears whoever comes. `None`: nobody came for a while; `Some(None)`: somebody who does not belong here.
    fn welcome(
        &self,
        listener: &TcpListener,
        tell: &Sender<Option<Guest>>,
        guests: &Receiver<Option<Guest>>,
        heard: &mut usize,
    ) -> Option<Option<Guest>> {
        while *heard < CROWD {
            let Ok((stream, _)) = listener.accept() else { break };
            let (own, tell) = (self.clone(), tell.clone());
            let hear = move || {
                let _ = tell.send(own.hear(stream).ok());
            };
            if thread::Builder::new().name("rendezvous".into()).spawn(hear).is_ok() {
                *heard += 1;
            }
        }
        match guests.recv_timeout(Duration::from_millis(5)) {
            Ok(guest) => {
                *heard -= 1;
                Some(guest)
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => None,
        }
    }

    /// Rank 0's side of a connection, up to where the other has shown that it knows the secret.
    fn hear(&self, mut stream: TcpStream) -> io::Result<Guest> {
        let mut stream = Limited { until: Instant::now() + HEARING.min(self.timeout), stream: &mut stream };
        let greeting = nonce();
        stream.write_all(&[&MAGIC[..], &greeting].concat())?;
        let mut head = [0; 8 + 32 + 8 + 8 + 8];
        stream.read_exact(&mut head)?;
        let number = |place: usize| u64::from_le_bytes(head[place..place + 8].try_into().unwrap_or_default());
        let (rank, size, len) = (number(40), number(48), number(56));
        if head[..8] != MAGIC || len > MOST as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut blob = vec![0; len as usize];
        stream.read_exact(&mut blob)?;
        let mut seal = Seal::default();
        stream.read_exact(&mut seal)?;
        let known = self.check(&[b"call", &greeting, &head, &blob], &seal);
        // The other side is told at once, or it would wait for all to come before it knew.
        stream.write_all(&[known.into()])?;
        if !known {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let nonce = head[8..40].try_into().unwrap_or_default();
        let stream = stream.stream.try_clone()?;
        stream.set_write_timeout(Some(HEARING))?;
        Ok(Guest { rank: rank as usize, size: size as usize, nonce, blob, stream })
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

    fn missing(&self, mut expected: Range<usize>, come: &[Guest], strangers: usize) -> Error {
        let missing: Vec<String> = (expected.by_ref())
            .filter(|rank| come.iter().all(|guest| guest.rank != *rank))
            .map(|rank| rank.to_string())
            .collect();
        let word = if missing.len() == 1 { "rank" } else { "ranks" };
        let strangers = match strangers {
            0 => String::new(),
            n => format!(" (connections turned away, which were no ranks or had another secret: {n})"),
        };
        failure(format!(
            "{word} {} of {} did not come to {}:{} within {:.1?}{strangers}; start all of them, or raise \
             BURN_PARALLEL_TIMEOUT_S if they were only slow",
            missing.join(", "),
            self.size,
            self.address,
            self.port,
            self.timeout
        ))
    }
}
