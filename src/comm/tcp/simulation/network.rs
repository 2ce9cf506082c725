//! A simulated network: byte streams that arrive late, in pieces of any size.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::schedule::{ThreadPause, pause};
use crate::comm::message_passing::{Clock, Thresholds};
use crate::comm::tcp::frame::Limits;
use crate::comm::tcp::network::{Network, Stream};
use crate::comm::tcp::read_uninit::ReadUninit;
use crate::lock::lock;

/// Most nanoseconds that others run when a thread yields its core to them.
const YIELD: usize = 20_000;
/// Most nanoseconds by which the system's timers are late: as Linux has it, rounded up.
const TIMER_SLACK: usize = 60_000;

/// Random numbers of a seed (splitmix64).
#[derive(Debug, Clone)]
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// What is the same all through a schedule.
#[derive(Debug, Clone, Copy)]
pub(super) struct Conditions {
    pub limits: Limits,
    pub thresholds: Thresholds,
    /// Bytes that are under way from one rank to another at most.
    pub capacity: usize,
    /// Of so many pieces, one is late.
    pub late: usize,
    /// Of so many reads and writes, one is cut short.
    pub short: usize,
}

/// Bytes under way from one rank to another.
#[derive(Debug, Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    /// Bytes that have come.
    arrived: usize,
    /// When the next bytes come, and how many.
    coming: VecDeque<(u64, usize)>,
    /// The writer has ended it.
    ended: bool,
    /// Nobody reads it any more.
    refused: bool,
}

impl Pipe {
    fn arrive(&mut self, now: u64) {
        while let Some((at, bytes)) = self.coming.front().copied() {
            if at > now {
                return;
            }
            self.coming.pop_front();
            self.arrived += bytes;
        }
    }

    fn readable(&self) -> bool {
        self.arrived > 0 || self.ended && self.bytes.is_empty()
    }
}

/// The streams of a rank that one of its threads waits for. The ranks at their other ends are bits.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Streams {
    read: u64,
    written: u64,
}

impl Streams {
    fn of(streams: &[(usize, &SimulatedStream, bool)]) -> Self {
        let mut all = Self::default();
        for (other, _, writes) in streams {
            all.read |= 1 << other;
            all.written |= u64::from(*writes) << other;
        }
        all
    }
}

/// What the ranks share.
#[derive(Debug)]
pub(super) struct State {
    pub size: usize,
    pub conditions: Conditions,
    pub random: Random,
    /// Nanoseconds.
    pub now: u64,
    /// No bytes arrive before then.
    next_arrival: u64,
    /// From `a` to `b` at `a * size + b`.
    pipes: Vec<Pipe>,
    /// The streams of each rank that are ready, kept up to date with the pipes: it is asked for in every step, of all
    /// threads.
    ready: Vec<Streams>,
    /// Ranks whose waker was used.
    pub woken: Vec<bool>,
}

impl State {
    pub fn new(size: usize, conditions: Conditions, random: Random) -> Self {
        let pipes = (0..size * size).map(|_| Pipe::default()).collect();
        // All is writable at first, and nothing readable.
        let ready = vec![Streams { read: 0, written: u64::MAX }; size];
        Self { size, conditions, random, now: 0, next_arrival: u64::MAX, pipes, ready, woken: vec![false; size] }
    }

    /// Notes what is ready after a pipe has changed.
    fn changed(&mut self, from: usize, to: usize) {
        let pipe = &self.pipes[from * self.size + to];
        let (readable, writable) = (pipe.readable(), pipe.refused || pipe.bytes.len() < self.conditions.capacity);
        let (reader, writer) = (1u64 << from, 1u64 << to);
        let read = &mut self.ready[to].read;
        *read = if readable { *read | reader } else { *read & !reader };
        let written = &mut self.ready[from].written;
        *written = if writable { *written | writer } else { *written & !writer };
    }

    /// Delivers what has arrived by now.
    pub fn arrive(&mut self) {
        if self.now < self.next_arrival {
            return;
        }
        self.next_arrival = u64::MAX;
        for from in 0..self.size {
            for to in 0..self.size {
                let pipe = &mut self.pipes[from * self.size + to];
                let Some((mut at, _)) = pipe.coming.front().copied() else { continue };
                if at <= self.now {
                    pipe.arrive(self.now);
                    at = pipe.coming.front().map_or(u64::MAX, |(at, _)| *at);
                    self.changed(from, to);
                }
                self.next_arrival = self.next_arrival.min(at);
            }
        }
    }

    /// When the next bytes come, or a time before that.
    pub fn next_arrival(&self) -> u64 {
        self.next_arrival
    }

    /// Whether one of the streams of `rank` is ready.
    pub fn is_ready(&self, rank: usize, streams: Streams) -> bool {
        let ready = self.ready[rank];
        ready.read & streams.read | ready.written & streams.written != 0
    }

    /// The rank's process ends, whatever it was at.
    pub fn end(&mut self, rank: usize) {
        for other in 0..self.size {
            self.shut(rank, other, Shutdown::Both);
        }
    }

    /// Closes a rank's end of the pipe to another, of the one from it, or of both.
    fn shut(&mut self, rank: usize, other: usize, how: Shutdown) {
        if how != Shutdown::Read {
            self.pipes[rank * self.size + other].ended = true;
            self.changed(rank, other);
        }
        if how != Shutdown::Write {
            self.pipes[other * self.size + rank].refused = true;
            self.changed(other, rank);
        }
    }

    fn write(&mut self, from: usize, to: usize, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let Self { conditions, random, now, next_arrival, .. } = self;
        let pipe = &mut self.pipes[from * self.size + to];
        if pipe.refused || pipe.ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        let mut most = total.min(conditions.capacity - pipe.bytes.len());
        if most == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if random.one_in(conditions.short) {
            most = 1 + random.below(most);
        }
        let mut left = most;
        for piece in pieces {
            let taken = piece.len().min(left);
            pipe.bytes.extend(&piece[..taken]);
            left -= taken;
        }
        let mut left = most;
        while left > 0 {
            let bytes = if random.one_in(conditions.short) { 1 + random.below(left) } else { left };
            let delay = if random.one_in(conditions.late) { random.below(3_000_000) } else { random.below(30_000) };
            let after = pipe.coming.back().map_or(0, |(at, _)| *at);
            let at = after.max(*now + delay as u64);
            pipe.coming.push_back((at, bytes));
            *next_arrival = at.min(*next_arrival);
            left -= bytes;
        }
        self.changed(from, to);
        Ok(most)
    }

    fn read(&mut self, from: usize, to: usize, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let Self { conditions, random, now, .. } = self;
        let pipe = &mut self.pipes[from * self.size + to];
        pipe.arrive(*now);
        let total: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        let mut most = total.min(pipe.arrived);
        if most == 0 {
            return if pipe.readable() { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        if random.one_in(conditions.short) {
            most = 1 + random.below(most);
        }
        let mut left = most;
        for buffer in buffers {
            let taken = buffer.len().min(left);
            pipe.bytes.read_exact(&mut buffer[..taken])?;
            left -= taken;
        }
        pipe.arrived -= most;
        self.changed(from, to);
        Ok(most)
    }
}

/// A rank's end of the two pipes between it and another.
#[derive(Debug, Clone)]
pub(super) struct SimulatedStream {
    state: Arc<Mutex<State>>,
    rank: usize,
    other: usize,
}

impl Read for SimulatedStream {
    fn read(&mut self, place: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(place)])
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        lock(&self.state).read(self.other, self.rank, buffers)
    }
}

impl ReadUninit for SimulatedStream {
    /// Scatters over both places, as the system's `readv` does: what is left over is where faults hide.
    unsafe fn read_uninit(&mut self, place: *mut u8, len: usize, rest: &mut [u8]) -> io::Result<usize> {
        let mut bytes = vec![0; len];
        let n = self.read_vectored(&mut [IoSliceMut::new(&mut bytes), IoSliceMut::new(rest)])?;
        // SAFETY: `len` bytes may be written, the caller says.
        unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), n.min(len)) };
        Ok(n)
    }
}

impl Write for SimulatedStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        lock(&self.state).write(self.rank, self.other, pieces)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for SimulatedStream {
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        lock(&self.state).shut(self.rank, self.other, how);
        Ok(())
    }
}

/// The network as one rank sees it.
#[derive(Debug)]
pub(super) struct SimulatedNetwork {
    state: Arc<Mutex<State>>,
    /// The beginning of time.
    began: Instant,
    rank: usize,
}

impl SimulatedNetwork {
    pub fn new(state: Arc<Mutex<State>>, began: Instant, rank: usize) -> Self {
        Self { state, began, rank }
    }

    pub fn streams(&self) -> Vec<Option<SimulatedStream>> {
        let stream = |other| SimulatedStream { state: self.state.clone(), rank: self.rank, other };
        (0..lock(&self.state).size).map(|other| (other != self.rank).then(|| stream(other))).collect()
    }

    pub fn nanoseconds(&self) -> u64 {
        lock(&self.state).now
    }

    /// The end of a time of at least this, and of so many nanoseconds more at most.
    fn at_least(&self, least: Duration, most_more: usize) -> u64 {
        let mut state = lock(&self.state);
        state.now + least.as_nanos() as u64 + state.random.below(most_more) as u64
    }

    /// When a message arrives that is sent now.
    pub fn message_arrival(&self) -> u64 {
        let mut state = lock(&self.state);
        let late = if state.random.one_in(4) { 3_000_000 } else { 30_000 };
        state.now + state.random.below(late) as u64
    }
}

/// The streams of an endpoint are closed when it goes.
impl Drop for SimulatedNetwork {
    fn drop(&mut self) {
        lock(&self.state).end(self.rank);
    }
}

impl Clock for SimulatedNetwork {
    fn now(&self) -> Instant {
        self.began + Duration::from_nanos(self.nanoseconds())
    }

    fn yield_now(&self) {
        pause(ThreadPause::Sleep(self.at_least(Duration::ZERO, YIELD)));
    }

    fn sleep(&self, duration: Duration) {
        pause(ThreadPause::Sleep(self.at_least(duration, TIMER_SLACK)));
    }
}

impl Network for SimulatedNetwork {
    type Stream = SimulatedStream;

    fn ready(&self, streams: &[(usize, &SimulatedStream, bool)]) -> Vec<usize> {
        let mut state = lock(&self.state);
        state.arrive();
        let mut ready = Vec::with_capacity(streams.len());
        for stream in streams {
            if state.is_ready(self.rank, Streams::of(&[*stream])) {
                ready.push(stream.0);
            }
        }
        ready
    }

    fn park(&self, streams: &[(usize, &SimulatedStream, bool)], longest: Duration) {
        pause(ThreadPause::Rest(self.at_least(longest, TIMER_SLACK), Streams::of(streams)));
    }

    fn wake(&self) {
        lock(&self.state).woken[self.rank] = true;
    }

    fn limits(&self) -> Limits {
        lock(&self.state).conditions.limits
    }

    fn thresholds(&self) -> Thresholds {
        lock(&self.state).conditions.thresholds
    }
}
