//! Memory in which the ranks of a group that live on one machine meet, and through which they hand each other what is short.
//!
//! A meeting by messages costs two of them, some microseconds; on a board it costs two cache lines that go from core to core.
//! What a rank brings it may lay out on the board before it knows whether the others will come: no buffer of anybody's is
//! touched by that. How the ranks keep out of each other's way is told in `rounds.rs`.

#[cfg(target_os = "linux")]
mod memory;
#[cfg(not(target_os = "linux"))]
#[path = "no_memory.rs"]
mod memory;
mod rounds;
mod stream;
mod sync;

pub(super) use self::memory::Address;
use self::memory::Memory;
pub(super) use self::rounds::Rounds;
use self::rounds::{Counters, Line};
pub(super) use self::stream::copy_out;
use super::agree::POST;

/// Bytes of the largest side.
const LARGEST: usize = 128 << 10;
/// Bytes of the smallest side that is worth a board.
const SMALLEST: usize = 4 << 10;
/// Bytes of all sides together.
const MOST: usize = 8 << 20;
/// Room for a post, in whole cache lines.
const POST_ROOM: usize = POST.next_multiple_of(128);

#[derive(Debug)]
pub(super) struct Board {
    memory: Memory,
    size: usize,
    /// Bytes of a side.
    room: usize,
}

/// Bytes of a side where so many ranks meet; `None` if they are too many.
fn room(size: usize) -> Option<usize> {
    let share = MOST / (2 * size);
    (share >= SMALLEST).then(|| (1 << share.ilog2()).min(LARGEST))
}

impl Board {
    /// A new board for the ranks of a group, and what the others find it by.
    pub fn new(size: usize) -> Option<(Self, Address)> {
        let room = room(size)?;
        let (memory, address) = Memory::create(Self::bytes(size, room))?;
        Some((Self { memory, size, room }, address))
    }

    /// The board at this address, if this process can reach it.
    pub fn open(address: &Address, size: usize) -> Option<Self> {
        let room = room(size)?;
        let memory = Memory::open(address, Self::bytes(size, room))?;
        Some(Self { memory, size, room })
    }

    /// Ranks that meet on it.
    pub fn size(&self) -> usize {
        self.size
    }

    /// All ranks have opened it.
    pub fn is_shared(&mut self) {
        self.memory.is_shared();
    }

    /// The seal; the number of a group; the word; a counter, two posts and two sides for each rank.
    fn bytes(size: usize, room: usize) -> usize {
        Self::sides(size) + 2 * size * room
    }

    fn posts(size: usize) -> usize {
        Memory::SEAL + (2 + size) * size_of::<Line>()
    }

    fn sides(size: usize) -> usize {
        (Self::posts(size) + 2 * size * POST_ROOM).next_multiple_of(4096)
    }

    fn lines(&self) -> &[Line] {
        // SAFETY: within the memory, aligned, and only ever used as counters.
        unsafe { std::slice::from_raw_parts(self.memory.at(Memory::SEAL).cast(), 2 + self.size) }
    }

    /// A number that the decider gives to all with its word.
    pub fn number(&self) -> &Line {
        &self.lines()[0]
    }

    fn counters(&self) -> Counters<'_> {
        let lines = self.lines();
        Counters { word: &lines[1], shown: &lines[2..] }
    }

    pub fn show(&self, rounds: &mut Rounds) {
        rounds.show(self.counters());
    }

    pub fn all_shown(&self, rounds: &Rounds) -> bool {
        rounds.all_shown(self.counters())
    }

    pub fn commit(&self, rounds: &Rounds) {
        rounds.commit(self.counters());
    }

    pub fn committed(&self, rounds: &Rounds) -> bool {
        rounds.committed(self.counters())
    }

    pub fn write_post(&self, rank: usize, rounds: &Rounds, post: &[u8; POST]) {
        // SAFETY: the place is this rank's own, and nobody reads it now.
        unsafe { self.post(rank, rounds).copy_from_nonoverlapping(post.as_ptr(), POST) };
    }

    pub fn read_post(&self, rank: usize, rounds: &Rounds) -> [u8; POST] {
        let mut post = [0; POST];
        // SAFETY: the post has been shown. Whatever another process may have done to it, it is bytes.
        unsafe { self.post(rank, rounds).copy_to_nonoverlapping(post.as_mut_ptr(), POST) };
        post
    }

    fn post(&self, rank: usize, rounds: &Rounds) -> *mut u8 {
        self.memory.at(Self::posts(self.size) + (2 * rank + rounds.side()) * POST_ROOM)
    }

    /// Bytes of a side.
    pub fn room(&self) -> usize {
        self.room
    }

    /// The side of a rank in this round, aligned to a cache line.
    pub fn side(&self, rank: usize, rounds: &Rounds) -> *mut u8 {
        self.memory.at(Self::sides(self.size) + (2 * rank + rounds.side()) * self.room)
    }
}
