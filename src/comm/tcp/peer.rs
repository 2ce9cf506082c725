//! One connection: what is being written to it and read from it, and which messages it has brought.
//!
//! Whatever the other side sends is checked against what it may send at this point, and ends the connection if it may not.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};

use super::frame::{CREDIT, HEAD, Head, Kind, PART, WHOLE};

/// Bytes read at a time beside those that have a place.
const STAGING: usize = 64 << 10;
/// Bytes read before other connections have their turn.
const TURN: usize = 4 << 20;
/// Parcels that are handed to the system at a time.
const TOGETHER: usize = 8;
/// Most offers that nobody has asked for.
const OFFERS: usize = 1 << 20;

/// What is done, by number.
#[derive(Debug, Default)]
pub(super) struct Ops {
    done: Vec<bool>,
    free: Vec<usize>,
    /// How many have been done so far.
    pub count: u64,
}

impl Ops {
    pub fn begin(&mut self) -> usize {
        match self.free.pop() {
            Some(op) => {
                self.done[op] = false;
                op
            }
            None => {
                self.done.push(false);
                self.done.len() - 1
            }
        }
    }

    pub fn done(&mut self, op: usize) {
        self.done[op] = true;
        self.count += 1;
    }

    pub fn is_done(&self, op: usize) -> bool {
        self.done[op]
    }

    /// Its number may be used again.
    pub fn forget(&mut self, op: usize) {
        self.free.push(op);
    }
}

/// Memory that is lent for a message to come into.
#[derive(Debug)]
pub(super) struct Place {
    pub data: *mut u8,
    pub len: usize,
    pub op: usize,
}

/// Memory that is lent for a message to be sent from.
#[derive(Debug)]
pub(super) struct Lent {
    pub data: *const u8,
    pub len: usize,
    pub op: usize,
}

/// A message that has come before it was asked for.
#[derive(Debug)]
enum Arrival {
    Whole(Vec<u8>),
    Offered {
        id: u64,
        len: usize,
    },
    /// An offer that was accepted into memory of our own.
    Coming(u64),
    /// A large one of this rank to itself.
    Own(Lent),
}

/// Where what comes goes.
#[derive(Debug)]
enum Into {
    Place(Place),
    Owned(Vec<u8>),
    /// Nobody wants it any more.
    Nowhere,
}

/// A large message on its way here.
#[derive(Debug)]
struct Accepted {
    tag: u64,
    len: usize,
    got: usize,
    into: Into,
}

/// The message, or the part of one, that is being read.
#[derive(Debug)]
enum Reading {
    Whole { tag: u64, len: usize, got: usize, into: Into },
    Part { id: u64, left: usize },
}

/// A large message on its way out.
#[derive(Debug)]
struct Bulk {
    id: u64,
    lent: Lent,
    sent: usize,
}

#[derive(Debug)]
enum Body {
    Lent(*const u8, usize),
    Own(Vec<u8>),
}

impl Body {
    fn bytes(&self) -> &[u8] {
        match self {
            // SAFETY: lent until the operation is done or withdrawn, and then this is no more.
            Self::Lent(data, len) => unsafe { std::slice::from_raw_parts(*data, *len) },
            Self::Own(bytes) => bytes,
        }
    }
}

/// Something to be written.
#[derive(Debug)]
struct Parcel {
    head: [u8; HEAD],
    body: Body,
    /// The operation that lends the body, and whether it is done with it.
    op: Option<(usize, bool)>,
}

#[derive(Debug)]
pub(super) struct Peer {
    /// `None` for this rank itself.
    pub stream: Option<TcpStream>,
    /// Why there is nothing more to be read.
    pub closed: Option<String>,
    out: VecDeque<Parcel>,
    /// Bytes of the first parcel that are written.
    written: usize,
    bulk: VecDeque<Bulk>,
    /// Nothing can be written any more.
    mute: bool,
    staging: Box<[u8]>,
    staged: std::ops::Range<usize>,
    /// What nobody wants is read into this.
    nowhere: Vec<u8>,
    reading: Option<Reading>,
    posted: HashMap<u64, VecDeque<Place>>,
    came: HashMap<u64, VecDeque<Arrival>>,
    accepted: HashMap<u64, Accepted>,
    offered: HashMap<u64, Lent>,
    next_offer: u64,
    /// Bytes sent whole that the other side has not taken yet, as far as it has said so.
    owing: usize,
    /// Bytes received whole for which no credit has been given yet, and those of them that have been taken.
    owed: usize,
    taken: usize,
    /// Offers that are waiting in `came`.
    offers: usize,
}

/// The first of a queue, which is gone when it is empty.
fn pop<T>(queues: &mut HashMap<u64, VecDeque<T>>, tag: u64) -> Option<T> {
    let queue = queues.get_mut(&tag)?;
    let first = queue.pop_front();
    if queue.is_empty() {
        queues.remove(&tag);
    }
    first
}

impl Peer {
    pub fn new(stream: Option<TcpStream>) -> Self {
        let staging = vec![0; if stream.is_some() { STAGING } else { 0 }].into_boxed_slice();
        Self {
            stream,
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
        !self.mute && !(self.out.is_empty() && self.bulk.is_empty())
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
        let Lent { data, len, op } = lent;
        if self.stream.is_none() {
            return self.send_to_itself(tag, lent, ops);
        }
        if len <= WHOLE && self.owing + len <= CREDIT {
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
        let arrival = match lent.len <= WHOLE {
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
                *first = Arrival::Coming(id);
                self.offers -= 1;
                self.accept(tag, id, len, Into::Owned(vec![0; len]));
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
    fn deliver(&mut self, bytes: &[u8], place: Place, ops: &mut Ops) {
        if bytes.len() != place.len {
            return self.break_off(format!("{} bytes came for {}", bytes.len(), place.len));
        }
        // SAFETY: the place is lent for this, and as long as that.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(place.data, bytes.len()) };
        ops.done(place.op);
        self.was_taken(bytes.len());
    }

    /// Bytes that had come whole no longer take memory.
    fn was_taken(&mut self, len: usize) {
        self.taken = (self.taken + len).min(self.owed);
        if self.taken >= CREDIT / 4 {
            let len = std::mem::take(&mut self.taken);
            self.owed -= len;
            self.say(Head { kind: Kind::Credit, len, tag: 0, id: 0 });
        }
    }

    fn accept(&mut self, tag: u64, id: u64, len: usize, into: Into) {
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
    fn break_off(&mut self, problem: String) {
        self.closed.get_or_insert(problem);
        if let Some(stream) = &self.stream {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.mute = true;
    }

    /// Writes what the system takes.
    pub fn write(&mut self, ops: &mut Ops) {
        while self.wants_to_write() {
            if self.out.is_empty() {
                self.cut_part();
            }
            let mut pieces = Vec::with_capacity(2 * TOGETHER);
            for (place, parcel) in self.out.iter().take(TOGETHER).enumerate() {
                let passed = if place == 0 { self.written } else { 0 };
                pieces.push(IoSlice::new(&parcel.head[passed.min(HEAD)..]));
                pieces.push(IoSlice::new(&parcel.body.bytes()[passed.saturating_sub(HEAD)..]));
            }
            let total: usize = pieces.iter().map(|piece| piece.len()).sum();
            let Some(stream) = &mut self.stream else { return };
            match stream.write_vectored(&pieces) {
                Ok(written) => {
                    let all = written == total;
                    self.wrote(written, ops);
                    if !all {
                        return;
                    }
                }
                Err(problem) if problem.kind() == io::ErrorKind::Interrupted => {}
                Err(problem) if problem.kind() == io::ErrorKind::WouldBlock => return,
                // What it still has to say is read, up to the end.
                Err(_) => self.mute = true,
            }
        }
    }

    /// Makes a parcel of the next bytes of a large message. They take turns.
    fn cut_part(&mut self) {
        let Some(mut bulk) = self.bulk.pop_front() else { return };
        let len = PART.min(bulk.lent.len - bulk.sent);
        // SAFETY: within what is lent.
        let data = unsafe { bulk.lent.data.add(bulk.sent) };
        bulk.sent += len;
        let last = bulk.sent == bulk.lent.len;
        let head = Head { kind: Kind::Part, len, tag: 0, id: bulk.id }.write();
        self.out.push_back(Parcel { head, body: Body::Lent(data, len), op: Some((bulk.lent.op, last)) });
        if !last {
            self.bulk.push_back(bulk);
        }
    }

    fn wrote(&mut self, mut bytes: usize, ops: &mut Ops) {
        while let Some(first) = self.out.front() {
            let rest = HEAD + first.body.bytes().len() - self.written;
            if bytes < rest {
                self.written += bytes;
                return;
            }
            bytes -= rest;
            self.written = 0;
            if let Some((op, true)) = first.op {
                ops.done(op);
            }
            self.out.pop_front();
        }
    }

    /// Reads what has come, up to a limit.
    pub fn read(&mut self, ops: &mut Ops) {
        let mut read = 0;
        while read < TURN && self.is_open() {
            let staged = self.staged.len();
            if let Some((data, len)) = self.room() {
                if staged > 0 {
                    let n = staged.min(len);
                    // SAFETY: the place is as long as that, and not in the staging area.
                    unsafe { self.staging[self.staged.start..].as_ptr().copy_to_nonoverlapping(data, n) };
                    self.staged.start += n;
                    self.got(n, ops);
                    continue;
                }
                // SAFETY: lent for this, or our own.
                let place = unsafe { std::slice::from_raw_parts_mut(data, len) };
                let Some(stream) = &mut self.stream else { return };
                let came = stream.read_vectored(&mut [IoSliceMut::new(place), IoSliceMut::new(&mut self.staging)]);
                let Some(n) = self.came(came) else { return };
                self.staged = 0..n.saturating_sub(len);
                self.got(n.min(len), ops);
                read += n;
                if n < len {
                    return;
                }
            } else if staged >= HEAD {
                let mut head = [0; HEAD];
                head.copy_from_slice(&self.staging[self.staged.start..][..HEAD]);
                self.staged.start += HEAD;
                match Head::read(&head) {
                    Some(head) => self.begin(head, ops),
                    None => self.break_off("what came is no message: does the other side run this program?".into()),
                }
            } else {
                self.staging.copy_within(self.staged.clone(), 0);
                let Some(stream) = &mut self.stream else { return };
                let came = stream.read(&mut self.staging[staged..]);
                let Some(n) = self.came(came) else { return };
                self.staged = 0..staged + n;
                read += n;
            }
        }
    }

    /// Bytes that have come; `None` if there are none.
    fn came(&mut self, came: io::Result<usize>) -> Option<usize> {
        match came {
            Ok(0) => self.closed = Some("its process has ended".into()),
            Ok(n) => return Some(n),
            Err(problem) if matches!(problem.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(problem) => self.closed = Some(problem.to_string()),
        }
        None
    }

    /// Where the next bytes of what is being read go.
    fn room(&mut self) -> Option<(*mut u8, usize)> {
        let (into, got, left) = match self.reading.as_mut()? {
            Reading::Whole { len, got, into, .. } => (into, *got, *len - *got),
            Reading::Part { id, left } => {
                let accepted = self.accepted.get_mut(id)?;
                (&mut accepted.into, accepted.got, *left)
            }
        };
        Some(match into {
            // SAFETY: within the place, whose length has been compared.
            Into::Place(place) => (unsafe { place.data.add(got) }, left),
            Into::Owned(bytes) => (bytes[got..].as_mut_ptr(), left),
            Into::Nowhere => {
                self.nowhere.resize(STAGING, 0);
                (self.nowhere.as_mut_ptr(), left.min(STAGING))
            }
        })
    }

    /// So many bytes of what is being read are where they belong.
    fn got(&mut self, n: usize, ops: &mut Ops) {
        match self.reading.take() {
            Some(Reading::Whole { tag, len, got, into }) if got + n == len => match into {
                Into::Place(place) => {
                    ops.done(place.op);
                    self.was_taken(len);
                }
                Into::Owned(bytes) => match pop(&mut self.posted, tag) {
                    Some(place) => self.deliver(&bytes, place, ops),
                    None => self.came.entry(tag).or_default().push_back(Arrival::Whole(bytes)),
                },
                Into::Nowhere => self.was_taken(len),
            },
            Some(Reading::Whole { tag, len, got, into }) => {
                self.reading = Some(Reading::Whole { tag, len, got: got + n, into });
            }
            Some(Reading::Part { id, left }) => {
                if left > n {
                    self.reading = Some(Reading::Part { id, left: left - n });
                }
                let Some(accepted) = self.accepted.get_mut(&id) else { return };
                accepted.got += n;
                if accepted.got == accepted.len {
                    self.complete(id, ops);
                }
            }
            None => {}
        }
    }

    /// All of a large message is here.
    fn complete(&mut self, id: u64, ops: &mut Ops) {
        match self.accepted.remove(&id) {
            Some(Accepted { into: Into::Place(place), .. }) => ops.done(place.op),
            Some(Accepted { into: Into::Owned(bytes), tag, .. }) => {
                let coming = |arrival: &&mut Arrival| matches!(arrival, Arrival::Coming(other) if *other == id);
                if let Some(arrival) = self.came.get_mut(&tag).and_then(|queue| queue.iter_mut().find(coming)) {
                    *arrival = Arrival::Whole(bytes);
                }
            }
            _ => {}
        }
    }

    /// A head has come.
    fn begin(&mut self, head: Head, ops: &mut Ops) {
        let Head { kind, len, tag, id } = head;
        match kind {
            Kind::Whole if len == 0 || len > WHOLE || self.owed + len > CREDIT => {
                self.break_off(format!("a message of {len} bytes came, with {} of {CREDIT} taken", self.owed));
            }
            Kind::Whole => {
                self.owed += len;
                let into = match pop(&mut self.posted, tag) {
                    Some(place) if place.len != len => {
                        return self.break_off(format!("{len} bytes came for {}", place.len));
                    }
                    Some(place) => Into::Place(place),
                    None => Into::Owned(vec![0; len]),
                };
                self.reading = Some(Reading::Whole { tag, len, got: 0, into });
            }
            Kind::Offer if len == 0 || self.offers == OFFERS => {
                self.break_off(format!("an offer of {len} bytes came, beside {} others", self.offers));
            }
            Kind::Offer => match pop(&mut self.posted, tag) {
                Some(place) => self.accept(tag, id, len, Into::Place(place)),
                None => {
                    self.offers += 1;
                    self.came.entry(tag).or_default().push_back(Arrival::Offered { id, len });
                }
            },
            Kind::Accept => match self.offered.remove(&id) {
                Some(lent) => self.bulk.push_back(Bulk { id, lent, sent: 0 }),
                // It may have been withdrawn.
                None if id < self.next_offer => {}
                None => self.break_off(format!("offer {id} is accepted and was never made")),
            },
            Kind::Part => match self.accepted.get(&id) {
                Some(accepted) if len > 0 && len <= accepted.len - accepted.got => {
                    self.reading = Some(Reading::Part { id, left: len });
                }
                _ => self.break_off(format!("{len} bytes of offer {id} came unasked")),
            },
            Kind::Credit => match self.owing.checked_sub(len) {
                Some(owing) => self.owing = owing,
                None => self.break_off(format!("credit for {len} bytes came, {} were given", self.owing)),
            },
        }
        self.write(ops);
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

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    use super::*;

    /// The two ends of a connection: one is a peer, the other whatever the test wants to be.
    fn connected() -> (Peer, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        (Peer::new(Some(stream)), other)
    }

    fn until(what: &str, mut there: impl FnMut() -> bool) {
        let began = Instant::now();
        while !there() {
            assert!(began.elapsed() < Duration::from_secs(10), "{what}");
        }
    }

    fn head(kind: Kind, len: usize, tag: u64, id: u64) -> Vec<u8> {
        Head { kind, len, tag, id }.write().to_vec()
    }

    /// What a peer says of bytes that it should not have been sent.
    fn objection(bytes: &[u8]) -> String {
        let ((mut peer, mut other), mut ops) = (connected(), Ops::default());
        other.write_all(bytes).unwrap();
        until("an objection", || {
            peer.read(&mut ops);
            peer.closed.is_some()
        });
        assert!(!peer.wants_to_write() && !peer.is_open());
        peer.closed.unwrap()
    }

    #[test]
    fn what_makes_no_sense_ends_the_connection() {
        let huge = (1 << 56) - 1;
        let cases: [(Vec<u8>, &str); 11] = [
            (vec![0xff; HEAD], "no message"),
            (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), "no message"),
            (head(Kind::Whole, 0, 1, 0), "0 bytes"),
            (head(Kind::Whole, WHOLE + 1, 1, 0), "262145 bytes"),
            (head(Kind::Whole, huge, 1, 0), "bytes"),
            (head(Kind::Offer, 0, 1, 0), "offer of 0"),
            (head(Kind::Accept, 0, 0, 0), "never made"),
            (head(Kind::Part, 8, 0, 3), "unasked"),
            (head(Kind::Part, huge, 0, 3), "unasked"),
            (head(Kind::Credit, 1, 0, 0), "credit for 1"),
            (vec![1; 10], "ended"),
        ];
        for (bytes, words) in cases {
            let said = if bytes.len() == 10 { hangs_up_after(&bytes) } else { objection(&bytes) };
            assert!(said.contains(words), "`{words}` is missing in: {said}");
        }
    }

    fn hangs_up_after(bytes: &[u8]) -> String {
        let ((mut peer, mut other), mut ops) = (connected(), Ops::default());
        other.write_all(bytes).unwrap();
        drop(other);
        until("the end", || {
            peer.read(&mut ops);
            peer.closed.is_some()
        });
        peer.closed.unwrap()
    }

    /// Nobody can fill this rank's memory with what it has not asked for.
    #[test]
    fn credit_has_an_end() {
        let ((mut peer, mut other), mut ops) = (connected(), Ops::default());
        let message = [head(Kind::Whole, WHOLE, 1, 0), vec![0; WHOLE]].concat();
        let writer = std::thread::spawn(move || (0..).take_while(|_| other.write_all(&message).is_ok()).count());
        until("an objection", || {
            peer.read(&mut ops);
            peer.closed.is_some()
        });
        assert!(peer.closed.unwrap().contains("8388608 of 8388608 taken"));
        assert_eq!(peer.came[&1].len(), CREDIT / WHOLE);
        assert!(writer.join().unwrap() >= CREDIT / WHOLE);
        // An offer of any size costs nothing before it is accepted, and is not accepted if it does not fit.
        let ((mut peer, mut other), mut ops) = (connected(), Ops::default());
        other.write_all(&head(Kind::Offer, 1 << 50, 1, 0)).unwrap();
        until("the offer", || {
            peer.read(&mut ops);
            peer.offers == 1
        });
        assert!(peer.take(1, 1 << 20, &mut ops).is_none());
        assert!(peer.closed.unwrap().contains("1125899906842624 bytes came where 1048576 are the most"));
    }

    #[test]
    fn random_bytes_do_no_harm() {
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 33
        };
        for _ in 0..200 {
            let ((mut peer, mut other), mut ops) = (connected(), Ops::default());
            let mut room = vec![0u8; 64];
            let op = ops.begin();
            peer.receive(2, Place { data: room.as_mut_ptr(), len: 64, op }, &mut ops);
            let mut bytes = Vec::new();
            for _ in 0..20 {
                let kind = [Kind::Whole, Kind::Offer, Kind::Accept, Kind::Part, Kind::Credit][random() as usize % 5];
                bytes.extend(head(
                    kind,
                    [64, random() as usize % 300][random() as usize % 2],
                    random() % 4,
                    random() % 4,
                ));
                bytes.extend((0..random() % 100).map(|_| random() as u8));
            }
            other.write_all(&bytes).unwrap();
            other.shutdown(Shutdown::Write).unwrap();
            until("the end", || {
                peer.read(&mut ops);
                (0..4).for_each(|tag| drop(peer.take(tag, 1000, &mut ops)));
                peer.closed.is_some()
            });
            peer.withdraw(op);
        }
    }

    /// Small and large messages, asked for before and after they come, in order for each tag.
    #[test]
    fn messages_come_in_order_whatever_their_size() {
        let (mut here, there) = connected();
        there.set_nonblocking(true).unwrap();
        let mut there = Peer::new(Some(there));
        let (mut ops, mut others) = (Ops::default(), Ops::default());
        let sizes = [1, 100, WHOLE, WHOLE + 1, 7, 3 * PART + 5, CREDIT - 1000, WHOLE, 24];
        let messages: Vec<Vec<u8>> =
            sizes.iter().enumerate().map(|(i, size)| (0..*size).map(|j| (i * 31 + j) as u8).collect()).collect();
        let mut places: Vec<Vec<u8>> = sizes.iter().map(|size| vec![0; *size]).collect();
        let mut waited = Vec::new();
        // Every other one is asked for before it comes.
        for early in [true, false] {
            for (i, place) in places.iter_mut().enumerate().filter(|(i, _)| (i % 2 == 0) == early) {
                let op = others.begin();
                waited.push(op);
                let place = Place { data: place.as_mut_ptr(), len: place.len(), op };
                there.receive(i as u64 % 2, place, &mut others);
            }
            if early {
                for (i, message) in messages.iter().enumerate() {
                    let op = ops.begin();
                    here.send(i as u64 % 2, Lent { data: message.as_ptr(), len: message.len(), op }, &mut ops);
                }
                for _ in 0..100 {
                    here.write(&mut ops);
                    there.read(&mut others);
                    here.read(&mut ops);
                }
            }
        }
        until("all messages", || {
            here.write(&mut ops);
            there.read(&mut others);
            there.write(&mut others);
            here.read(&mut ops);
            waited.iter().all(|op| others.is_done(*op))
        });
        assert!(places == messages);
        assert!(here.closed.is_none() && there.closed.is_none());
        assert!(here.owing <= CREDIT && there.owed <= CREDIT);
    }

    /// What has been taken back is neither read nor written any more, and those behind it come all the same.
    #[test]
    fn what_is_withdrawn_is_left_alone() {
        let (mut here, there) = connected();
        there.set_nonblocking(true).unwrap();
        let mut there = Peer::new(Some(there));
        let (mut ops, mut others) = (Ops::default(), Ops::default());
        // Large: nobody reads yet, so that it stays half written.
        let large = vec![1u8; 40 << 20];
        let mut place = vec![0u8; 40 << 20];
        let (sent, received) = (ops.begin(), others.begin());
        there.receive(1, Place { data: place.as_mut_ptr(), len: place.len(), op: received }, &mut others);
        here.send(1, Lent { data: large.as_ptr(), len: large.len(), op: sent }, &mut ops);
        until("some of it", || {
            there.read(&mut others);
            there.write(&mut others);
            here.read(&mut ops);
            here.write(&mut ops);
            there.accepted.values().any(|accepted| accepted.got > 0) && here.wants_to_write()
        });
        here.withdraw(sent);
        there.withdraw(received);
        drop(large);
        let copy = place.clone();
        let (small, op, other) = (vec![7u8; 1000], ops.begin(), others.begin());
        let mut small_place = vec![0u8; 1000];
        there.receive(2, Place { data: small_place.as_mut_ptr(), len: 1000, op: other }, &mut others);
        here.send(2, Lent { data: small.as_ptr(), len: 1000, op }, &mut ops);
        until("the next one", || {
            here.write(&mut ops);
            there.read(&mut others);
            others.is_done(other)
        });
        assert_eq!(small_place, small);
        assert!(place == copy, "nothing is written where nobody waits");
    }
}
