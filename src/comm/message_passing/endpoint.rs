//! The trait of a process's endpoint: non-blocking messages of bytes between the processes of a world.

use std::fmt::Debug;
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

/// Non-blocking messages of bytes between the processes of a world.
///
/// From one rank to another, messages with one tag arrive in the order in which they were sent. A message of no bytes
/// is not sent: it makes no request. No method waits for another rank.
pub(in crate::comm) trait Endpoint: Debug + Send + Sync {
    /// Name of the transport, as in `tcp`.
    fn name(&self) -> &'static str;

    /// Index of this process in the world.
    fn rank(&self) -> usize;

    /// Processes in the world.
    fn size(&self) -> usize;

    /// Largest tag.
    fn tags(&self) -> u64;

    /// Starts to send bytes.
    ///
    /// # Safety
    /// They stay valid and unchanged until the requests are done or reclaimed.
    unsafe fn send(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error>;

    /// Starts to send a control message, which should arrive even at a rank that has not received what it was sent
    /// before.
    ///
    /// # Safety
    /// As of [`send`](Self::send).
    unsafe fn send_control(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error> {
        // SAFETY: passed on.
        unsafe { self.send(to, tag, data, len, requests) }
    }

    /// Starts to receive bytes.
    ///
    /// # Safety
    /// The buffer is valid, and nobody touches it, until the requests are done or reclaimed.
    unsafe fn receive(
        &self,
        from: usize,
        tag: u64,
        data: *mut u8,
        len: usize,
        requests: &mut Vec<Request>,
    ) -> Result<(), Error>;

    /// Makes progress, and removes the requests that are done. Returns whether all are.
    fn progress(&self, requests: &mut Vec<Request>) -> Result<bool, Error>;

    /// Takes a small message that has arrived, from one rank or from any.
    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error>;

    /// Cancels receives, without waiting. Requests that are left over cannot be cancelled yet: the endpoint may still
    /// write to their buffers.
    fn cancel(&self, requests: &mut Vec<Request>);

    /// Whether buffers can be reclaimed before their messages are done.
    fn can_reclaim(&self) -> bool;

    /// Reclaims the buffers of sends and receives, if the endpoint [can](Self::can_reclaim).
    fn reclaim(&self, requests: &mut Vec<Request>);

    /// Blocks the thread until something may have arrived, no longer than this.
    fn park(&self, longest: Duration);

    /// Whether an arrival ends a [`park`](Self::park).
    fn wakes_on_arrival(&self) -> bool;

    /// Whether ranks of one machine may use shared memory instead of the endpoint.
    fn shares_memory(&self) -> bool;

    /// Ranks that cannot be reached any more, each with the reason.
    fn lost_ranks(&self) -> Vec<(usize, String)>;

    /// Closes the connections, once all ranks have sent everything.
    fn close(&self, limit: Duration);

    /// Thresholds that suit this endpoint.
    fn thresholds(&self) -> Thresholds {
        Thresholds::STANDARD
    }

    /// The clock of waits.
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

    /// Kills all processes of the world, as far as the endpoint can.
    fn abort(&self) -> ! {
        std::process::abort()
    }
}
