//! One connection: its pending sends and receives, and its unexpected messages.
//!
//! Whatever the other side sends is checked against what the protocol allows at this point, and a violation closes the
//! connection.

use std::collections::{HashMap, VecDeque};
use std::net::{Shutdown, TcpStream};

use super::frame::{FrameHeader, FrameKind, Limits};
use super::network::Stream;
use super::transfers::{Body, DataReceive, DataSend, Destination, Frame, Reading, RecvBuffer, SendBuffer, Unexpected};
use crate::comm::host_buffer::zeroed;
use crate::comm::message_passing::RequestTable;

#[derive(Debug)]
pub(super) struct Connection<S = TcpStream> {
    /// `None` for this rank itself.
    pub stream: Option<S>,
    pub limits: Limits,
    /// Why nothing more can be read.
    pub closed: Option<String>,
    pub send_queue: VecDeque<Frame>,
    /// Bytes of the first frame that are written.
    pub written: usize,
    pub data_sends: VecDeque<DataSend>,
    /// Nothing can be written any more.
    pub write_closed: bool,
    pub staging: Box<[u8]>,
    pub staged: std::ops::Range<usize>,
    /// Scratch memory that discarded data is read into.
    pub discard: Vec<u8>,
    pub reading: Option<Reading>,
    /// Receives without a message, by tag. A reclaimed one keeps its place, so that each message meets the receive that
    /// was posted for it.
    pub posted: HashMap<u64, VecDeque<Destination>>,
    pub unexpected: HashMap<u64, VecDeque<Unexpected>>,
    pub data_receives: HashMap<u64, DataReceive>,
    pub awaiting_cts: HashMap<u64, SendBuffer>,
    pub next_id: u64,
    /// Bytes sent eagerly that the other side has not acknowledged by credit.
    pub credit_used: usize,
    /// Bytes received eagerly for which no credit has been returned yet, and those of them that have been taken.
    pub credit_held: usize,
    pub taken: usize,
    /// RTS frames without a posted receive.
    pub pending_rts: usize,
}

/// One part in so many of the credit is reserved for control messages.
const RESERVE: usize = 8;

/// Takes the first of a queue, which is removed when it is empty.
pub(super) fn pop<T>(queues: &mut HashMap<u64, VecDeque<T>>, tag: u64) -> Option<T> {
    let queue = queues.get_mut(&tag)?;
    let first = queue.pop_front();
    if queue.is_empty() {
        queues.remove(&tag);
    }
    first
}

impl<S: Stream> Connection<S> {
    pub fn new(stream: Option<S>, limits: Limits) -> Self {
        let staging = vec![0; if stream.is_some() { limits.staging } else { 0 }].into_boxed_slice();
        Self {
            stream,
            limits,
            closed: None,
            send_queue: VecDeque::new(),
            written: 0,
            data_sends: VecDeque::new(),
            write_closed: false,
            staging,
            staged: 0..0,
            discard: Vec::new(),
            reading: None,
            posted: HashMap::new(),
            unexpected: HashMap::new(),
            data_receives: HashMap::new(),
            awaiting_cts: HashMap::new(),
            next_id: 0,
            credit_used: 0,
            credit_held: 0,
            taken: 0,
            pending_rts: 0,
        }
    }

    /// Whether it can be read from.
    pub fn is_open(&self) -> bool {
        self.stream.is_some() && self.closed.is_none()
    }

    /// Whether there is something to write.
    pub fn wants_to_write(&self) -> bool {
        !(self.write_closed || self.send_queue.is_empty() && self.data_sends.is_empty())
    }

    /// Closes the write direction.
    pub fn close_write(&mut self) {
        if let Some(stream) = self.stream.as_ref().filter(|_| !self.write_closed) {
            let _ = stream.shutdown(Shutdown::Write);
            self.write_closed = true;
        }
    }

    /// Starts to send. The memory stays as it is until the request is done or reclaimed. For control messages a part of
    /// the credit is reserved: they may go to a rank that is not receiving.
    pub fn send(&mut self, tag: u64, source: SendBuffer, control: bool, table: &mut RequestTable) {
        let SendBuffer { data, len, request } = source;
        let credit = self.limits.credit - if control { 0 } else { self.limits.credit / RESERVE };
        if self.stream.is_none() {
            return self.send_to_itself(tag, source, table);
        }
        if len <= self.limits.eager && self.credit_used + len <= credit {
            self.credit_used += len;
            let header = FrameHeader { kind: FrameKind::Eager, len, tag, id: 0 }.write();
            self.send_queue.push_back(Frame {
                header,
                body: Body::Borrowed(data, len),
                request: Some((request, true)),
            });
        } else {
            let id = self.next_id;
            self.next_id += 1;
            self.awaiting_cts.insert(id, source);
            self.send_header(FrameHeader { kind: FrameKind::Rts, len, tag, id });
        }
        self.write(table);
    }

    fn send_to_itself(&mut self, tag: u64, source: SendBuffer, table: &mut RequestTable) {
        match pop(&mut self.posted, tag) {
            Some(Destination::Buffer(target)) => return self.copy_to_self(&source, target, table),
            Some(_) => return table.done(source.request),
            None => {}
        }
        let unexpected = match source.len <= self.limits.eager {
            true => {
                table.done(source.request);
                Unexpected::Eager(Body::Borrowed(source.data, source.len).bytes().to_vec())
            }
            false => Unexpected::Loopback(source),
        };
        self.unexpected.entry(tag).or_default().push_back(unexpected);
    }

    fn copy_to_self(&mut self, source: &SendBuffer, target: RecvBuffer, table: &mut RequestTable) {
        if source.len != target.len {
            return self.protocol_error(format!("{} bytes came for {}", source.len, target.len));
        }
        // SAFETY: both are borrowed for this and as long as that; a rank does not receive into what it sends.
        unsafe { source.data.copy_to_nonoverlapping(target.data, source.len) };
        table.done(source.request);
        table.done(target.request);
    }

    /// Starts to receive.
    pub fn receive(&mut self, tag: u64, target: RecvBuffer, table: &mut RequestTable) {
        match pop(&mut self.unexpected, tag) {
            None => self.posted.entry(tag).or_default().push_back(Destination::Buffer(target)),
            Some(Unexpected::Eager(bytes)) => self.deliver(&bytes, target, table),
            Some(Unexpected::Rts { id, len }) => {
                self.pending_rts -= 1;
                self.accept(tag, id, len, Destination::Buffer(target));
                self.write(table);
            }
            Some(Unexpected::Loopback(source)) => self.copy_to_self(&source, target, table),
            // Only `take` receives into memory of our own, and nobody posts a receive with such a tag.
            Some(Unexpected::Receiving(_)) => self.protocol_error("a message is both taken and received".into()),
        }
    }

    /// Takes a message of `most` bytes at most that has arrived.
    pub fn take(&mut self, tag: u64, most: usize, table: &mut RequestTable) -> Option<Vec<u8>> {
        if self.unexpected.is_empty() {
            // As a rule, and cheaper to find out.
            return None;
        }
        let first = self.unexpected.get_mut(&tag)?.front_mut()?;
        match *first {
            Unexpected::Receiving(_) => return None,
            Unexpected::Rts { len, .. } if len > most => {
                self.protocol_error(format!("a message of {len} bytes came where {most} are the most"));
                return None;
            }
            Unexpected::Rts { id, len } => {
                let Some(bytes) = zeroed(len) else {
                    self.protocol_error(format!("there is no memory for a message of {len} bytes"));
                    return None;
                };
                *first = Unexpected::Receiving(id);
                self.pending_rts -= 1;
                self.accept(tag, id, len, Destination::Owned(bytes));
                self.write(table);
                return None;
            }
            Unexpected::Eager(_) | Unexpected::Loopback(_) => {}
        }
        match pop(&mut self.unexpected, tag)? {
            Unexpected::Eager(bytes) => {
                self.return_credit(bytes.len());
                self.write(table);
                Some(bytes)
            }
            Unexpected::Loopback(source) => {
                table.done(source.request);
                Some(Body::Borrowed(source.data, source.len).bytes().to_vec())
            }
            _ => None,
        }
    }

    /// Copies an eager message into the buffer of its receive.
    pub fn deliver(&mut self, bytes: &[u8], target: RecvBuffer, table: &mut RequestTable) {
        if bytes.len() != target.len {
            return self.protocol_error(format!("{} bytes came for {}", bytes.len(), target.len));
        }
        // SAFETY: the buffer is borrowed for this, and as long as that.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(target.data, bytes.len()) };
        table.done(target.request);
        self.return_credit(bytes.len());
    }

    /// Returns the credit of eager bytes that no longer take memory.
    pub fn return_credit(&mut self, len: usize) {
        self.taken = (self.taken + len).min(self.credit_held);
        if self.taken >= self.limits.credit / 4 {
            let len = std::mem::take(&mut self.taken);
            self.credit_held -= len;
            self.send_header(FrameHeader { kind: FrameKind::Credit, len, tag: 0, id: 0 });
        }
    }

    pub fn accept(&mut self, tag: u64, id: u64, len: usize, into: Destination) {
        if let Destination::Buffer(target) = &into
            && target.len != len
        {
            return self.protocol_error(format!("{len} bytes are announced for {}", target.len));
        }
        if self.data_receives.insert(id, DataReceive { tag, len, got: 0, into }).is_some() {
            return self.protocol_error(format!("offer {id} came twice"));
        }
        self.send_header(FrameHeader { kind: FrameKind::Cts, len: 0, tag: 0, id });
    }

    fn send_header(&mut self, header: FrameHeader) {
        if self.stream.is_some() && !self.write_closed {
            self.send_queue.push_back(Frame { header: header.write(), body: Body::Own(Vec::new()), request: None });
        }
    }

    /// Closes the connection: the other side has violated the protocol.
    pub fn protocol_error(&mut self, problem: String) {
        self.closed.get_or_insert(problem);
        if let Some(stream) = &self.stream {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.write_closed = true;
    }

    /// Reclaims the buffer of a request. What the other side has been promised is still sent.
    pub fn reclaim(&mut self, request: usize) {
        let mine = |target: &RecvBuffer| target.request == request;
        for queue in self.unexpected.values_mut() {
            queue.retain(|unexpected| !matches!(unexpected, Unexpected::Loopback(source) if source.request == request));
        }
        self.unexpected.retain(|_, queue| !queue.is_empty());
        let receiving = self.data_receives.values_mut().map(|data_receive| &mut data_receive.into);
        let reading = match &mut self.reading {
            Some(Reading::Eager { into, .. }) => Some(into),
            _ => None,
        };
        for into in receiving.chain(reading).chain(self.posted.values_mut().flatten()) {
            if matches!(into, Destination::Buffer(target) if mine(target)) {
                *into = Destination::Discard;
            }
        }
        self.awaiting_cts.retain(|_, source| source.request != request);
        self.data_sends.retain(|data_send| data_send.source.request != request);
        // The header of the first frame may be partly written: its bytes must follow.
        let begun = self.written > 0;
        let mut place = 0;
        self.send_queue.retain_mut(|frame| {
            place += 1;
            if frame.request.is_none_or(|(other, _)| other != request) {
                return true;
            }
            if begun && place == 1 {
                frame.body = Body::Own(frame.body.bytes().to_vec());
                frame.request = None;
                return true;
            }
            false
        });
    }
}
