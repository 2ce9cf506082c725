//! An endpoint that keeps the contract of [`Endpoint`] and does no more, as MPI does: messages overtake across tags, a
//! send may not complete until the other side receives, and an arrival wakes nobody.

use std::sync::{Arc, Mutex};

use super::network::SimulatedNetwork;
use crate::Error;
use crate::comm::message_passing::message_store::MessageStore;
use crate::comm::message_passing::{Clock, Endpoint, EndpointInfo, RecvBytes, Request, SendBytes};
use crate::comm::tcp::network::Network;
use crate::lock::lock;

/// The endpoint of one rank.
#[derive(Debug)]
pub(super) struct MessageEndpoint {
    info: EndpointInfo,
    network: SimulatedNetwork,
    store: Arc<Mutex<MessageStore>>,
}

impl MessageEndpoint {
    pub fn new(network: SimulatedNetwork, rank: usize, size: usize, store: &Arc<Mutex<MessageStore>>) -> Self {
        let info = EndpointInfo {
            name: "simulated",
            rank,
            size,
            tags: 32767,
            can_reclaim: false,
            // Polls cost as much as over TCP, in the simulation.
            wakes_on_arrival: true,
            shares_memory: false,
            thresholds: network.thresholds(),
        };
        Self { info, network, store: store.clone() }
    }
}

impl Endpoint for MessageEndpoint {
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
        bytes: SendBytes,
        _control: bool,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        let at = self.network.message_arrival();
        let eager = bytes.len <= self.network.limits().eager;
        lock(&self.store).send((self.info.rank, to, tag), bytes, at, eager, requests);
        Ok(())
    }

    unsafe fn start_receive(
        &self,
        from: usize,
        tag: u64,
        buffer: RecvBytes,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        lock(&self.store).receive((from, self.info.rank, tag), buffer, requests);
        Ok(())
    }

    fn test(&self, requests: &mut Vec<Request>) -> Result<bool, Error> {
        lock(&self.store).test(&self.info, self.network.nanoseconds(), requests)
    }

    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error> {
        Ok(lock(&self.store).take(&self.info, from, tag, self.network.nanoseconds()))
    }

    fn cancel(&self, requests: &mut Vec<Request>) {
        lock(&self.store).reclaim(requests);
    }

    fn abort(&self) -> ! {
        panic!("rank {} gives up", self.info.rank)
    }
}
