//! Messages of endpoints in memory, for tests: each meets the receive that was posted for it.

use std::collections::{HashMap, VecDeque};

use super::endpoint::{EndpointInfo, RecvBytes, Request, SendBytes};
use super::request_table::RequestTable;
use crate::Error;

/// By which a message meets its receive: from, to and tag.
pub(in crate::comm) type Envelope = (usize, usize, u64);

/// The borrowed buffer of a pending message.
#[derive(Debug, Clone, Copy)]
pub(in crate::comm) struct Borrowed {
    pub envelope: Envelope,
    pub data: *mut u8,
    pub len: usize,
    request: usize,
}

#[derive(Debug)]
enum StoredBytes {
    /// Copied when they were sent.
    Own(Vec<u8>),
    /// Still the sender's.
    Borrowed(Borrowed),
}

impl StoredBytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            // SAFETY: borrowed until the request is done.
            Self::Borrowed(send) => unsafe { std::slice::from_raw_parts(send.data, send.len) },
        }
    }
}

/// A message in flight.
#[derive(Debug)]
struct InFlight {
    /// When it can be received.
    at: u64,
    bytes: StoredBytes,
}

/// The messages of all ranks of a world.
#[derive(Debug, Default)]
pub(in crate::comm) struct MessageStore {
    in_flight: HashMap<Envelope, VecDeque<InFlight>>,
    /// Posted receives. An envelope without one has no entry.
    receives: HashMap<Envelope, VecDeque<Borrowed>>,
    table: RequestTable,
}

// SAFETY: the buffers are borrowed by the store, whatever thread has it.
unsafe impl Send for MessageStore {}

impl MessageStore {
    /// Sends bytes that arrive at a time, or when those before them do. They are copied and their request is done, if
    /// the send is `eager`; else the store borrows them until they are received.
    pub fn send(
        &mut self,
        envelope: Envelope,
        SendBytes { data, len }: SendBytes,
        at: u64,
        eager: bool,
        requests: &mut Vec<Request>,
    ) {
        let request = self.table.begin();
        requests.push(Request(request as u64));
        let bytes = StoredBytes::Borrowed(Borrowed { envelope, data: data.cast_mut(), len, request });
        if eager {
            self.table.done(request);
            return self.push(envelope, at, StoredBytes::Own(bytes.get().to_vec()));
        }
        self.push(envelope, at, bytes);
    }

    /// Inserts a message as if its sender had sent it.
    pub fn inject(&mut self, envelope: Envelope, message: Vec<u8>) {
        self.push(envelope, 0, StoredBytes::Own(message));
    }

    fn push(&mut self, envelope: Envelope, at: u64, bytes: StoredBytes) {
        let messages = self.in_flight.entry(envelope).or_default();
        let at = messages.back().map_or(0, |last| last.at).max(at);
        messages.push_back(InFlight { at, bytes });
    }

    pub fn receive(&mut self, envelope: Envelope, RecvBytes { data, len }: RecvBytes, requests: &mut Vec<Request>) {
        let request = self.table.begin();
        requests.push(Request(request as u64));
        self.receives.entry(envelope).or_default().push_back(Borrowed { envelope, data, len, request });
    }

    /// Copies what has arrived at a rank by now into the buffers of its receives, and removes the requests that are
    /// done. Returns whether all are.
    pub fn test(&mut self, info: &EndpointInfo, now: u64, requests: &mut Vec<Request>) -> Result<bool, Error> {
        let Self { in_flight, receives, table } = self;
        let mut wrong = None;
        receives.retain(|envelope, receives| {
            let messages = in_flight.get_mut(envelope).filter(|_| envelope.1 == info.rank);
            let Some(messages) = messages else { return true };
            while !receives.is_empty()
                && let Some(message) = messages.pop_front_if(|message| message.at <= now)
                && let Some(receive) = receives.pop_front()
            {
                let bytes = message.bytes.get();
                match bytes.len() == receive.len {
                    // SAFETY: as long as that, and borrowed until the request is done.
                    true => unsafe { bytes.as_ptr().copy_to_nonoverlapping(receive.data, receive.len) },
                    false => wrong = Some(format!("{} bytes came on {envelope:?} for {}", bytes.len(), receive.len)),
                }
                table.done(receive.request);
                if let StoredBytes::Borrowed(send) = message.bytes {
                    table.done(send.request);
                }
            }
            !receives.is_empty()
        });
        let all = table.remove_done(requests);
        wrong.map_or(Ok(all), |problem| Err(Error::Transport { transport: info.name, problem }))
    }

    /// Takes a message that has arrived by now.
    pub fn take(&mut self, info: &EndpointInfo, from: Option<usize>, tag: u64, now: u64) -> Option<(usize, Vec<u8>)> {
        info.sources(from).find_map(|from| {
            let messages = self.in_flight.get_mut(&(from, info.rank, tag))?;
            let bytes = match messages.pop_front_if(|message| message.at <= now)?.bytes {
                StoredBytes::Own(bytes) => bytes,
                borrowed @ StoredBytes::Borrowed(Borrowed { request, .. }) => {
                    self.table.done(request);
                    borrowed.get().to_vec()
                }
            };
            Some((from, bytes))
        })
    }

    /// Drops pending receives and sends.
    pub fn reclaim(&mut self, requests: &mut Vec<Request>) {
        let Self { in_flight, receives, table } = self;
        for Request(request) in requests.drain(..) {
            let request = request as usize;
            if !table.is_done(request) {
                receives.retain(|_, receives| {
                    receives.retain(|receive| receive.request != request);
                    !receives.is_empty()
                });
                in_flight.values_mut().for_each(|messages| {
                    messages.retain(
                        |message| !matches!(message.bytes, StoredBytes::Borrowed(send) if send.request == request),
                    );
                });
            }
            table.forget(request);
        }
    }

    /// Sends that are not done.
    pub fn pending_sends(&self) -> Vec<Borrowed> {
        let sends = self.in_flight.values().flatten().map(|message| match message.bytes {
            StoredBytes::Borrowed(send) => Some(send),
            StoredBytes::Own(_) => None,
        });
        sends.flatten().collect()
    }

    /// Receives that are not done.
    pub fn pending_receives(&self) -> Vec<Borrowed> {
        self.receives.values().flatten().copied().collect()
    }
}
