//! Writes frames to a connection: small messages in order, and between them the data frames of large ones, in turn.

use std::io::{self, IoSlice};

use super::connection::Connection;
use super::frame::{FrameHeader, FrameKind, HEADER_BYTES};
use super::network::Stream;
use super::transfers::{Body, Frame};
use crate::comm::message_passing::RequestTable;

/// Frames that are passed to the system at a time.
const TOGETHER: usize = 8;

impl<S: Stream> Connection<S> {
    /// Writes what the system takes.
    pub fn write(&mut self, table: &mut RequestTable) {
        while self.wants_to_write() {
            if self.send_queue.is_empty() {
                self.queue_data();
            }
            let mut pieces = Vec::with_capacity(2 * TOGETHER);
            for (place, frame) in self.send_queue.iter().take(TOGETHER).enumerate() {
                let passed = if place == 0 { self.written } else { 0 };
                pieces.push(IoSlice::new(&frame.header[passed.min(HEADER_BYTES)..]));
                pieces.push(IoSlice::new(&frame.body.bytes()[passed.saturating_sub(HEADER_BYTES)..]));
            }
            let total: usize = pieces.iter().map(|piece| piece.len()).sum();
            let Some(stream) = &mut self.stream else { return };
            match stream.write_vectored(&pieces) {
                Ok(written) => {
                    let all = written == total;
                    self.wrote(written, table);
                    if !all {
                        return;
                    }
                }
                Err(problem) if problem.kind() == io::ErrorKind::Interrupted => {}
                Err(problem) if problem.kind() == io::ErrorKind::WouldBlock => return,
                // What the other side has sent is still read, up to the end.
                Err(_) => self.write_closed = true,
            }
        }
    }

    /// Makes a data frame of the next bytes of a large message. They take turns.
    fn queue_data(&mut self) {
        let Some(mut data_send) = self.data_sends.pop_front() else { return };
        let len = self.limits.data.min(data_send.source.len - data_send.sent);
        // SAFETY: within the buffer.
        let data = unsafe { data_send.source.data.add(data_send.sent) };
        data_send.sent += len;
        let last = data_send.sent == data_send.source.len;
        let header = FrameHeader { kind: FrameKind::Data, len, tag: 0, id: data_send.id }.write();
        self.send_queue.push_back(Frame {
            header,
            body: Body::Borrowed(data, len),
            request: Some((data_send.source.request, last)),
        });
        if !last {
            self.data_sends.push_back(data_send);
        }
    }

    fn wrote(&mut self, mut bytes: usize, table: &mut RequestTable) {
        while let Some(first) = self.send_queue.front() {
            let rest = HEADER_BYTES + first.body.bytes().len() - self.written;
            if bytes < rest {
                self.written += bytes;
                return;
            }
            bytes -= rest;
            self.written = 0;
            if let Some((request, true)) = first.request {
                table.done(request);
            }
            self.send_queue.pop_front();
        }
    }
}
