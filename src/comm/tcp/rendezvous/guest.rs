//! The side of who connects.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use super::words::{Limited, read_word};
use super::{MAGIC, MOST, Rendezvous, Seal, failure, nonce};
use crate::Error;

/// Pauses between two attempts to connect, from the first on.
const AGAIN: Range<Duration> = Duration::from_millis(2)..Duration::from_millis(100);

enum Refused {
    Secret,
    Gone(io::Error),
}

impl From<io::Error> for Refused {
    fn from(problem: io::Error) -> Self {
        Self::Gone(problem)
    }
}

impl Rendezvous {
    /// Another rank's side: returns what the host says, `count` blobs, and the connection. A `patient` one waits for a host
    /// that has not started yet.
    pub(in crate::comm::tcp) fn visit(
        &self,
        blob: &[u8],
        count: usize,
        patient: bool,
    ) -> Result<(TcpStream, Vec<Vec<u8>>), Error> {
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
                     this its address? BURN_PARALLEL_TIMEOUT_S gives it more time",
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
}
