//! One connection: what is being written to it and read from it, and which messages it has brought.
//!
//! Whatever the other side sends is checked against what it may send at this point, and ends the connection if it may not.

use std::collections::{HashMap, VecDeque};
use std::net::{Shutdown, TcpStream};

use super::frame::{Head, Kind, Limits};
use super::network::Stream;
use super::ops::Ops;
use super::transit::{Accepted, Arrival, Body, Bulk, Into, Lent, Parcel, Place, Reading};
use crate::comm::host::zeroed;

#[derive(Debug)]
pub(super) struct Peer<S = TcpStream> {
    /// `None` for this rank itself.
    pub stream: Option<S>,
    pub limits: Limits,
    /// Why there is nothing more to be read.
    pub closed: Option<String>,
    pub out: VecDeque<Parcel>,
    /// Bytes of the first parcel that are written.
    pub written: usize,
    pub bulk: VecDeque<Bulk>,
    /// Nothing can be written any more.
    pub mute: bool,
    pub staging: Box<[u8]>,
    pub staged: std::ops::Range<usize>,
    /// What nobody wants is read into this.
    pub nowhere: Vec<u8>,
    pub reading: Option<Reading>,
    pub posted: HashMap<u64, VecDeque<Place>>,
    pub came: HashMap<u64, VecDeque<Arrival>>,
    pub accepted: HashMap<u64, Accepted>,
    pub offered: HashMap<u64, Lent>,
    pub next_offer: u64,
    /// Bytes sent whole that the other side has not taken yet, as far as it has said so.
    pub owing: usize,
    /// Bytes received whole for which no credit has been given yet, and those of them that have been taken.
    pub owed: usize,
    pub taken: usize,
    /// Offers that are waiting in `came`.
    pub offers: usize,
}

/// Of the credit, one part in so many is for what is told.
const RESERVE: usize = 8;

/// The first of a queue, which is gone when it is empty.
pub(super) fn pop<T>(queues: &mut HashMap<u64, VecDeque<T>>, tag: u64) -> Option<T> {
    let queue = queues.get_mut(&tag)?;
    let first = queue.pop_front();
    if queue.is_empty() {
        queues.remove(&tag);
    }
    first
}

impl<S: Stream> Peer<S> {
    pub fn new(stream: Option<S>, limits: Limits) -> Self {
        let staging = vec![0; if stream.is_some() { limits.staging } else { 0 }].into_boxed_slice();
        Self {
            stream,
            limits,
            closed: None,
            out: VecDeque::new(),
            written: 0,
            bulk: VecDeque::new(),
            mute: false,
            staging,
            staged: 0..0,
            nowhere: Vec::new(),
            reading: None,
            posted: HashMap::new(),
            came: HashMap::new(),
            accepted: HashMap::new(),
            offered: HashMap::new(),
            next_offer: 0,
            owing: 0,
            owed: 0,
            taken: 0,
            offers: 0,
        }
    }

    /// Whether it is there to be read from.
    pub fn is_open(&self) -> bool {
        self.stream.is_some() && self.closed.is_none()
    }

    /// Whether there is something to be written.
    pub fn wants_to_write(&self) -> bool {
        !(self.mute || self.out.is_empty() && self.bulk.is_empty())
    }

    /// Says that nothing more will be written.
    pub fn hang_up(&mut self) {
        if let Some(stream) = self.stream.as_ref().filter(|_| !self.mute) {
            let _ = stream.shutdown(Shutdown::Write);
            self.mute = true;
        }
    }

    /// Begins to send. The memory stays as it is until the operation is done or withdrawn.
    pub fn send(&mut self, tag: u64, lent: Lent, ops: &mut Ops) {
        self.send_on_credit(self.limits.credit - self.limits.credit / RESERVE, tag, lent, ops);
    }

    /// [`send`](Self::send) of what should come to a rank that does not answer: it has a part of the credit to itself.
    pub fn tell(&mut self, tag: u64, lent: Lent, ops: &mut Ops) {
        self.send_on_credit(self.limits.credit, tag, lent, ops);
    }

    fn send_on_credit(&mut self, credit: usize, tag: u64, lent: Lent, ops: &mut Ops) {
        let Lent { data, len, op } = lent;
        if self.stream.is_none() {
            return self.send_to_itself(tag, lent, ops);
        }
        if len <= self.limits.whole && self.owing + len <= credit {
            self.owing += len;
            let head = Head { kind: Kind::Whole, len, tag, id: 0 }.write();
            self.out.push_back(Parcel { head, body: Body::Lent(data, len), op: Some((op, true)) });
        } else {
            let id = self.next_offer;
            self.next_offer += 1;
            self.offered.insert(id, lent);
            self.say(Head { kind: Kind::Offer, len, tag, id });
        }
        self.write(ops);
    }

    fn send_to_itself(&mut self, tag: u64, lent: Lent, ops: &mut Ops) {
        if let Some(place) = pop(&mut self.posted, tag) {
            return self.hand_over(&lent, place, ops);
        }
        let arrival = match lent.len <= self.limits.whole {
            true => {
                ops.done(lent.op);
                Arrival::Whole(Body::Lent(lent.data, lent.len).bytes().to_vec())
            }
            false => Arrival::Own(lent),
        };
        self.came.entry(tag).or_default().push_back(arrival);
    }

    fn hand_over(&mut self, lent: &Lent, place: Place, ops: &mut Ops) {
        if lent.len != place.len {
            return self.break_off(format!("{} bytes came for {}", lent.len, place.len));
        }
        // SAFETY: both are lent for this and as long as that; a rank does not receive into what it sends.
        unsafe { lent.data.copy_to_nonoverlapping(place.data, lent.len) };
        ops.done(lent.op);
        ops.done(place.op);
    }

    /// Begins to receive.
    pub fn receive(&mut self, tag: u64, place: Place, ops: &mut Ops) {
        match pop(&mut self.came, tag) {
            None => self.posted.entry(tag).or_default().push_back(place),
            Some(Arrival::Whole(bytes)) => self.deliver(&bytes, place, ops),
            Some(Arrival::Offered { id, len }) => {
                self.offers -= 1;
                self.accept(tag, id, len, Into::Place(place));
                self.write(ops);
            }
            Some(Arrival::Own(lent)) => self.hand_over(&lent, place, ops),
            // Only what is taken is accepted like this, and nobody receives with such a tag.
            Some(Arrival::Coming(_)) => self.break_off("a message is both taken and received".into()),
        }
    }

    /// Takes a message of `most` bytes at most that is here.
    pub fn take(&mut self, tag: u64, most: usize, ops: &mut Ops) -> Option<Vec<u8>> {
        let first = self.came.get_mut(&tag)?.front_mut()?;
        match *first {
            Arrival::Coming(_) => return None,
            Arrival::Offered { len, .. } if len > most => {
                self.break_off(format!("a message of {len} bytes came where {most} are the most"));
                return None;
            }
            Arrival::Offered { id, len } => {
                let Some(bytes) = zeroed(len) else {
                    self.break_off(format!("there is no memory for a message of {len} bytes"));
                    return None;
                };
                *first = Arrival::Coming(id);
                self.offers -= 1;
                self.accept(tag, id, len, Into::Owned(bytes));
                self.write(ops);
                return None;
            }
            Arrival::Whole(_) | Arrival::Own(_) => {}
        }
        match pop(&mut self.came, tag)? {
            Arrival::Whole(bytes) => {
                self.was_taken(bytes.len());
                self.write(ops);
                Some(bytes)
            }
            Arrival::Own(lent) => {
                ops.done(lent.op);
                Some(Body::Lent(lent.data, lent.len).bytes().to_vec())
            }
            _ => None,
        }
    }

    /// Puts a message that has come whole where it belongs.
    pub fn deliver(&mut self, bytes: &[u8], place: Place, ops: &mut Ops) {
        if bytes.len() != place.len {
            return self.break_off(format!("{} bytes came for {}", bytes.len(), place.len));
        }
        // SAFETY: the place is lent for this, and as long as that.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(place.data, bytes.len()) };
        ops.done(place.op);
        self.was_taken(bytes.len());
    }

    /// Bytes that had come whole no longer take memory.
    pub fn was_taken(&mut self, len: usize) {
        self.taken = (self.taken + len).min(self.owed);
        if self.taken >= self.limits.credit / 4 {
            let len = std::mem::take(&mut self.taken);
            self.owed -= len;
            self.say(Head { kind: Kind::Credit, len, tag: 0, id: 0 });
        }
    }

    pub fn accept(&mut self, tag: u64, id: u64, len: usize, into: Into) {
        if let Into::Place(place) = &into
            && place.len != len
        {
            return self.break_off(format!("{len} bytes are offered for {}", place.len));
        }
        if self.accepted.insert(id, Accepted { tag, len, got: 0, into }).is_some() {
            return self.break_off(format!("offer {id} came twice"));
        }
        self.say(Head { kind: Kind::Accept, len: 0, tag: 0, id });
    }

    fn say(&mut self, head: Head) {
        if self.stream.is_some() && !self.mute {
            self.out.push_back(Parcel { head: head.write(), body: Body::Own(Vec::new()), op: None });
        }
    }

    /// Ends the connection: what comes makes no sense.
    pub fn break_off(&mut self, problem: String) {
        self.closed.get_or_insert(problem);
        if let Some(stream) = &self.stream {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.mute = true;
    }

    /// Takes back the memory of an operation. What the other side has been promised it still gets.
    pub fn withdraw(&mut self, op: usize) {
        let mine = |place: &Place| place.op == op;
        for queue in self.posted.values_mut() {
            queue.retain(|place| !mine(place));
        }
        for queue in self.came.values_mut() {
            queue.retain(|arrival| !matches!(arrival, Arrival::Own(lent) if lent.op == op));
        }
        self.posted.retain(|_, queue| !queue.is_empty());
        self.came.retain(|_, queue| !queue.is_empty());
        let receiving = self.accepted.values_mut().map(|accepted| &mut accepted.into);
        let reading = match &mut self.reading {
            Some(Reading::Whole { into, .. }) => Some(into),
            _ => None,
        };
        for into in receiving.chain(reading) {
            if matches!(into, Into::Place(place) if mine(place)) {
                *into = Into::Nowhere;
            }
        }
        self.offered.retain(|_, lent| lent.op != op);
        self.bulk.retain(|bulk| bulk.lent.op != op);
        // The head of the first parcel may be on its way: its bytes must follow.
        let begun = self.written > 0;
        let mut place = 0;
        self.out.retain_mut(|parcel| {
            place += 1;
            if parcel.op.is_none_or(|(other, _)| other != op) {
                return true;
            }
            if begun && place == 1 {
                parcel.body = Body::Own(parcel.body.bytes().to_vec());
                parcel.op = None;
                return true;
            }
            false
        });
    }
}
