//! The messages that a member of a group has sent and that have not been received yet.

use std::collections::VecDeque;

use super::endpoint::Request;
use crate::comm::receive_buffer::ReceiveBuffer;

/// What one member has sent.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    pub waiting: VecDeque<Incoming>,
    /// Messages that have been received so far.
    pub came: u64,
    /// A message from the endpoint that follows messages which are still in the mailbox.
    pub ahead: Option<Vec<u8>>,
}

/// A message that has arrived, or is being received.
#[derive(Debug)]
pub(super) struct Incoming {
    pub tag: u64,
    /// `None` once it has been returned.
    pub buffer: Option<ReceiveBuffer>,
    pub requests: Vec<Request>,
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.requests.is_empty() {
            // The endpoint may still write there.
            std::mem::forget((self.buffer.take(), std::mem::take(&mut self.requests)));
        }
    }
}
