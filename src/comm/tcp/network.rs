//! What connects the ranks: streams of bytes, and whoever tells which of them have something.
//!
//! The protocol knows no more of a network than this, so a simulation can take its place.

use std::fmt::Debug;
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::fill::Fill;
use super::frame::Limits;
use super::poll::{self, Alarm};
use crate::comm::wired::Sizes;

/// A stream of bytes to another rank and back. Nothing blocks.
pub(super) trait Stream: Fill + Write + Debug + Send + Sync {
    /// Ends one direction, or both.
    fn shutdown(&self, how: Shutdown) -> io::Result<()>;
}

impl Stream for TcpStream {
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        TcpStream::shutdown(self, how)
    }
}

/// The network that the streams of a rank are in, and the time there.
///
/// A stream is listed with its rank, and with whether it is to be written as well.
pub(super) trait Network: Debug + Send + Sync {
    type Stream: Stream;

    /// Which of the streams can be read, have ended, or can be written if that is wanted.
    fn ready(&self, streams: &[(usize, &Self::Stream, bool)]) -> Vec<usize>;

    /// Rests until one of the streams is ready or somebody [rings](Self::ring), no longer than this.
    fn rest(&self, streams: &[(usize, &Self::Stream, bool)], longest: Duration);

    /// Wakes whoever rests.
    fn ring(&self);

    /// The same on all ranks.
    fn limits(&self) -> Limits {
        Limits::STANDARD
    }

    /// The same on all ranks.
    fn sizes(&self) -> Sizes {
        Sizes::STANDARD
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    /// Lets others have the core.
    fn give_way(&self) {
        thread::yield_now();
    }

    fn sleep(&self, duration: Duration) {
        thread::sleep(duration);
    }
}

/// The network of the system.
#[derive(Debug)]
pub(super) struct System(Alarm);

impl System {
    pub fn new() -> io::Result<Self> {
        Ok(Self(Alarm::new()?))
    }
}

impl Network for System {
    type Stream = TcpStream;

    fn ready(&self, streams: &[(usize, &TcpStream, bool)]) -> Vec<usize> {
        poll::ready(streams)
    }

    fn rest(&self, streams: &[(usize, &TcpStream, bool)], longest: Duration) {
        self.0.rest(streams, longest);
    }

    fn ring(&self) {
        self.0.ring();
    }
}
