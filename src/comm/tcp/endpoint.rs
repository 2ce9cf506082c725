//! The endpoint over TCP: all connections of a rank, progressed by any thread that calls.

use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::connection::Connection;
use super::network::{Network, Stream, System};
use super::poll;
use super::rendezvous::rendezvous_error;
use super::transfers::{RecvBuffer, SendBuffer};
use crate::Error;
use crate::comm::message_passing::{Clock, Endpoint, EndpointInfo, RecvBytes, Request, RequestTable, SendBytes};
use crate::lock::lock;

/// Most bytes of a control message: errors with the calls of all ranks.
const TAKEN: usize = 16 << 20;
/// So few connections are read without asking the system first which of them are ready.
const FEW: usize = 2;

/// The connections of a rank.
#[derive(Debug)]
pub(super) struct TcpEndpoint<N: Network = System> {
    info: EndpointInfo,
    network: N,
    /// The same connections, to wait for without the lock.
    streams: Vec<Option<N::Stream>>,
    state: Mutex<EndpointState<N::Stream>>,
    /// Parked threads.
    parked: AtomicUsize,
}

#[derive(Debug)]
struct EndpointState<S> {
    connections: Vec<Connection<S>>,
    table: RequestTable,
}

// SAFETY: the buffers are borrowed by the endpoint, whatever thread progresses it; they are used under its lock.
unsafe impl<S: Send> Send for EndpointState<S> {}

impl<S: Stream> EndpointState<S> {
    /// Writes and reads what is possible without blocking.
    fn pump(&mut self, network: &impl Network<Stream = S>) {
        // Loops and not iterators: this is much of what an unoptimised simulation does.
        let mut open = Vec::with_capacity(self.connections.len());
        for (rank, connection) in self.connections.iter().enumerate() {
            if let (Some(stream), None) = (&connection.stream, &connection.closed) {
                open.push((rank, stream, connection.wants_to_write()));
            }
        }
        let ready = match open.len() {
            0..=FEW => open.iter().map(|(rank, ..)| *rank).collect(),
            _ => network.ready(&open),
        };
        for rank in ready {
            let connection = &mut self.connections[rank];
            connection.write(&mut self.table);
            connection.read(&mut self.table);
        }
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
        let info = EndpointInfo {
            name: "tcp",
            rank,
            size: streams.len(),
            tags: u64::MAX / 2,
            can_reclaim: true,
            wakes_on_arrival: true,
            shares_memory: false,
            thresholds: network.thresholds(),
        };
        let connections = streams.into_iter().map(|stream| Connection::new(stream, network.limits())).collect();
        let state = Mutex::new(EndpointState { connections, table: RequestTable::default() });
        Self { info, network, streams: copies, state, parked: AtomicUsize::new(0) }
    }

    /// Progresses the connections, and wakes parked threads if a request is done.
    fn pump(&self, state: &mut EndpointState<N::Stream>) {
        let before = state.table.count;
        state.pump(&self.network);
        if state.table.count > before && self.parked.load(Ordering::Relaxed) > 0 {
            self.network.wake();
        }
    }
}

impl<N: Network> Endpoint for TcpEndpoint<N> {
    fn info(&self) -> &EndpointInfo {
        &self.info
    }

    fn clock(&self) -> &dyn Clock {
        &self.network
    }

    unsafe fn start_send(
        &self,
        to: usize,
        tag: u64,
        SendBytes { data, len }: SendBytes,
        control: bool,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        let EndpointState { connections, table } = &mut *lock(&self.state);
        let request = table.begin();
        requests.push(Request(request as u64));
        connections[to].send(tag, SendBuffer { data, len, request }, control, table);
        Ok(())
    }

    unsafe fn start_receive(
        &self,
        from: usize,
        tag: u64,
        RecvBytes { data, len }: RecvBytes,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        let EndpointState { connections, table } = &mut *lock(&self.state);
        let request = table.begin();
        requests.push(Request(request as u64));
        connections[from].receive(tag, RecvBuffer { data, len, request }, table);
        Ok(())
    }

    fn test(&self, requests: &mut Vec<Request>) -> Result<bool, Error> {
        let mut state = lock(&self.state);
        if state.table.remove_done(requests) {
            return Ok(true);
        }
        self.pump(&mut state);
        Ok(state.table.remove_done(requests))
    }

    fn drive(&self) {
        self.pump(&mut lock(&self.state));
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        let EndpointState { connections, table } = &mut *lock(&self.state);
        let mut sources = self.info.sources(from);
        Ok(sources.find_map(|rank| connections[rank].take(tag, TAKEN, table).map(|bytes| (rank, bytes))))
    }

    fn reclaim(&self, requests: &mut Vec<Request>) {
        let EndpointState { connections, table } = &mut *lock(&self.state);
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
        let mut open = Vec::with_capacity(self.streams.len());
        {
            let state = lock(&self.state);
            for (rank, (connection, stream)) in state.connections.iter().zip(&self.streams).enumerate() {
                if let (Some(stream), true) = (stream, connection.is_open()) {
                    open.push((rank, stream, connection.wants_to_write()));
                }
            }
        }
        self.network.park(&open, longest);
        self.parked.fetch_sub(1, Ordering::Relaxed);
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
