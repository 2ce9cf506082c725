//! The rendezvous: processes that know one address find each other, and exchange a few bytes.
//!
//! Each rank must know the addresses of all before there is a communicator to send them over. Rank 0 listens; the
//! others connect, retrying for as long as the time-out lasts, since it may start later than they do.
//!
//! # Protocol
//!
//! Rank 0 greets with random bytes. A rank answers with its own random bytes, rank, world size and the length of its
//! blob, under an HMAC-SHA256 by the shared secret over all of it and the greeting. Rank 0 says whether that is right,
//! with an HMAC over the rank's random bytes, and only then the blob is sent, under an HMAC as well. The final reply of
//! rank 0, the blobs of all or an error, has another one. So both sides prove that they know the secret, no message can
//! be replayed, and the secret itself is never sent. A connection that is not from a rank that knows the secret is
//! rejected and does no harm: each handshake runs on a thread of its own, for a few seconds at most, a few more at a
//! time than there are ranks, and no memory is allocated for what it sends. The bytes are not encrypted.
//!
//! Where two ranks contradict each other, nobody meets. Rank 0 tells all that have come at once, and for some seconds
//! more those that come late.

mod acceptor;
mod cannot_listen;
mod client;
#[cfg(fuzzing)]
pub(in crate::comm::tcp) mod fuzzing;
mod messages;
mod server;

use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::time::Duration;

use hmac::{Hmac, Mac};
use sha2::Sha256;

pub(super) use self::acceptor::MAX_UNKNOWN;
pub(super) use self::cannot_listen::cannot_listen;
use crate::Error;
use crate::comm::config::bounded;

/// What both sides begin with: a name, and in the last byte the version of this protocol.
const MAGIC: [u8; 8] = *b"burnpar4";
/// Most bytes of a blob.
const MAX_BLOB: usize = 1 << 20;

type Digest = [u8; 32];

/// A rendezvous of the ranks of a world over TCP.
///
/// Rank 0 listens at an address that all know. Both sides prove that they know a secret, which is never sent, and no
/// message can be replayed; but messages are not encrypted. Connections of others are rejected.
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
    /// Rank `rank` of `size` finds the others at `address` and `port`, an address of rank 0's machine. `secret` is
    /// anything that all ranks know, and others don't; with an empty one, whoever reaches the address can take the
    /// place of a rank.
    pub fn new(rank: usize, size: usize, address: &str, port: u16, secret: &[u8], timeout: Duration) -> Self {
        Self {
            rank,
            host: 0,
            size,
            address: address.to_owned(),
            port,
            secret: secret.to_vec(),
            timeout: bounded(timeout),
        }
    }

    /// A rendezvous of the same ranks at the address of another host.
    pub(in crate::comm::tcp) fn hosted_by(&self, host: usize, at: SocketAddr) -> Self {
        Self { host, address: at.ip().to_string(), port: at.port(), ..self.clone() }
    }

    pub(in crate::comm::tcp) fn rank(&self) -> usize {
        self.rank
    }

    pub(in crate::comm::tcp) fn size(&self) -> usize {
        self.size
    }

    /// Address and port.
    pub(in crate::comm::tcp) fn point(&self) -> (&str, u16) {
        (&self.address, self.port)
    }

    /// Every rank gets the blobs of all, in rank order. A blob is 1 MiB at most.
    ///
    /// # Errors
    /// [`Error::Transport`], which says on rank 0 who is missing, or that the address is in use, and on the others that
    /// rank 0 can't be reached; [`Error::InvalidArgument`], if what the ranks were given is wrong: on all, that a rank
    /// came twice or from a world of another size, which rank 0 tells for 10 s; that rank 0 has another secret or
    /// another version of this protocol, or cannot listen there.
    pub fn all_gather(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        if self.rank >= self.size {
            return Err(wrongly_given(format!("rank {} does not exist in a world of {}", self.rank, self.size)));
        }
        if self.timeout.is_zero() {
            return Err(wrongly_given("the time-out is 0: no rank could wait for another; give a positive one"));
        }
        if blob.len() > MAX_BLOB {
            return Err(rendezvous_error(format!(
                "{} bytes are more than the {MAX_BLOB} that a rank may bring",
                blob.len()
            )));
        }
        match self.rank {
            0 if self.size == 1 => Ok(vec![blob.to_vec()]),
            0 => self.listen(blob),
            _ => self.connect_to_host(blob, self.size, true).map(|(_, blobs)| blobs),
        }
    }

    /// Every rank gets the blob of rank 0; those of the others are ignored.
    ///
    /// # Errors
    /// Those of [`all_gather`](Self::all_gather).
    pub fn broadcast(&self, blob: &[u8]) -> Result<Vec<u8>, Error> {
        let own = if self.rank == 0 { blob } else { &[] };
        Ok(self.all_gather(own)?.swap_remove(0))
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

    fn sign(&self, parts: &[&[u8]]) -> Digest {
        self.mac(parts).finalize().into_bytes().into()
    }

    /// In constant time.
    fn check(&self, parts: &[&[u8]], digest: &Digest) -> bool {
        self.mac(parts).verify_slice(digest).is_ok()
    }
}

/// Fresh random bytes. The hasher's keys are random, from the system.
pub(crate) fn nonce() -> [u8; 32] {
    let mut bytes = [0; 32];
    for (place, eight) in bytes.chunks_mut(8).enumerate() {
        let now = std::time::SystemTime::now();
        eight.copy_from_slice(&RandomState::new().hash_one((place, std::process::id(), now)).to_le_bytes());
    }
    bytes
}

/// What a rank was given is wrong, or does not go with what another was.
pub(in crate::comm::tcp) fn wrongly_given(problem: impl Into<String>) -> Error {
    Error::invalid("rendezvous", problem)
}

pub(in crate::comm::tcp) fn rendezvous_error(problem: impl Into<String>) -> Error {
    Error::Transport { transport: "rendezvous", problem: problem.into() }
}
