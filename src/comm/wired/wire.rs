//! What carries the messages.

use std::fmt::Debug;
use std::thread;
use std::time::{Duration, Instant};

use crate::Error;

/// A message under way, by the number that its wire knows it by.
#[derive(Debug)]
pub(in crate::comm) struct Ticket(pub u64);

/// The sizes at which what is sent changes its way. All ranks of a world have the same.
#[derive(Debug, Clone, Copy)]
pub(in crate::comm) struct Sizes {
    /// Bytes of a rank's share of a reduction that are folded at a time.
    pub window: usize,
    /// Most bytes of a broadcast that goes from the root to everybody.
    pub broadcast: usize,
    /// Most bytes of a message that go with its header.
    pub inline: usize,
}

impl Sizes {
    pub const STANDARD: Self = Self { window: 512 << 10, broadcast: 64 << 10, inline: 2048 };
}

/// Messages of bytes between the processes of a world, begun now and done later.
///
/// From one rank to another, messages of one tag come in the order in which they were sent. A message of no bytes is none:
/// it makes no ticket. No method waits for another rank.
pub(in crate::comm) trait Wire: Debug + Send + Sync {
    /// Name of the engine, as in `tcp`.
    fn engine(&self) -> &'static str;

    /// Index of this process in the world.
    fn rank(&self) -> usize;

    /// Processes in the world.
    fn size(&self) -> usize;

    /// Largest tag.
    fn tags(&self) -> u64;

    /// Begins to send bytes.
    ///
    /// # Safety
    /// They stay where and what they are until the tickets are done or taken back.
    unsafe fn send(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error>;

    /// Begins to send bytes that should reach also a rank which has not taken what it was sent before.
    ///
    /// # Safety
    /// As of [`send`](Self::send).
    unsafe fn tell(
        &self,
        to: usize,
        tag: u64,
        data: *const u8,
        len: usize,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error> {
        // SAFETY: passed on.
        unsafe { self.send(to, tag, data, len, tickets) }
    }

    /// Begins to receive bytes.
    ///
    /// # Safety
    /// Their place is valid, and nobody touches it, until the tickets are done or taken back.
    unsafe fn receive(
        &self,
        from: usize,
        tag: u64,
        data: *mut u8,
        len: usize,
        tickets: &mut Vec<Ticket>,
    ) -> Result<(), Error>;

    /// Lets the wire work, and strikes out what is done. Returns whether all is.
    fn progress(&self, tickets: &mut Vec<Ticket>) -> Result<bool, Error>;

    /// Takes a small message that has come, from one rank or from any.
    fn take(&self, from: Option<usize>, tag: u64) -> Result<Option<(usize, Vec<u8>)>, Error>;

    /// Takes back receives that nobody may want any more, without waiting. Tickets that are left over cannot be taken back yet:
    /// the wire may still write to their places.
    fn cancel(&self, tickets: &mut Vec<Ticket>);

    /// Whether memory that is lent can be had back before its message is done.
    fn gives_back(&self) -> bool;

    /// Takes back whatever is under way, sent or received, if the wire [gives back](Self::gives_back).
    fn withdraw(&self, tickets: &mut Vec<Ticket>);

    /// Rests until there may be news, no longer than this.
    fn rest(&self, longest: Duration);

    /// Whether news ends a [`rest`](Self::rest).
    fn wakes(&self) -> bool;

    /// Whether ranks of one machine may meet in shared memory instead of over the wire.
    fn shares_memory(&self) -> bool;

    /// Ranks that can't be talked to any more, each with the reason.
    fn lost(&self) -> Vec<(usize, String)>;

    /// Hangs up, once nobody has anything to say any more.
    fn close(&self, patience: Duration);

    /// Sizes that suit this wire.
    fn sizes(&self) -> Sizes {
        Sizes::STANDARD
    }

    /// The time, as far as waits are concerned.
    fn now(&self) -> Instant {
        Instant::now()
    }

    /// Lets others have the core.
    fn give_way(&self) {
        thread::yield_now();
    }

    /// Sleeps, whatever comes.
    fn sleep(&self, duration: Duration) {
        thread::sleep(duration);
    }

    /// Ends all processes of the world at once, as far as the wire can.
    fn abort(&self) -> ! {
        std::process::abort()
    }
}
