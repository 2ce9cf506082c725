//! The endpoint over TCP: all connections of a rank, progressed by any thread that calls.

use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::network::{Network, Stream, System};
use super::poll;
use super::rendezvous::rendezvous_error;
use super::request_table::RequestTable;
use super::transfers::{RecvBuffer, SendBuffer};
use crate::Error;
use crate::comm::lock::lock;
use crate::comm::message_passing::{Endpoint, Request, Thresholds};

/// Most bytes of a control message: errors with the calls of all ranks.
const TAKEN: usize = 16 << 20;
/// So few connections are read without asking the system first which of them are ready.
const FEW: usize = 2;

/// The connections of a rank.
#[derive(Debug)]
pub(super) struct TcpEndpoint<N: Network = System> {
    rank: usize,
    network: N,
    /// The same connections, to wait for without the lock.
    streams: Vec<Option<N::Stream>>,
    state: Mutex<State<N::Stream>>,
    /// Parked threads.
    parked: AtomicUsize,
}

#[derive(Debug)]
struct State<S> {
    connections: Vec<Connection<S>>,
    table: RequestTable,
}

// SAFETY: the buffers are borrowed by the endpoint, whatever thread progresses it; they are used under its lock.
unsafe impl<S: Send> Send for State<S> {}

impl<S: Stream> State<S> {
    /// Writes and reads what is possible without blocking.
    fn pump(&mut self, network: &impl Network<Stream = S>) {
        let open: Vec<usize> = (0..self.connections.len()).filter(|rank| self.connections[*rank].is_open()).collect();
        let ready = match open.len() {
            0..=FEW => open,
            _ => {
                let state = |rank: &usize| {
                    let connection = &self.connections[*rank];
                    connection.stream.as_ref().map(|stream| (*rank, stream, connection.wants_to_write()))
                };
                let connections: Vec<_> = open.iter().filter_map(state).collect();
                network.ready(&connections)
            }
        };
        for rank in ready {
            let connection = &mut self.connections[rank];
            connection.write(&mut self.table);
            connection.read(&mut self.table);
        }
    }

    /// Removes the requests that are done. Returns whether all are.
    fn remove_done(&mut self, requests: &mut Vec<Request>) -> bool {
        requests.retain(|request| {
            let request = request.0 as usize;
            let done = self.table.is_done(request);
            if done {
                self.table.forget(request);
            }
            !done
        });
        requests.is_empty()
    }
}

impl TcpEndpoint {
    /// Makes the endpoint of connections to all ranks but this one.
    pub fn new(rank: usize, streams: Vec<Option<TcpStream>>) -> Result<Self, Error> {
        let fail = |problem: std::io::Error| rendezvous_error(format!("the connections of rank {rank}: {problem}"));
        streams.iter().flatten().try_for_each(poll::prepare).map_err(fail)?;
        let copies: std::io::Result<Vec<_>> =
            streams.iter().map(|stream| stream.as_ref().map(TcpStream::try_clone).transpose()).collect();
        let network = System::new().map_err(fail)?;
        Ok(Self::over(network, rank, streams, copies.map_err(fail)?))
    }
}

impl<N: Network> TcpEndpoint<N> {
    /// Makes the endpoint of streams of a network. They are passed twice: to be progressed, and to be waited for
    /// meanwhile.
    pub fn over(network: N, rank: usize, streams: Vec<Option<N::Stream>>, copies: Vec<Option<N::Stream>>) -> Self {
        let connections = streams.into_iter().map(|stream| Connection::new(stream, network.limits())).collect();
        let state = Mutex::new(State { connections, table: RequestTable::default() });
        Self { rank, network, streams: copies, state, parked: AtomicUsize::new(0) }
    }

    /// Begins to send bytes, if there are any.
    fn begin_send(
        &self,
        to: usize,
        (data, len): (*const u8, usize),
        requests: &mut Vec<Request>,
        send: impl FnOnce(&mut Connection<N::Stream>, SendBuffer, &mut RequestTable),
    ) {
        if len > 0 {
            let State { connections, table } = &mut *lock(&self.state);
            let request = table.begin();
            requests.push(Request(request as u64));
            send(&mut connections[to], SendBuffer { data, len, request }, table);
        }
    }

    /// Progresses the connections, and wakes parked threads if a request is done.
    fn drive(&self, state: &mut State<N::Stream>) {
        let before = state.table.count;
        state.pump(&self.network);
        if state.table.count > before && self.parked.load(Ordering::Relaxed) > 0 {
            self.network.wake();
        }
    }
}

impl<N: Network> Endpoint for TcpEndpoint<N> {
    fn name(&self) -> &'static str {
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
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        self.begin_send(to, (data, len), requests, |connection, source, table| connection.send(tag, source, table));
        Ok(())
    }

    unsafe fn send_control(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        self.begin_send(to, (data, len), requests, |connection, source, table| {
            connection.send_control(tag, source, table);
        });
        Ok(())
    }

    unsafe fn receive(
        &self,
        from: usize,
        tag: u64,
        data: *mut u8,
        len: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        if len > 0 {
            let State { connections, table } = &mut *lock(&self.state);
            let request = table.begin();
            requests.push(Request(request as u64));
            connections[from].receive(tag, RecvBuffer { data, len, request }, table);
        }
        Ok(())
    }

    fn progress(&self, requests: &mut Vec<Request>) -> Result<bool, Error> {
        if requests.is_empty() {
            return Ok(true);
        }
        let mut state = lock(&self.state);
        if state.remove_done(requests) {
            return Ok(true);
        }
        self.drive(&mut state);
        Ok(state.remove_done(requests))
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        let mut state = lock(&self.state);
        self.drive(&mut state);
        let State { connections, table } = &mut *state;
        let ranks = from.map_or(0..connections.len(), |from| from..from + 1);
        Ok(ranks.into_iter().find_map(|rank| connections[rank].take(tag, TAKEN, table).map(|bytes| (rank, bytes))))
    }

    fn cancel(&self, requests: &mut Vec<Request>) {
        self.reclaim(requests);
    }

    fn can_reclaim(&self) -> bool {
        true
    }

    fn reclaim(&self, requests: &mut Vec<Request>) {
        let State { connections, table } = &mut *lock(&self.state);
        for request in requests.drain(..) {
            let request = request.0 as usize;
            if !table.is_done(request) {
                connections.iter_mut().for_each(|connection| connection.reclaim(request));
            }
            table.forget(request);
        }
    }

    fn park(&self, longest: Duration) {
        // Before the connections are read: whoever progresses them from then on wakes this thread.
        self.parked.fetch_add(1, Ordering::Relaxed);
        let open: Vec<(usize, bool)> = {
            let state = lock(&self.state);
            let open = state.connections.iter().enumerate().filter(|(_, connection)| connection.is_open());
            open.map(|(rank, connection)| (rank, connection.wants_to_write())).collect()
        };
        let connections: Vec<_> = (open.into_iter())
            .filter_map(|(rank, writes)| self.streams[rank].as_ref().map(|stream| (rank, stream, writes)))
            .collect();
        self.network.park(&connections, longest);
        self.parked.fetch_sub(1, Ordering::Relaxed);
    }

    fn wakes_on_arrival(&self) -> bool {
        true
    }

    fn thresholds(&self) -> Thresholds {
        self.network.thresholds()
    }

    fn now(&self) -> Instant {
        self.network.now()
    }

    fn yield_now(&self) {
        self.network.yield_now();
    }

    fn sleep(&self, duration: Duration) {
        self.network.sleep(duration);
    }

    fn shares_memory(&self) -> bool {
        false
    }

    fn lost_ranks(&self) -> Vec<(usize, String)> {
        let state = lock(&self.state);
        let closed = |(rank, connection): (usize, &Connection<N::Stream>)| {
            connection.closed.clone().map(|problem| (rank, problem))
        };
        state.connections.iter().enumerate().filter_map(closed).collect()
    }

    fn close(&self, limit: Duration) {
        let until = self.network.now() + limit;
        loop {
            {
                let mut state = lock(&self.state);
                state.pump(&self.network);
                state
                    .connections
                    .iter_mut()
                    .filter(|connection| !connection.wants_to_write())
                    .for_each(Connection::close_write);
                if !state.connections.iter().any(Connection::is_open) {
                    return;
                }
            }
            if self.network.now() > until {
                return;
            }
            self.park(Duration::from_millis(5));
        }
    }
}
