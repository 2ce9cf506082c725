//! All connections of a rank, worked by whoever calls.

use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::network::{Network, Stream, System};
use super::ops::Ops;
use super::peer::Peer;
use super::poll;
use super::rendezvous::failure;
use super::transit::{Lent, Place};
use crate::Error;
use crate::comm::wired::{Sizes, Ticket, Wire, lock};

/// Most bytes of a message that is taken: errors with the calls of all ranks, at the most.
const TAKEN: usize = 16 << 20;
/// As many connections are read without asking the system first which of them has something.
const FEW: usize = 2;

/// The connections of a rank.
#[derive(Debug)]
pub(super) struct TcpWire<N: Network = System> {
    rank: usize,
    network: N,
    /// Connections again, to wait for without the lock.
    streams: Vec<Option<N::Stream>>,
    state: Mutex<State<N::Stream>>,
    /// Threads that rest.
    resting: AtomicUsize,
}

#[derive(Debug)]
struct State<S> {
    peers: Vec<Peer<S>>,
    ops: Ops,
}

// SAFETY: the places are lent to the wire, whatever thread works it; they are used under its lock.
unsafe impl<S: Send> Send for State<S> {}

impl<S: Stream> State<S> {
    /// Writes and reads what is possible at once.
    fn pump(&mut self, network: &impl Network<Stream = S>) {
        let open: Vec<usize> = (0..self.peers.len()).filter(|rank| self.peers[*rank].is_open()).collect();
        let ready = match open.len() {
            0..=FEW => open,
            _ => {
                let state = |rank: &usize| {
                    let peer = &self.peers[*rank];
                    peer.stream.as_ref().map(|stream| (*rank, stream, peer.wants_to_write()))
                };
                let connections: Vec<_> = open.iter().filter_map(state).collect();
                network.ready(&connections)
            }
        };
        for rank in ready {
            let peer = &mut self.peers[rank];
            peer.write(&mut self.ops);
            peer.read(&mut self.ops);
        }
    }

    /// Strikes out what is done. Returns whether all is.
    fn strike(&mut self, tickets: &mut Vec<Ticket>) -> bool {
        tickets.retain(|ticket| {
            let op = ticket.0 as usize;
            let done = self.ops.is_done(op);
            if done {
                self.ops.forget(op);
            }
            !done
        });
        tickets.is_empty()
    }
}

impl TcpWire {
    /// Takes over connections to all ranks but this one.
    pub fn new(rank: usize, streams: Vec<Option<TcpStream>>) -> Result<Self, Error> {
        let fail = |problem: std::io::Error| failure(format!("the connections of rank {rank}: {problem}"));
        streams.iter().flatten().try_for_each(poll::prepare).map_err(fail)?;
        let copies: std::io::Result<Vec<_>> =
            streams.iter().map(|stream| stream.as_ref().map(TcpStream::try_clone).transpose()).collect();
        let network = System::new().map_err(fail)?;
        Ok(Self::over(network, rank, streams, copies.map_err(fail)?))
    }
}

impl<N: Network> TcpWire<N> {
    /// Works these streams of a network. They come twice: to be worked, and to be waited for meanwhile.
    pub fn over(network: N, rank: usize, streams: Vec<Option<N::Stream>>, copies: Vec<Option<N::Stream>>) -> Self {
        let peers = streams.into_iter().map(|stream| Peer::new(stream, network.limits())).collect();
        let state = Mutex::new(State { peers, ops: Ops::default() });
        Self { rank, network, streams: copies, state, resting: AtomicUsize::new(0) }
    }

    /// Works the connections. What is done that way may be what another thread rests for.
    fn work(&self, state: &mut State<N::Stream>) {
        let before = state.ops.count;
        state.pump(&self.network);
        if state.ops.count > before && self.resting.load(Ordering::Relaxed) > 0 {
            self.network.ring();
        }
    }
}

impl<N: Network> Wire for TcpWire<N> {
    fn engine(&self) -> &'static str {
        "tcp"
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.streams.len()
    }

    fn tags(&self) -> u64 {
        u64::MAX / 2
    }

    unsafe fn send(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error> {
        if len > 0 {
            let State { peers, ops } = &mut *lock(&self.state);
            let op = ops.begin();
            tickets.push(Ticket(op as u64));
            peers[to].send(tag, Lent { data, len, op }, ops);
        }
        Ok(())
    }

    unsafe fn tell(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error> {
        if len > 0 {
            let State { peers, ops } = &mut *lock(&self.state);
            let op = ops.begin();
            tickets.push(Ticket(op as u64));
            peers[to].tell(tag, Lent { data, len, op }, ops);
        }
        Ok(())
    }

    unsafe fn receive(
        &self,
        from: usize,
        tag: u64,
        data: *mut u8,
        len: usize,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error> {
        if len > 0 {
            let State { peers, ops } = &mut *lock(&self.state);
            let op = ops.begin();
            tickets.push(Ticket(op as u64));
            peers[from].receive(tag, Place { data, len, op }, ops);
        }
        Ok(())
    }

    fn progress(&self, tickets: &mut Vec<Ticket>) -> Result<bool, Error> {
        if tickets.is_empty() {
            return Ok(true);
        }
        let mut state = lock(&self.state);
        if state.strike(tickets) {
            return Ok(true);
        }
        self.work(&mut state);
        Ok(state.strike(tickets))
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        let mut state = lock(&self.state);
        self.work(&mut state);
        let State { peers, ops } = &mut *state;
        let ranks = from.map_or(0..peers.len(), |from| from..from + 1);
        Ok(ranks.into_iter().find_map(|rank| peers[rank].take(tag, TAKEN, ops).map(|bytes| (rank, bytes))))
    }

    fn cancel(&self, tickets: &mut Vec<Ticket>) {
        self.withdraw(tickets);
    }

    fn gives_back(&self) -> bool {
        true
    }

    fn withdraw(&self, tickets: &mut Vec<Ticket>) {
        let State { peers, ops } = &mut *lock(&self.state);
        for ticket in tickets.drain(..) {
            let op = ticket.0 as usize;
            if !ops.is_done(op) {
                peers.iter_mut().for_each(|peer| peer.withdraw(op));
            }
            ops.forget(op);
        }
    }

    fn rest(&self, longest: Duration) {
        // Before the connections are looked at: whoever works them from then on rings.
        self.resting.fetch_add(1, Ordering::Relaxed);
        let open: Vec<(usize, bool)> = {
            let state = lock(&self.state);
            let open = state.peers.iter().enumerate().filter(|(_, peer)| peer.is_open());
            open.map(|(rank, peer)| (rank, peer.wants_to_write())).collect()
        };
        let connections: Vec<_> = (open.into_iter())
            .filter_map(|(rank, writes)| self.streams[rank].as_ref().map(|stream| (rank, stream, writes)))
            .collect();
        self.network.rest(&connections, longest);
        self.resting.fetch_sub(1, Ordering::Relaxed);
    }

    fn wakes(&self) -> bool {
        true
    }

    fn sizes(&self) -> Sizes {
        self.network.sizes()
    }

    fn now(&self) -> Instant {
        self.network.now()
    }

    fn give_way(&self) {
        self.network.give_way();
    }

    fn sleep(&self, duration: Duration) {
        self.network.sleep(duration);
    }

    fn shares_memory(&self) -> bool {
        false
    }

    fn lost(&self) -> Vec<(usize, String)> {
        let state = lock(&self.state);
        let closed = |(rank, peer): (usize, &Peer<N::Stream>)| peer.closed.clone().map(|problem| (rank, problem));
        state.peers.iter().enumerate().filter_map(closed).collect()
    }

    fn close(&self, patience: Duration) {
        let until = self.network.now() + patience;
        loop {
            {
                let mut state = lock(&self.state);
                state.pump(&self.network);
                state.peers.iter_mut().filter(|peer| !peer.wants_to_write()).for_each(Peer::hang_up);
                if !state.peers.iter().any(Peer::is_open) {
                    return;
                }
            }
            if self.network.now() > until {
                return;
            }
            self.rest(Duration::from_millis(5));
        }
    }
}
