//! Reads frames from a connection: headers, and data straight into its buffer.

use std::io;

use super::connection::{Connection, pop};
use super::frame::{FrameHeader, FrameKind, HEADER_BYTES};
use super::network::Stream;
use super::transfers::{DataReceive, DataSend, Destination, Reading, Unexpected};
use crate::comm::message_passing::RequestTable;

/// Most RTS frames without a posted receive.
const MAX_RTS: usize = 1 << 20;

impl<S: Stream> Connection<S> {
    /// Reads what has arrived, up to a limit.
    ///
    /// Nothing that has been read is left for the next time, but the beginning of a header: the system reports what it
    /// still has, not what is in the staging area.
    pub fn read(&mut self, table: &mut RequestTable) {
        let mut read = 0;
        while self.is_open() {
            let staged = self.staged.len();
            if let Some((data, len)) = self.next_destination() {
                if staged > 0 {
                    let n = staged.min(len);
                    // SAFETY: the buffer is as long as that, and not in the staging area.
                    unsafe { self.staging[self.staged.start..].as_ptr().copy_to_nonoverlapping(data, n) };
                    self.staged.start += n;
                    self.got(n, table);
                    continue;
                }
                if read >= self.limits.turn {
                    return;
                }
                let Some(stream) = &mut self.stream else { return };
                // SAFETY: borrowed for this, or our own.
                let came = unsafe { stream.read_uninit(data, len, &mut self.staging) };
                let Some(n) = self.received(came) else { return };
                self.staged = 0..n.saturating_sub(len);
                self.got(n.min(len), table);
                read += n;
                if n < len {
                    return;
                }
            } else if staged >= HEADER_BYTES {
                let mut header = [0; HEADER_BYTES];
                header.copy_from_slice(&self.staging[self.staged.start..][..HEADER_BYTES]);
                self.staged.start += HEADER_BYTES;
                match FrameHeader::read(&header) {
                    Some(header) => self.begin(header, table),
                    None => {
                        self.protocol_error("what came is no message: does the other side run this program?".into())
                    }
                }
            } else if read >= self.limits.turn {
                return;
            } else {
                self.staging.copy_within(self.staged.clone(), 0);
                let Some(stream) = &mut self.stream else { return };
                let came = stream.read(&mut self.staging[staged..]);
                let Some(n) = self.received(came) else { return };
                self.staged = 0..staged + n;
                read += n;
            }
        }
    }

    /// The number of bytes read; `None` if there are none.
    fn received(&mut self, came: io::Result<usize>) -> Option<usize> {
        match came {
            Ok(0) => self.closed = Some("its process has ended".into()),
            Ok(n) => return Some(n),
            Err(problem) if matches!(problem.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(problem) => self.closed = Some(problem.to_string()),
        }
        None
    }

    /// The destination of the next bytes of the current frame.
    fn next_destination(&mut self) -> Option<(*mut u8, usize)> {
        let (into, got, left) = match self.reading.as_mut()? {
            Reading::Eager { len, got, into, .. } => (into, *got, *len - *got),
            Reading::Data { id, left } => {
                let receive = self.data_receives.get_mut(id)?;
                (&mut receive.into, receive.got, *left)
            }
        };
        Some(match into {
            // SAFETY: within the buffer, whose length has been compared.
            Destination::Buffer(target) => (unsafe { target.data.add(got) }, left),
            Destination::Owned(bytes) => (bytes[got..].as_mut_ptr(), left),
            Destination::Discard => {
                self.discard.resize(self.limits.staging, 0);
                (self.discard.as_mut_ptr(), left.min(self.limits.staging))
            }
        })
    }

    /// Records that `n` bytes of the current frame have reached their destination.
    fn got(&mut self, n: usize, table: &mut RequestTable) {
        match self.reading.take() {
            Some(Reading::Eager { tag, len, got, into }) if got + n == len => match into {
                Destination::Buffer(target) => {
                    table.done(target.request);
                    self.return_credit(len);
                }
                Destination::Owned(bytes) => match pop(&mut self.posted, tag) {
                    Some(Destination::Buffer(target)) => self.deliver(&bytes, target, table),
                    Some(_) => self.return_credit(len),
                    None => {
                        table.arrived();
                        self.unexpected.entry(tag).or_default().push_back(Unexpected::Eager(bytes));
                    }
                },
                Destination::Discard => self.return_credit(len),
            },
            Some(Reading::Eager { tag, len, got, into }) => {
                self.reading = Some(Reading::Eager { tag, len, got: got + n, into });
            }
            Some(Reading::Data { id, left }) => {
                if left > n {
                    self.reading = Some(Reading::Data { id, left: left - n });
                }
                let Some(receive) = self.data_receives.get_mut(&id) else { return };
                receive.got += n;
                if receive.got == receive.len {
                    self.complete(id, table);
                }
            }
            None => {}
        }
    }

    /// A large message is complete.
    fn complete(&mut self, id: u64, table: &mut RequestTable) {
        match self.data_receives.remove(&id) {
            Some(DataReceive { into: Destination::Buffer(target), .. }) => table.done(target.request),
            Some(DataReceive { into: Destination::Owned(bytes), tag, .. }) => {
                let coming =
                    |unexpected: &&mut Unexpected| matches!(unexpected, Unexpected::Receiving(other) if *other == id);
                if let Some(unexpected) = self.unexpected.get_mut(&tag).and_then(|queue| queue.iter_mut().find(coming))
                {
                    *unexpected = Unexpected::Eager(bytes);
                    table.arrived();
                }
            }
            _ => {}
        }
    }

    /// Handles a header.
    fn begin(&mut self, header: FrameHeader, table: &mut RequestTable) {
        let FrameHeader { kind, len, tag, id } = header;
        match kind {
            FrameKind::Eager if len == 0 || len > self.limits.eager || self.credit_held + len > self.limits.credit => {
                let (credit_held, credit) = (self.credit_held, self.limits.credit);
                self.protocol_error(format!("a message of {len} bytes came, with {credit_held} of {credit} taken"));
            }
            FrameKind::Eager => {
                self.credit_held += len;
                let into = match pop(&mut self.posted, tag) {
                    Some(Destination::Buffer(target)) if target.len != len => {
                        return self.protocol_error(format!("{len} bytes came for {}", target.len));
                    }
                    Some(into) => into,
                    None => Destination::Owned(vec![0; len]),
                };
                self.reading = Some(Reading::Eager { tag, len, got: 0, into });
            }
            FrameKind::Rts if len == 0 || self.pending_rts == MAX_RTS => {
                self.protocol_error(format!("an offer of {len} bytes came, beside {} others", self.pending_rts));
            }
            FrameKind::Rts => match pop(&mut self.posted, tag) {
                Some(into) => self.accept(tag, id, len, into),
                None => {
                    self.pending_rts += 1;
                    table.arrived();
                    self.unexpected.entry(tag).or_default().push_back(Unexpected::Rts { id, len });
                }
            },
            FrameKind::Cts => match self.awaiting_cts.remove(&id) {
                Some(source) => self.data_sends.push_back(DataSend { id, source, sent: 0 }),
                // It may have been reclaimed.
                None if id < self.next_id => {}
                None => self.protocol_error(format!("offer {id} is accepted and was never made")),
            },
            FrameKind::Data => match self.data_receives.get(&id) {
                Some(receive) if len > 0 && len <= receive.len - receive.got => {
                    self.reading = Some(Reading::Data { id, left: len });
                }
                _ => self.protocol_error(format!("{len} bytes of offer {id} came unasked")),
            },
            FrameKind::Credit => match self.credit_used.checked_sub(len) {
                Some(credit_used) => self.credit_used = credit_used,
                None => self.protocol_error(format!("credit for {len} bytes came, {} were given", self.credit_used)),
            },
        }
        self.write(table);
    }
}
