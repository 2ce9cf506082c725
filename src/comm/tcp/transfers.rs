//! The pending messages of a connection, and the buffers that they use.

use super::frame::HEADER_BYTES;

/// The borrowed buffer of a receive.
#[derive(Debug)]
pub(super) struct RecvBuffer {
    pub data: *mut u8,
    pub len: usize,
    pub request: usize,
}

/// The borrowed buffer of a send.
#[derive(Debug)]
pub(super) struct SendBuffer {
    pub data: *const u8,
    pub len: usize,
    pub request: usize,
}

/// A message that arrived before its receive was posted.
#[derive(Debug)]
pub(super) enum Unexpected {
    Eager(Vec<u8>),
    Rts {
        id: u64,
        len: usize,
    },
    /// An RTS that was answered, into memory of our own.
    Receiving(u64),
    /// A large message of this rank to itself.
    Loopback(SendBuffer),
}

/// Where received bytes go.
#[derive(Debug)]
pub(super) enum Destination {
    Buffer(RecvBuffer),
    Owned(Vec<u8>),
    /// Nowhere: the receive was reclaimed.
    Discard,
}

/// A large message that is being received.
#[derive(Debug)]
pub(super) struct DataReceive {
    pub tag: u64,
    pub len: usize,
    pub got: usize,
    pub into: Destination,
}

/// The frame that is being read.
#[derive(Debug)]
pub(super) enum Reading {
    Eager { tag: u64, len: usize, got: usize, into: Destination },
    Data { id: u64, left: usize },
}

/// A large message that is being sent.
#[derive(Debug)]
pub(super) struct DataSend {
    pub id: u64,
    pub source: SendBuffer,
    pub sent: usize,
}

#[derive(Debug)]
pub(super) enum Body {
    Borrowed(*const u8, usize),
    Own(Vec<u8>),
}

impl Body {
    pub fn bytes(&self) -> &[u8] {
        match self {
            // SAFETY: borrowed until the request is done or reclaimed, and then this does not exist any more.
            Self::Borrowed(data, len) => unsafe { std::slice::from_raw_parts(*data, *len) },
            Self::Own(bytes) => bytes,
        }
    }
}

/// A frame to be written.
#[derive(Debug)]
pub(super) struct Frame {
    pub header: [u8; HEADER_BYTES],
    pub body: Body,
    /// The request that owns the body, and whether this frame completes it.
    pub request: Option<(usize, bool)>,
}
