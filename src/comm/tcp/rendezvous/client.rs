//! The client side of the rendezvous: connects to the rank that listens.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use super::messages::{Limited, read_bytes, read_reply};
use super::{Digest, MAGIC, MAX_BLOB, Rendezvous, nonce, rendezvous_error, wrongly_given};
use crate::Error;
use crate::comm::tcp::descriptors;

/// Pauses between two attempts to connect, from the first on.
const AGAIN: Range<Duration> = Duration::from_millis(2)..Duration::from_millis(100);

pub(super) enum Refused {
    Secret,
    /// The host speaks another version of the protocol.
    Version,
    Gone(io::Error),
    /// Closed before the greeting: too many connected at once.
    Unheard(io::Error),
}

impl From<io::Error> for Refused {
    fn from(problem: io::Error) -> Self {
        Self::Gone(problem)
    }
}

impl Rendezvous {
    /// Connects to the host: returns its reply, `count` blobs, and the connection. A `patient` client waits for a host
    /// that has not started yet; any waits for one that closes the connection before the greeting.
    pub(in crate::comm::tcp) fn connect_to_host(
        &self,
        blob: &[u8],
        count: usize,
        patient: bool,
    ) -> Result<(TcpStream, Vec<Vec<u8>>), Error> {
        let until = Instant::now() + self.timeout;
        let (host, point) = (self.host, format!("{}:{}", self.address, self.port));
        let (mut last, mut pause) = (None, AGAIN.start);
        loop {
            let refused = match self.call(blob, until) {
                Ok((stream, reply)) => {
                    let garbled = || Err(rendezvous_error(format!("the reply of rank {host} is garbled")));
                    return read_reply(&reply, count).unwrap_or_else(garbled).map(|blobs| (stream, blobs));
                }
                Err(refused) => refused,
            };
            let unheard = matches!(refused, Refused::Unheard(_));
            match refused {
                Refused::Secret => {
                    return Err(wrongly_given(format!(
                        "rank {} and rank {host} at {point} do not share a secret: set BURN_PARALLEL_SECRET alike on all ranks",
                        self.rank
                    )));
                }
                Refused::Version => {
                    return Err(wrongly_given(format!(
                        "rank {} and rank {host} at {point} are of two versions of burn-parallel: start one program on all ranks",
                        self.rank
                    )));
                }
                Refused::Gone(problem) | Refused::Unheard(problem) => {
                    if let Some(exhausted) = descriptors::exhausted(&problem) {
                        let own = self.rank;
                        return Err(rendezvous_error(format!(
                            "rank {own} cannot connect to rank {host} at {point}: {exhausted}"
                        )));
                    }
                    // An attempt that was cut short by the time-out says less than the one before it.
                    if last.is_none() || problem.kind() != io::ErrorKind::TimedOut {
                        last = Some(problem);
                    }
                }
            }
            let waits = (patient || unheard) && Instant::now() + pause < until;
            if let Some(problem) = last.as_ref().filter(|_| !waits) {
                return Err(rendezvous_error(format!(
                    "rank {} could not meet rank {host} at {point} within {:.1?}: {problem}; is rank {host} running, and is \
                     this its address? BURN_PARALLEL_TIMEOUT_S gives it more time",
                    self.rank, self.timeout
                )));
            }
            thread::sleep(pause);
            pause = (2 * pause).min(AGAIN.end);
        }
    }

    /// Connects once, and does the handshake.
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
        let mut stream = stream.ok_or(problem)?;
        // With no listener, the system may connect a port of its own choice to itself.
        if stream.local_addr()? == stream.peer_addr()? {
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
        }
        let reply = self.client_handshake(&mut Limited { stream: &mut stream, until }, blob)?;
        Ok((stream, reply))
    }

    /// The client's handshake. Nothing that the other side sends is kept before it has proved that it knows the secret.
    pub(super) fn client_handshake(&self, stream: &mut (impl Read + Write), blob: &[u8]) -> Result<Vec<u8>, Refused> {
        let own = nonce();
        let mut greeting = [0; 40];
        stream.read_exact(&mut greeting).map_err(Refused::Unheard)?;
        if greeting[..7] == MAGIC[..7] && greeting[7] != MAGIC[7] {
            return Err(Refused::Version);
        }
        if greeting[..8] != MAGIC {
            return Err(io::Error::other("whoever listens there is no rank of this program").into());
        }
        let greeting = &greeting[8..];
        let numbers = [self.rank, self.size, blob.len()].map(|number| (number as u64).to_le_bytes()).concat();
        let header = [&MAGIC[..], &own, &numbers].concat();
        stream.write_all(&[&header[..], &self.sign(&[b"call", greeting, &header])].concat())?;
        let (mut known, mut digest) = ([0], Digest::default());
        stream.read_exact(&mut known)?;
        if known[0] == 0 {
            return Err(Refused::Secret);
        }
        stream.read_exact(&mut digest)?;
        if !self.check(&[b"known", &own], &digest) {
            return Err(Refused::Secret);
        }
        stream.write_all(blob)?;
        stream.write_all(&self.sign(&[b"blob", greeting, blob]))?;
        let mut len = [0; 8];
        stream.read_exact(&mut len)?;
        let len = usize::try_from(u64::from_le_bytes(len)).unwrap_or(usize::MAX);
        if len > self.size.saturating_add(1).saturating_mul(MAX_BLOB + 64) {
            return Err(io::Error::from(io::ErrorKind::InvalidData).into());
        }
        let reply = read_bytes(stream, len)?;
        stream.read_exact(&mut digest)?;
        match self.check(&[b"reply", &own, &reply], &digest) {
            true => Ok(reply),
            false => Err(Refused::Secret),
        }
    }
}
