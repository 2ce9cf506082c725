//! The trait of a process's endpoint: non-blocking messages of bytes between the processes of a world.

use std::fmt::Debug;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use crate::Error;

/// A pending send or receive, by the number that its endpoint knows it by.
#[derive(Debug)]
pub(in crate::comm) struct Request(pub u64);

/// The message sizes at which the algorithms change. All ranks of a world have the same.
#[derive(Debug, Clone, Copy)]
pub(in crate::comm) struct Thresholds {
    /// Bytes of a rank's share of a reduction that are reduced at a time.
    pub window: usize,
    /// Most bytes of a broadcast that goes from the root to all.
    pub broadcast: usize,
    /// Most bytes of a message that go with its header.
    pub inline: usize,
}

impl Thresholds {
    pub const STANDARD: Self = Self { window: 512 << 10, broadcast: 64 << 10, inline: 2048 };
}

/// What stays the same about an endpoint.
#[derive(Debug, Clone, Copy)]
pub(in crate::comm) struct EndpointInfo {
    /// Name of the transport, as in `tcp`.
    pub name: &'static str,
    /// Index of this process in the world.
    pub rank: usize,
    /// Processes in the world.
    pub size: usize,
    /// Largest tag.
    pub tags: u64,
    /// Whether buffers can be reclaimed before their messages are done.
    pub can_reclaim: bool,
    /// Whether an arrival ends a [`park`](Endpoint::park).
    pub wakes_on_arrival: bool,
    /// Whether ranks of one machine may use shared memory instead of the endpoint.
    pub shares_memory: bool,
    pub thresholds: Thresholds,
}

impl EndpointInfo {
    /// The ranks that a message may come from: one, or all.
    pub fn sources(&self, from: Option<usize>) -> Range<usize> {
        from.map_or(0..self.size, |from| from..from + 1)
    }
}

/// The clock of waits, and how a thread lets time pass.
pub(in crate::comm) trait Clock: Debug + Send + Sync {
    fn now(&self) -> Instant {
        Instant::now()
    }

    /// Yields the core to other threads.
    fn yield_now(&self) {
        thread::yield_now();
    }

    /// Sleeps, whatever arrives.
    fn sleep(&self, duration: Duration) {
        thread::sleep(duration);
    }
}

/// The clock of the system.
#[derive(Debug)]
pub(super) struct SystemClock;

impl Clock for SystemClock {}

/// Bytes that are sent.
#[derive(Debug, Clone, Copy)]
pub(in crate::comm) struct SendBytes {
    pub data: *const u8,
    /// Not 0.
    pub len: usize,
}

/// Room for bytes that are received.
#[derive(Debug, Clone, Copy)]
pub(in crate::comm) struct RecvBytes {
    pub data: *mut u8,
    /// Not 0.
    pub len: usize,
}

/// What a transport between processes implements: non-blocking messages of bytes between the processes of a world.
///
/// From one rank to another, messages with one tag arrive in the order in which they were sent. No method waits for
/// another rank. What is the same for all endpoints is in methods of `dyn Endpoint`.
pub(in crate::comm) trait Endpoint: Debug + Send + Sync {
    fn info(&self) -> &EndpointInfo;

    fn clock(&self) -> &dyn Clock {
        &SystemClock
    }

    /// Starts to send bytes. A control message should arrive even at a rank that has not received what it was sent
    /// before.
    ///
    /// # Safety
    /// They stay valid and unchanged until the requests are done or reclaimed.
    unsafe fn start_send(
        &self,
        to: usize,
        tag: u64,
        bytes: SendBytes,
        control: bool,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error>;

    /// Starts to receive bytes.
    ///
    /// # Safety
    /// The buffer is valid, and nobody touches it, until the requests are done or reclaimed.
    unsafe fn start_receive(
        &self,
        from: usize,
        tag: u64,
        buffer: RecvBytes,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error>;

    /// Makes progress, and removes the requests that are done, of which there is at least one. Returns whether all are.
    fn test(&self, requests: &mut Vec<Request>) -> Result<bool, Error>;

    /// Makes progress, so that what has arrived can be [taken](Self::take). Nothing to do where that asks by itself.
    fn drive(&self) {}

    /// Takes a small message that has arrived, from one rank or from any.
    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error>;

    /// Cancels receives, without waiting. Requests that are left over cannot be cancelled yet: the endpoint may still
    /// write to their buffers.
    fn cancel(&self, requests: &mut Vec<Request>) {
        self.reclaim(requests);
    }

    /// Reclaims the buffers of sends and receives. Called on endpoints that can.
    fn reclaim(&self, _: &mut Vec<Request>) {
        unreachable!("the endpoint over {} reclaims no buffers", self.info().name);
    }

    /// Blocks the thread until something may have arrived, no longer than this.
    fn park(&self, longest: Duration) {
        self.clock().sleep(longest);
    }

    /// Ranks that cannot be reached any more, each with the reason. Empty where others notice, as an MPI's launcher.
    fn lost_ranks(&self) -> Vec<(usize, String)> {
        Vec::new()
    }

    /// Closes the connections, if there are any, once all ranks have sent everything.
    fn close(&self, _: Duration) {}

    /// Kills all processes of the world, as far as the endpoint can.
    fn abort(&self) -> ! {
        std::process::abort()
    }
}

impl dyn Endpoint {
    pub fn name(&self) -> &'static str {
        self.info().name
    }

    pub fn rank(&self) -> usize {
        self.info().rank
    }

    pub fn size(&self) -> usize {
        self.info().size
    }

    pub fn now(&self) -> Instant {
        self.clock().now()
    }

    /// Starts to send bytes. If there are none, no message is sent and no request made.
    ///
    /// # Safety
    /// As of [`start_send`](Endpoint::start_send).
    pub unsafe fn send(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        match len {
            0 => Ok(()),
            // SAFETY: passed on.
            _ => unsafe { self.start_send(to, tag, SendBytes { data, len }, false, requests) },
        }
    }

    /// Starts to send a control message, of at least one byte.
    ///
    /// # Safety
    /// As of [`start_send`](Endpoint::start_send).
    pub unsafe fn send_control(
        &self,
        to: usize,
        tag: u64,
        message: &[u8],
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        let bytes = SendBytes { data: message.as_ptr(), len: message.len() };
        // SAFETY: passed on.
        unsafe { self.start_send(to, tag, bytes, true, requests) }
    }

    /// Starts to receive bytes. If there are none, no message is awaited and no request made.
    ///
    /// # Safety
    /// As of [`start_receive`](Endpoint::start_receive).
    pub unsafe fn receive(
        &self,
        from: usize,
        tag: u64,
        data: *mut u8,
        len: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        match len {
            0 => Ok(()),
            // SAFETY: passed on.
            _ => unsafe { self.start_receive(from, tag, RecvBytes { data, len }, requests) },
        }
    }

    /// Makes progress, and removes the requests that are done. Returns whether all are.
    pub fn progress(&self, requests: &mut Vec<Request>) -> Result<bool, Error> {
        if requests.is_empty() { Ok(true) } else { self.test(requests) }
    }
}
