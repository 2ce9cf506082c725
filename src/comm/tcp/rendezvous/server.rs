//! The server side of the rendezvous: listens and accepts the other ranks.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use super::acceptor::{Accepted, Acceptor, Client};
use super::messages::{Limited, framed, read_bytes, write_reply};
use super::{Digest, MAGIC, MAX_BLOB, Rendezvous, cannot_listen, nonce, rendezvous_error, wrongly_given};
use crate::Error;

/// How long a handshake may take.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long an address may be in use.
const IN_USE: Duration = Duration::from_secs(2);
/// How long a rank that has refused another waits for the others, to tell them: what starts a world starts its ranks
/// within seconds.
const LATE: Duration = Duration::from_secs(10);
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
        let listener = self.bind().map_err(|problem| match problem.kind() {
            io::ErrorKind::AddrInUse => rendezvous_error(format!(
                "the address {point} is in use: does another run, or the rest of one, use it? Set another MASTER_PORT"
            )),
            _ => cannot_listen(
                (&format!("rank 0 cannot listen at {point}"), &problem),
                "MASTER_ADDR must be an address of rank 0's machine",
            ),
        })?;
        let open = listener.local_addr().is_ok_and(|own| !own.ip().is_loopback());
        if open && self.secret.is_empty() {
            log::warn!(
                "rank 0 meets the others at {point}, and there is no secret: whoever reaches this address can take the place \
                 of a rank; set BURN_PARALLEL_SECRET alike on all ranks"
            );
        }
        let mut clients = self.receive(&listener, 1..self.size, |_| None)?;
        let mut blobs = vec![blob.to_vec()];
        blobs.extend(clients.iter_mut().map(|client| std::mem::take(&mut client.blob)));
        self.reply(&mut clients, Ok(&blobs));
        Ok(blobs)
    }

    /// A process that this one has just started holds its sockets for a moment, until it is the program that it is to
    /// be: the listener of a rendezvous that is over as well.
    fn bind(&self) -> io::Result<TcpListener> {
        let since = Instant::now();
        loop {
            match TcpListener::bind((self.address.as_str(), self.port)) {
                Err(problem)
                    if problem.kind() == io::ErrorKind::AddrInUse && since.elapsed() < IN_USE.min(self.timeout) =>
                {
                    thread::sleep(Duration::from_millis(10));
                }
                outcome => return outcome,
            }
        }
    }

    /// Accepts connections until all ranks of `expected` have connected, and returns them in order of rank. `other`
    /// gives a further objection to a client. An error is told to all that have connected.
    pub(in crate::comm::tcp) fn receive(
        &self,
        listener: &TcpListener,
        expected: Range<usize>,
        other: impl Fn(&Client) -> Option<String>,
    ) -> Result<Vec<Client>, Error> {
        let cannot = |problem| rendezvous_error(format!("rank {} cannot listen: {problem}", self.rank));
        listener.set_nonblocking(true).map_err(cannot)?;
        let mut come: Vec<Client> = Vec::new();
        let (mut acceptor, since) = (Acceptor::new(expected.len()), Instant::now());
        let outcome = loop {
            if come.len() == expected.len() {
                break None;
            }
            if since.elapsed() > self.timeout {
                break Some(self.missing(expected.clone(), &come, &acceptor));
            }
            match self.welcome(&mut acceptor, listener) {
                Accepted::Nobody => {}
                Accepted::Client(client) => {
                    let problem = self.objection(&client, &expected, &come).or_else(|| other(&client));
                    come.push(client);
                    if let Some(problem) = problem {
                        break Some(wrongly_given(problem));
                    }
                }
                Accepted::Exhausted(problem) => break Some(rendezvous_error(problem)),
            }
        };
        come.sort_by_key(|client| client.rank);
        let Some(why) = outcome else { return Ok(come) };
        self.reply(&mut come, Err(&why));
        if matches!(why, Error::InvalidArgument { .. }) {
            let left = LATE.min(self.timeout.saturating_sub(since.elapsed()));
            self.turn_away(listener, acceptor, (&expected, come, left), &why);
        }
        Err(why)
    }

    /// Tells the ranks that have not come yet why nobody meets, if they come in what is `left` of the time: each would
    /// look for this rank in vain, for the whole of its time-out.
    fn turn_away(
        &self,
        listener: &TcpListener,
        mut acceptor: Acceptor,
        (expected, come, left): (&Range<usize>, Vec<Client>, Duration),
        why: &Error,
    ) {
        let (mut told, began) = (HashSet::new(), Instant::now());
        told.extend(come.iter().map(|client| client.rank).filter(|rank| expected.contains(rank)));
        if told.len() < expected.len() {
            log::warn!("{why}; rank {} tells so for {left:.1?} the ranks that have not come yet", self.rank);
        }
        while told.len() < expected.len() && began.elapsed() < left {
            match self.welcome(&mut acceptor, listener) {
                Accepted::Nobody => {}
                Accepted::Client(mut late) => {
                    told.extend(Some(late.rank).filter(|rank| expected.contains(rank)));
                    self.reply(std::slice::from_mut(&mut late), Err(why));
                }
                Accepted::Exhausted(_) => break,
            }
        }
    }

    /// Begins the handshakes of new connections, and waits a moment for one to finish.
    fn welcome(&self, acceptor: &mut Acceptor, listener: &TcpListener) -> Accepted {
        acceptor.welcome(listener, |stream| {
            let own = self.clone();
            move || own.handshake(stream)
        })
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
