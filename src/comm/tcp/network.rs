//! The network under the endpoint: byte streams, and how to wait for them.
//!
//! The protocol uses no more of a network than this, so a simulation can replace it.

use std::fmt::Debug;
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::frame::Limits;
use super::poll::{self, Waker};
use super::read_uninit::ReadUninit;
use crate::comm::message_passing::{Clock, Thresholds};

/// A byte stream to another rank and back. Nothing blocks.
pub(super) trait Stream: ReadUninit + Write + Debug + Send + Sync {
    /// Closes one direction, or both.
    fn shutdown(&self, how: Shutdown) -> io::Result<()>;
}

impl Stream for TcpStream {
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        TcpStream::shutdown(self, how)
    }
}

/// The network that the streams of a rank are in, and its clock.
///
/// A stream is listed with its rank, and with whether it is to be written as well.
pub(super) trait Network: Clock {
    type Stream: Stream;

    /// Which of the streams are readable, closed, or writable if that is wanted.
    fn ready(&self, streams: &[(usize, &Self::Stream, bool)]) -> Vec<usize>;

    /// Blocks the thread until one of the streams is ready or it is [woken](Self::wake), no longer than this.
    fn park(&self, streams: &[(usize, &Self::Stream, bool)], longest: Duration);

    /// Wakes the parked threads.
    fn wake(&self);

    /// The same on all ranks.
    fn limits(&self) -> Limits {
        Limits::STANDARD
    }

    /// The same on all ranks.
    fn thresholds(&self) -> Thresholds {
        Thresholds::STANDARD
    }
}

/// The network of the system.
#[derive(Debug)]
pub(super) struct System(Waker);

impl System {
    pub fn new() -> io::Result<Self> {
        Ok(Self(Waker::new()?))
    }
}

impl Clock for System {}

impl Network for System {
    type Stream = TcpStream;

    fn ready(&self, streams: &[(usize, &TcpStream, bool)]) -> Vec<usize> {
        poll::ready(streams)
    }

    fn park(&self, streams: &[(usize, &TcpStream, bool)], longest: Duration) {
        self.0.park(streams, longest);
    }

    fn wake(&self) {
        self.0.wake();
    }
}
