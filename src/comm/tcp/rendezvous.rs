//! How processes that know an address find each other, and give each other a few bytes.
//!
//! The addresses of all, for one, must be known to each rank before there is a communicator to send them over. Rank 0 listens;
//! the others connect, for as long as the time-out lasts, since it may start later than they do.
//!
//! # Protocol
//!
//! Rank 0 greets with random bytes. A rank answers with its own random bytes, rank, world size and blob, under an HMAC-SHA256
//! by the shared secret over all of it and the greeting. What rank 0 says in the end, the blobs of all or an error, bears
//! an HMAC over the rank's random bytes. So both sides know the secret, nothing said before can be said again, and
//! the secret itself is never sent. A connection that is not from a rank that knows the secret is turned away and does
//! no harm: each is heard on a thread of its own, for a few seconds at most. The bytes travel in the open.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::Error;

const MAGIC: [u8; 8] = *b"burnpar1";
/// Most bytes of a blob.
const MOST: usize = 1 << 20;
/// How long a connection may take to say who it is.
const HEARING: Duration = Duration::from_secs(5);
/// Pauses between two attempts to connect, from the first on.
const AGAIN: Range<Duration> = Duration::from_millis(2)..Duration::from_millis(100);
/// Most connections that are heard at a time.
const CROWD: usize = 4096;

type Seal = [u8; 32];

/// A meeting point of the ranks of a world over TCP.
///
/// Rank 0 listens at an address that all know. Both sides show that they know a secret, which is never sent, and nothing
/// that was said before can be said again; but what they tell each other travels in the open. Connections of others are
/// turned away.
#[derive(Clone)]
pub struct Rendezvous {
    rank: usize,
    /// Who listens.
    host: usize,
    size: usize,
    address: String,
    port: u16,
    secret: Vec<u8>,
    timeout: Duration,
}

impl std::fmt::Debug for Rendezvous {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rendezvous(rank {} of {} at {}:{})", self.rank, self.size, self.address, self.port)
    }
}

impl Rendezvous {
    /// Rank `rank` of `size` meets the others at `address` and `port`, an address of rank 0's machine. `secret` is anything
    /// that all ranks know, and others don't.
    pub fn new(rank: usize, size: usize, address: &str, port: u16, secret: &[u8], timeout: Duration) -> Self {
        Self { rank, host: 0, size, address: address.to_owned(), port, secret: secret.to_vec(), timeout }
    }

    /// A meeting of the same ranks at another one's address.
    pub(super) fn hosted_by(&self, host: usize, at: SocketAddr) -> Self {
        Self { host, address: at.ip().to_string(), port: at.port(), ..self.clone() }
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Address and port.
    pub(super) fn point(&self) -> (&str, u16) {
        (&self.address, self.port)
    }

    /// Every rank gets the blobs of all, in rank order. A blob is 1 MiB at most.
    ///
    /// # Errors
    /// [`Error::Engine`], which says on rank 0 who is missing, or that the address is in use; on the others that rank 0
    /// can't be reached or has another secret; on all, that a rank came twice or from a world of another size.
    pub fn all_gather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        if self.rank >= self.size {
            return Err(failure(format!("rank {} does not exist in a world of {}", self.rank, self.size)));
        }
        if blob.len() > MOST {
            return Err(failure(format!("{} bytes are more than the {MOST} that a rank may bring", blob.len())));
        }
        match self.rank {
            0 if self.size == 1 => Ok(vec![blob.to_vec()]),
            0 => self.listen(blob),
            _ => self.visit(blob, self.size, true).map(|(_, blobs)| blobs),
        }
    }

    /// Every rank gets the blob of rank 0; what the others bring does not matter.
    ///
    /// # Errors
    /// Those of [`all_gather`](Self::all_gather).
    pub fn broadcast(&self, blob: &[u8]) -> Result<Vec<u8>, Error> {
        let own = if self.rank == 0 { blob } else { &[] };
        Ok(self.all_gather(own)?.swap_remove(0))
    }

    fn listen(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
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
    pub(super) fn receive(
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
    pub(super) fn tell(&self, guests: &mut [Guest], outcome: Result<&[Vec<u8>], &Error>) {
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
            n => format!(" ({n} connections were turned away: no ranks, or ranks with another secret)"),
        };
        failure(format!(
            "{word} {} of {} did not come to {}:{} within {:.1?}{strangers}",
            missing.join(", "),
            self.size,
            self.address,
            self.port,
            self.timeout
        ))
    }

    /// Another rank's side: returns what the host says, `count` blobs, and the connection. A `patient` one waits for a host
    /// that has not started yet.
    pub(super) fn visit(&self, blob: &[u8], count: usize, patient: bool) -> Result<(TcpStream, Vec<Vec<u8>>), Error> {
        let until = Instant::now() + self.timeout;
        let (host, point) = (self.host, format!("{}:{}", self.address, self.port));
        let (mut last, mut pause) = (None, AGAIN.start);
        loop {
            match self.call(blob, until) {
                Ok((stream, word)) => {
                    let garbled = || Err(failure(format!("rank {host} is garbled")));
                    return read_word(&word, count).unwrap_or_else(garbled).map(|blobs| (stream, blobs));
                }
                Err(Refused::Secret) => {
                    return Err(failure(format!(
                        "rank {} and rank {host} at {point} do not share a secret: set BURN_PARALLEL_SECRET alike on all ranks",
                        self.rank
                    )));
                }
                // The attempt that was cut short by the time-out has less to say than the one before it.
                Err(Refused::Gone(problem)) => {
                    if last.is_none() || problem.kind() != io::ErrorKind::TimedOut {
                        last = Some(problem);
                    }
                }
            }
            if let Some(problem) = last.as_ref().filter(|_| !patient || Instant::now() + pause >= until) {
                return Err(failure(format!(
                    "rank {} could not meet rank {host} at {point} within {:.1?}: {problem}; is rank {host} running, and is \
                     this its address?",
                    self.rank, self.timeout
                )));
            }
            thread::sleep(pause);
            pause = (2 * pause).min(AGAIN.end);
        }
    }

    /// Another rank's side of a connection.
    fn call(&self, blob: &[u8], until: Instant) -> Result<(TcpStream, Vec<u8>), Refused> {
        let mut problem = io::Error::from(io::ErrorKind::AddrNotAvailable);
        let mut stream = None;
        for address in (self.address.as_str(), self.port).to_socket_addrs()? {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match TcpStream::connect_timeout(&address, left) {
                Ok(connected) => stream = Some(connected),
                Err(why) => problem = why,
            }
            if stream.is_some() {
                break;
            }
        }
        let mut whole = stream.ok_or(problem)?;
        // With nobody there, the system may connect a port of its own choice to itself.
        if whole.local_addr()? == whole.peer_addr()? {
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
        }
        let mut stream = Limited { stream: &mut whole, until };
        let mut greeting = [0; 40];
        stream.read_exact(&mut greeting)?;
        if greeting[..8] != MAGIC {
            return Err(io::Error::other("whoever listens there is no rank of this program").into());
        }
        let own = nonce();
        let numbers = [self.rank, self.size, blob.len()].map(|number| (number as u64).to_le_bytes()).concat();
        let head = [&MAGIC[..], &own, &numbers].concat();
        let seal = self.seal(&[b"call", &greeting[8..], &head, blob]);
        stream.write_all(&[&head, blob, &seal[..]].concat())?;
        let mut known = [0];
        stream.read_exact(&mut known)?;
        if known[0] == 0 {
            return Err(Refused::Secret);
        }
        let mut len = [0; 8];
        stream.read_exact(&mut len)?;
        let len = u64::from_le_bytes(len);
        if len > (self.size as u64 + 1) * (MOST as u64 + 64) {
            return Err(io::Error::from(io::ErrorKind::InvalidData).into());
        }
        let mut word = vec![0; len as usize];
        stream.read_exact(&mut word)?;
        let mut seal = Seal::default();
        stream.read_exact(&mut seal)?;
        match self.check(&[b"word", &own, &word], &seal) {
            true => Ok((whole, word)),
            false => Err(Refused::Secret),
        }
    }

    fn mac(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        // HMAC takes keys of any length.
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret).unwrap_or_else(|_| unreachable!());
        for part in parts {
            // With lengths, so that no two lists of parts are the same bytes.
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }

    fn seal(&self, parts: &[&[u8]]) -> Seal {
        self.mac(parts).finalize().into_bytes().into()
    }

    /// In constant time.
    fn check(&self, parts: &[&[u8]], seal: &Seal) -> bool {
        self.mac(parts).verify_slice(seal).is_ok()
    }
}

/// A rank that has shown that it knows the secret.
pub(super) struct Guest {
    pub rank: usize,
    size: usize,
    nonce: [u8; 32],
    pub blob: Vec<u8>,
    pub stream: TcpStream,
}

enum Refused {
    Secret,
    Gone(io::Error),
}

impl From<io::Error> for Refused {
    fn from(problem: io::Error) -> Self {
        Self::Gone(problem)
    }
}

/// A connection for so long and no longer, however slowly the bytes drip.
struct Limited<'a> {
    stream: &'a mut TcpStream,
    until: Instant,
}

impl Limited<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Limited<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer)
    }
}

impl Write for Limited<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

fn framed(word: &[u8], seal: Seal) -> Vec<u8> {
    [&(word.len() as u64).to_le_bytes()[..], word, &seal].concat()
}

/// What rank 0 says in the end: the blobs of all, or what went wrong.
fn write_word(word: Result<&[Vec<u8>], &str>) -> Vec<u8> {
    match word {
        Ok(blobs) => {
            let mut bytes = vec![1];
            for blob in blobs {
                bytes.extend((blob.len() as u64).to_le_bytes());
                bytes.extend(blob);
            }
            bytes
        }
        Err(problem) => [&[0], problem.as_bytes()].concat(),
    }
}

fn read_word(word: &[u8], count: usize) -> Option<Result<Vec<Vec<u8>>, Error>> {
    let (kind, mut rest) = word.split_first()?;
    if *kind == 0 {
        return Some(Err(failure(String::from_utf8_lossy(rest))));
    }
    let mut blobs = Vec::with_capacity(count);
    while !rest.is_empty() {
        let (len, after) = rest.split_at_checked(8)?;
        let len = usize::try_from(u64::from_le_bytes(len.try_into().ok()?)).ok()?;
        let (blob, after) = after.split_at_checked(len)?;
        blobs.push(blob.to_vec());
        rest = after;
    }
    (blobs.len() == count).then_some(Ok(blobs))
}

/// Bytes that have not been seen before. The hasher's keys are random, from the system.
pub(crate) fn nonce() -> [u8; 32] {
    let mut bytes = [0; 32];
    for (place, eight) in bytes.chunks_mut(8).enumerate() {
        let now = std::time::SystemTime::now();
        eight.copy_from_slice(&RandomState::new().hash_one((place, std::process::id(), now)).to_le_bytes());
    }
    bytes
}

pub(super) fn failure(problem: impl Into<String>) -> Error {
    Error::Engine { engine: "rendezvous", problem: problem.into() }
}
