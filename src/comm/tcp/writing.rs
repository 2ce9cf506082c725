//! What a connection is given to write: small messages as they come, and in between the parts of large ones, by turns.

use std::io::{self, IoSlice};

use super::frame::{HEAD, Head, Kind};
use super::network::Stream;
use super::ops::Ops;
use super::peer::Peer;
use super::transit::{Body, Parcel};

/// Parcels that are handed to the system at a time.
const TOGETHER: usize = 8;

impl<S: Stream> Peer<S> {
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
        let len = self.limits.part.min(bulk.lent.len - bulk.sent);
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
}
