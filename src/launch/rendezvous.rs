//! How processes that know an address find each other, and give each other a few bytes.
//!
//! NCCL's id, for one, must come from rank 0 to all others before there is a communicator to send it over. Rank 0 listens;
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
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::Place;
use crate::Error;

const MAGIC: [u8; 8] = *b"burnpar1";
/// Most bytes of a blob.
const MOST: usize = 1 << 20;
/// How long a connection may take to say who it is.
const HEARING: Duration = Duration::from_secs(5);
/// Pause between two attempts to connect.
const AGAIN: Duration = Duration::from_millis(50);
/// Most connections that are heard at a time.
const CROWD: usize = 4096;

type Seal = [u8; 32];

/// A meeting point of the ranks of a world over TCP.
#[derive(Clone)]
pub struct Rendezvous {
    rank: usize,
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
        Self { rank, size, address: address.to_owned(), port, secret: secret.to_vec(), timeout }
    }

    /// The meeting point that the launcher has named: `MASTER_ADDR` and `MASTER_PORT`, with the secret of the variable
    /// `BURN_PARALLEL_SECRET`. Without that variable there is no secret: strays are kept out, but no attacker.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the launcher has named none.
    pub fn at(place: &Place, timeout: Duration) -> Result<Self, Error> {
        let Some((address, port)) = &place.master else {
            return Err(failure("MASTER_ADDR and MASTER_PORT are not set: the ranks do not know where to meet"));
        };
        let secret = std::env::var("BURN_PARALLEL_SECRET").unwrap_or_default();
        Ok(Self::new(place.rank, place.size, address, *port, secret.as_bytes(), timeout))
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
            _ => self.connect(blob),
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
        listener.set_nonblocking(true).map_err(|problem| failure(format!("rank 0 cannot listen: {problem}")))?;
        let (tell, guests) = mpsc::channel();
        let mut blobs = vec![None; self.size];
        blobs[0] = Some(blob.to_vec());
        let mut come: Vec<Guest> = Vec::new();
        let (since, mut strangers, mut heard) = (Instant::now(), 0, 0);
        let outcome = loop {
            if blobs.iter().all(Option::is_some) {
                break Ok(());
            }
            if since.elapsed() > self.timeout {
                break Err(self.missing(&blobs, strangers));
            }
            match self.welcome(&listener, &tell, &guests, &mut heard) {
                None => {}
                Some(None) => strangers += 1,
                Some(Some(guest)) => {
                    let problem = self.objection(&guest, &blobs);
                    let rank = guest.rank;
                    if problem.is_none() {
                        blobs[rank] = Some(guest.blob.clone());
                    }
                    come.push(guest);
                    if let Some(problem) = problem {
                        break Err(failure(problem));
                    }
                }
            }
        };
        let blobs: Vec<Vec<u8>> = blobs.into_iter().flatten().collect();
        let word = match &outcome {
            Ok(()) => Ok(blobs.as_slice()),
            Err(Error::Engine { problem, .. }) => Err(problem.as_str()),
            Err(_) => Err("rank 0 failed"),
        };
        let word = write_word(word);
        for guest in &mut come {
            // Whoever has gone meanwhile has its reasons.
            let _ = guest.stream.write_all(&framed(&word, self.seal(&[b"word", &guest.nonce, &word])));
        }
        outcome.map(|()| blobs)
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
    fn objection(&self, guest: &Guest, blobs: &[Option<Vec<u8>>]) -> Option<String> {
        let Guest { rank, size, .. } = guest;
        if *size != self.size {
            return Some(format!("rank {rank} is of a world of {size} ranks, rank 0 of one of {}", self.size));
        }
        match blobs.get(*rank) {
            None => Some(format!("rank {rank} does not exist in a world of {size}")),
            Some(Some(_)) => Some(format!("two processes say that they are rank {rank} of {size}")),
            Some(None) => None,
        }
    }

    fn missing(&self, blobs: &[Option<Vec<u8>>], strangers: usize) -> Error {
        let missing: Vec<String> =
            blobs.iter().enumerate().filter(|(_, blob)| blob.is_none()).map(|(rank, _)| rank.to_string()).collect();
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

    fn connect(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let until = Instant::now() + self.timeout;
        let point = format!("{}:{}", self.address, self.port);
        let mut last;
        loop {
            match self.call(blob, until) {
                Ok(word) => return read_word(&word, self.size).unwrap_or_else(|| Err(failure("rank 0 is garbled"))),
                Err(Refused::Secret) => {
                    return Err(failure(format!(
                        "rank {} and rank 0 at {point} do not share a secret: set BURN_PARALLEL_SECRET alike on all ranks",
                        self.rank
                    )));
                }
                Err(Refused::Gone(problem)) => last = problem,
            }
            if Instant::now() + AGAIN >= until {
                return Err(failure(format!(
                    "rank {} could not meet rank 0 at {point} within {:.1?}: {last}; is rank 0 running, and is this its \
                     address?",
                    self.rank, self.timeout
                )));
            }
            thread::sleep(AGAIN);
        }
    }

    /// Another rank's side of a connection.
    fn call(&self, blob: &[u8], until: Instant) -> Result<Vec<u8>, Refused> {
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
        let mut stream = stream.ok_or(problem)?;
        let mut stream = Limited { stream: &mut stream, until };
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
            true => Ok(word),
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
struct Guest {
    rank: usize,
    size: usize,
    nonce: [u8; 32],
    blob: Vec<u8>,
    stream: TcpStream,
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

fn read_word(word: &[u8], size: usize) -> Option<Result<Vec<Vec<u8>>, Error>> {
    let (kind, mut rest) = word.split_first()?;
    if *kind == 0 {
        return Some(Err(failure(String::from_utf8_lossy(rest))));
    }
    let mut blobs = Vec::with_capacity(size);
    while !rest.is_empty() {
        let (len, after) = rest.split_at_checked(8)?;
        let len = usize::try_from(u64::from_le_bytes(len.try_into().ok()?)).ok()?;
        let (blob, after) = after.split_at_checked(len)?;
        blobs.push(blob.to_vec());
        rest = after;
    }
    (blobs.len() == size).then_some(Ok(blobs))
}

/// Bytes that have not been seen before. The hasher's keys are random, from the system.
fn nonce() -> [u8; 32] {
    let mut bytes = [0; 32];
    for (place, eight) in bytes.chunks_mut(8).enumerate() {
        let now = std::time::SystemTime::now();
        eight.copy_from_slice(&RandomState::new().hash_one((place, std::process::id(), now)).to_le_bytes());
    }
    bytes
}

fn failure(problem: impl Into<String>) -> Error {
    Error::Engine { engine: "rendezvous", problem: problem.into() }
}
