//! What a connection brings: heads, and bytes that go straight to where they belong.

use std::io;

use super::frame::{HEAD, Head, Kind};
use super::network::Stream;
use super::ops::Ops;
use super::peer::{Peer, pop};
use super::transit::{Accepted, Arrival, Bulk, Into, Reading};

/// Most offers that nobody has asked for.
const OFFERS: usize = 1 << 20;

impl<S: Stream> Peer<S> {
    /// Reads what has come, up to a limit.
    ///
    /// Nothing that has been read waits for the next time, but the beginning of a head: the system tells of what it still
    /// has, not of what is in the staging area.
    pub fn read(&mut self, ops: &mut Ops) {
        let mut read = 0;
        while self.is_open() {
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
                if read >= self.limits.turn {
                    return;
                }
                let Some(stream) = &mut self.stream else { return };
                // SAFETY: lent for this, or our own.
                let came = unsafe { stream.fill(data, len, &mut self.staging) };
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
            } else if read >= self.limits.turn {
                return;
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
                self.nowhere.resize(self.limits.staging, 0);
                (self.nowhere.as_mut_ptr(), left.min(self.limits.staging))
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
            Kind::Whole if len == 0 || len > self.limits.whole || self.owed + len > self.limits.credit => {
                let (owed, credit) = (self.owed, self.limits.credit);
                self.break_off(format!("a message of {len} bytes came, with {owed} of {credit} taken"));
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
}
