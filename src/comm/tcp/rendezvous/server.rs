//! The server side of the rendezvous: listens and accepts the other ranks.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::acceptor::{Accepted, Acceptor, Client};
use super::messages::{Limited, framed, read_bytes, write_reply};
use super::{Digest, MAGIC, MAX_BLOB, Rendezvous, nonce, rendezvous_error, wrongly_given};
use crate::Error;

/// How long a handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Most missing ranks that an error names.
const NAMED: usize = 16;

/// What a rank says of itself in the handshake.
pub(super) struct ClientHello {
    pub rank: usize,
    pub size: usize,
    nonce: [u8; 32],
    pub blob: Vec<u8>,
}

impl Rendezvous {
    pub(super) fn listen(&self, blob: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let point = format!("{}:{}", self.address, self.port);
        let listener = TcpListener::bind((self.address.as_str(), self.port)).map_err(|problem| match problem.kind() {
            io::ErrorKind::AddrInUse => rendezvous_error(format!(
                "the address {point} is in use: does another run, or the rest of one, use it? Set another MASTER_PORT"
            )),
            _ => wrongly_given(format!(
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
        let (mut clients, outcome) = self.receive(&listener, 1..self.size, |_| None);
        let mut blobs = vec![blob.to_vec()];
        blobs.extend(clients.iter_mut().map(|client| std::mem::take(&mut client.blob)));
        self.reply(&mut clients, outcome.as_ref().map(|()| blobs.as_slice()));
        outcome.map(|()| blobs)
    }

    /// Accepts connections until all ranks of `expected` have connected, and returns them in order of rank. `other`
    /// gives a further objection to a client.
    pub(in crate::comm::tcp) fn receive(
        &self,
        listener: &TcpListener,
        expected: Range<usize>,
        other: impl Fn(&Client) -> Option<String>,
    ) -> (Vec<Client>, Result<(), Error>) {
        let mut come: Vec<Client> = Vec::new();
        if let Err(problem) = listener.set_nonblocking(true) {
            return (come, Err(rendezvous_error(format!("rank {} cannot listen: {problem}", self.rank))));
        }
        let (mut acceptor, since) = (Acceptor::new(expected.len()), Instant::now());
        let outcome = loop {
            if come.len() == expected.len() {
                break Ok(());
            }
            if since.elapsed() > self.timeout {
                break Err(self.missing(expected, &come, &acceptor));
            }
            match acceptor.welcome(listener, |stream| {
                let own = self.clone();
                move || own.handshake(stream)
            }) {
                Accepted::Nobody => {}
                Accepted::Client(client) => {
                    let problem = self.objection(&client, &expected, &come).or_else(|| other(&client));
                    come.push(client);
                    if let Some(problem) = problem {
                        break Err(wrongly_given(problem));
                    }
                }
                Accepted::Exhausted(problem) => break Err(rendezvous_error(problem)),
            }
        };
        come.sort_by_key(|client| client.rank);
        (come, outcome)
    }

    /// Sends the result to the clients.
    pub(in crate::comm::tcp) fn reply(&self, clients: &mut [Client], outcome: Result<&[Vec<u8>], &Error>) {
        let reply = write_reply(outcome);
        for client in clients {
            // A client that has gone meanwhile has reported its own error.
            let _ = client.stream.write_all(&framed(&reply, self.sign(&[b"reply", &client.nonce, &reply])));
        }
    }

    /// The server's side of a connection, up to where the client has proved that it knows the secret, and its blob.
    fn handshake(&self, mut stream: TcpStream) -> io::Result<Client> {
        // On some systems a connection inherits the listener's setting.
        stream.set_nonblocking(false)?;
        let until = Instant::now() + HANDSHAKE_LIMIT.min(self.timeout);
        let said = self.server_handshake(&mut Limited { until, stream: &mut stream })?;
        stream.set_write_timeout(Some(HANDSHAKE_LIMIT))?;
        let ClientHello { rank, size, nonce, blob } = said;
        Ok(Client { rank, size, nonce, blob, stream })
    }

    /// The server's handshake. Nothing that the other side sends is kept before it has proved that it knows the secret.
    pub(super) fn server_handshake(&self, stream: &mut (impl Read + Write)) -> io::Result<ClientHello> {
        let greeting = nonce();
        stream.write_all(&[&MAGIC[..], &greeting].concat())?;
        let (mut header, mut digest) = ([0; 8 + 32 + 8 + 8 + 8], Digest::default());
        stream.read_exact(&mut header)?;
        let number = |place: usize| u64::from_le_bytes(header[place..place + 8].try_into().unwrap_or_default());
        let (rank, size, len) = (number(40), number(48), number(56));
        if header[..8] != MAGIC || len > MAX_BLOB as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.read_exact(&mut digest)?;
        // The client is told at once, or it would wait for all ranks before it knew.
        if !self.check(&[b"call", &greeting, &header], &digest) {
            stream.write_all(&[0])?;
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let nonce: [u8; 32] = header[8..40].try_into().unwrap_or_default();
        stream.write_all(&[&[1u8][..], &self.sign(&[b"known", &nonce])].concat())?;
        let blob = read_bytes(stream, len as usize)?;
        stream.read_exact(&mut digest)?;
        if !self.check(&[b"blob", &greeting, &blob], &digest) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(ClientHello { rank: rank as usize, size: size as usize, nonce, blob })
    }

    /// Why a rank that knows the secret cannot be accepted.
    fn objection(&self, client: &Client, expected: &Range<usize>, come: &[Client]) -> Option<String> {
        let Client { rank, size, .. } = client;
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

    fn missing(&self, expected: Range<usize>, come: &[Client], acceptor: &Acceptor) -> Error {
        let count = expected.len() - come.len();
        let mut missing: Vec<String> = expected
            .filter(|rank| come.iter().all(|client| client.rank != *rank))
            .take(NAMED)
            .map(|rank| rank.to_string())
            .collect();
        if count > missing.len() {
            missing.push(format!("and {} more", count - missing.len()));
        }
        let noun = if count == 1 { "rank" } else { "ranks" };
        rendezvous_error(format!(
            "{noun} {} of {} did not come to {}:{} within {:.1?}{acceptor}; start all of them, or raise \
             BURN_PARALLEL_TIMEOUT_S if they were only slow",
            missing.join(", "),
            self.size,
            self.address,
            self.port,
            self.timeout
        ))
    }
}
