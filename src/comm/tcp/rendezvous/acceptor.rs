//! Accepts connections while ranks are expected: each handshake runs on a thread of its own, and their number is
//! limited.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use crate::comm::tcp::descriptors;

/// Most handshakes at a time beyond the number of expected ranks: of all addresses, and of one.
pub(in crate::comm::tcp) const MAX_UNKNOWN: usize = 64;
const MAX_UNKNOWN_PER_ADDRESS: usize = 8;
/// Bytes of the stack of a handshake thread.
const STACK: usize = 256 << 10;

/// A rank that has proved that it knows the secret.
pub(in crate::comm::tcp) struct Client {
    pub rank: usize,
    pub(super) size: usize,
    pub(super) nonce: [u8; 32],
    pub blob: Vec<u8>,
    pub stream: TcpStream,
}

/// The handshakes in progress, and the results of those that are done.
pub(super) struct Acceptor {
    expected: usize,
    handshaking: HashMap<IpAddr, usize>,
    tell: Sender<(IpAddr, io::Result<Client>)>,
    clients: Receiver<(IpAddr, io::Result<Client>)>,
    /// Connections that were rejected.
    rejected: usize,
    /// The last reason why a connection could not be accepted.
    problem: Option<String>,
}

/// The result of polling the acceptor.
pub(super) enum Accepted {
    /// No connection, or a rejected one.
    Nobody,
    /// A rank that knows the secret.
    Client(Client),
    /// This process cannot accept connections, and that will not change.
    Exhausted(String),
}

impl Acceptor {
    pub fn new(expected: usize) -> Self {
        let (tell, clients) = mpsc::channel();
        Self { expected, handshaking: HashMap::new(), tell, clients, rejected: 0, problem: None }
    }

    /// Starts a `handshake` for each new connection, and waits a moment for one to finish.
    pub fn welcome<H>(&mut self, listener: &TcpListener, handshake: impl Fn(TcpStream) -> H) -> Accepted
    where
        H: FnOnce() -> io::Result<Client> + Send + 'static,
    {
        while self.handshaking.values().sum::<usize>() < self.expected.saturating_add(MAX_UNKNOWN) {
            let (stream, address) = match listener.accept() {
                Ok((stream, from)) => (stream, from.ip()),
                Err(problem) if problem.kind() == io::ErrorKind::WouldBlock => break,
                Err(problem) => {
                    let no_room = descriptors::exhausted(&problem);
                    self.problem = Some(no_room.clone().unwrap_or_else(|| problem.to_string()));
                    match no_room {
                        Some(problem) if self.handshaking.is_empty() => return Accepted::Exhausted(problem),
                        // Handshakes in progress will free descriptors; other connections were gone before they were
                        // accepted.
                        _ => break,
                    }
                }
            };
            let of_one = self.handshaking.entry(address).or_default();
            // All ranks may be on one machine; more connections than these would keep others out.
            if *of_one >= self.expected.saturating_add(MAX_UNKNOWN_PER_ADDRESS) {
                self.rejected += 1;
                continue;
            }
            let (tell, handshake) = (self.tell.clone(), handshake(stream));
            let run = move || drop(tell.send((address, handshake())));
            match thread::Builder::new().name("rendezvous".into()).stack_size(STACK).spawn(run) {
                Ok(_) => *of_one += 1,
                Err(problem) => self.problem = Some(format!("no thread could be started for a connection: {problem}")),
            }
        }
        self.handshaking.retain(|_, of_one| *of_one > 0);
        let Ok((address, client)) = self.clients.recv_timeout(Duration::from_millis(5)) else {
            return Accepted::Nobody;
        };
        if let Some(of_one) = self.handshaking.get_mut(&address) {
            *of_one -= 1;
        }
        client.map_or_else(
            |_| {
                self.rejected += 1;
                Accepted::Nobody
            },
            Accepted::Client,
        )
    }
}

/// What else happened, for the error that names the missing ranks.
impl fmt::Display for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rejected > 0 {
            let n = self.rejected;
            write!(f, " (connections turned away, which were no ranks or had another secret: {n})")?;
        }
        self.problem.as_ref().map_or(Ok(()), |problem| write!(f, " (a connection could not be taken: {problem})"))
    }
}
