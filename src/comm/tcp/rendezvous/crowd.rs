//! Whoever connects while ranks are expected: each is heard on a thread of its own, so many at a time.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use super::host::Guest;
use crate::comm::tcp::descriptors;

/// Most connections that are heard at a time beside those of the ranks that are expected: of all addresses, and of one.
pub(in crate::comm::tcp) const STRANGERS: usize = 64;
const STRANGERS_OF_ONE: usize = 8;
/// Bytes of the stack of a thread that hears one.
const STACK: usize = 256 << 10;

/// The connections that are being heard, and what became of those that were.
pub(super) struct Crowd {
    expected: usize,
    heard: HashMap<IpAddr, usize>,
    tell: Sender<(IpAddr, io::Result<Guest>)>,
    guests: Receiver<(IpAddr, io::Result<Guest>)>,
    /// How many were turned away.
    strangers: usize,
    /// The last reason for which a connection could not be taken that was there.
    problem: Option<String>,
}

/// What came of listening for a moment.
pub(super) enum Came {
    /// Nobody, or somebody who does not belong here.
    Nobody,
    /// A rank that knows the secret.
    Guest(Guest),
    /// Connections that this process cannot take, and it will not change.
    NoRoom(String),
}

impl Crowd {
    pub fn new(expected: usize) -> Self {
        let (tell, guests) = mpsc::channel();
        Self { expected, heard: HashMap::new(), tell, guests, strangers: 0, problem: None }
    }

    /// Hears whoever is there, by what `hear` makes of a connection, and waits a moment for one to be done.
    pub fn welcome<H>(&mut self, listener: &TcpListener, hear: impl Fn(TcpStream) -> H) -> Came
    where
        H: FnOnce() -> io::Result<Guest> + Send + 'static,
    {
        while self.heard.values().sum::<usize>() < self.expected.saturating_add(STRANGERS) {
            let (stream, address) = match listener.accept() {
                Ok((stream, from)) => (stream, from.ip()),
                Err(problem) if problem.kind() == io::ErrorKind::WouldBlock => break,
                Err(problem) => {
                    let no_room = descriptors::exhausted(&problem);
                    self.problem = Some(no_room.clone().unwrap_or_else(|| problem.to_string()));
                    match no_room {
                        Some(problem) if self.heard.is_empty() => return Came::NoRoom(problem),
                        // Those that are being heard will make room; others were gone before they were taken.
                        _ => break,
                    }
                }
            };
            let of_one = self.heard.entry(address).or_default();
            // All ranks may live on one machine; more than these would keep others out.
            if *of_one >= self.expected.saturating_add(STRANGERS_OF_ONE) {
                self.strangers += 1;
                continue;
            }
            let (tell, hear) = (self.tell.clone(), hear(stream));
            let run = move || drop(tell.send((address, hear())));
            match thread::Builder::new().name("rendezvous".into()).stack_size(STACK).spawn(run) {
                Ok(_) => *of_one += 1,
                Err(problem) => self.problem = Some(format!("no thread could be started for a connection: {problem}")),
            }
        }
        self.heard.retain(|_, of_one| *of_one > 0);
        let Ok((address, guest)) = self.guests.recv_timeout(Duration::from_millis(5)) else { return Came::Nobody };
        if let Some(of_one) = self.heard.get_mut(&address) {
            *of_one -= 1;
        }
        guest.map_or_else(
            |_| {
                self.strangers += 1;
                Came::Nobody
            },
            Came::Guest,
        )
    }
}

/// What else happened, for the error that says who did not come.
impl fmt::Display for Crowd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.strangers > 0 {
            let n = self.strangers;
            write!(f, " (connections turned away, which were no ranks or had another secret: {n})")?;
        }
        self.problem.as_ref().map_or(Ok(()), |problem| write!(f, " (a connection could not be taken: {problem})"))
    }
}
