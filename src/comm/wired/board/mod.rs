//! Memory in which the ranks of a group that live on one machine meet, and through which they hand each other what is short.
//!
//! On it are, one behind the other: the seal; lines for the number of a group, for the decider's word, and for what each rank
//! has shown; two lines for the letters from each rank to each other; two posts and two sides of each rank; the letters.
//!
//! A meeting by messages costs two of them, some microseconds; on a board it costs two cache lines that go from core to core.
//! What a rank brings it may lay out on the board before it knows whether the others will come: no buffer of anybody's is
//! touched by that. How the ranks keep out of each other's way is told in `rounds.rs`.

mod letters;
#[cfg(target_os = "linux")]
mod memory;
#[cfg(not(target_os = "linux"))]
#[path = "no_memory.rs"]
mod memory;
mod rounds;
mod stream;
mod sync;

use self::letters::{Letters, PLACES};
pub(super) use self::memory::Address;
use self::memory::Memory;
pub(super) use self::rounds::Rounds;
use self::rounds::{Counters, Line};
pub(super) use self::stream::copy_out;
use super::agree::POST;

/// Bytes of the largest side.
const LARGEST_SIDE: usize = 1 << 20;
/// Bytes of the largest letter.
const LARGEST_LETTER: usize = 256 << 10;
/// Bytes of the smallest side: a cache line for each of the ranks that can have one.
const SMALLEST_SIDE: usize = 16 << 10;
/// Bytes of the smallest letter that is worth its place.
const SMALLEST_LETTER: usize = 4 << 10;
/// Bytes of all sides together, and of all letters together.
const MOST: usize = 8 << 20;
/// Room for a post, in whole cache lines.
const POST_ROOM: usize = POST.next_multiple_of(128);
/// Room for what a letter says of itself.
const HEADER_ROOM: usize = 256;

#[derive(Debug)]
pub(super) struct Board {
    memory: Memory,
    plan: Plan,
}

/// Where things are on a board.
#[derive(Debug, Clone, Copy)]
struct Plan {
    size: usize,
    /// Bytes of a side.
    side: usize,
    /// Bytes of a letter, without its header.
    letter: usize,
}

impl Plan {
    /// The plan for so many ranks; `None` if they are too many.
    fn new(size: usize) -> Option<Self> {
        let room = |pieces: usize, smallest: usize, largest: usize| {
            let share = MOST / pieces;
            (share >= smallest).then(|| (1 << share.ilog2()).min(largest))
        };
        let side = room(2 * size, SMALLEST_SIDE, LARGEST_SIDE)?;
        // Too many for letters may still meet.
        let letter = room(size * size * PLACES as usize, SMALLEST_LETTER, LARGEST_LETTER).unwrap_or(0);
        Some(Self { size, side, letter })
    }

    fn lines(&self) -> usize {
        2 + self.size + 2 * self.size * self.size
    }

    fn posts(&self) -> usize {
        Memory::SEAL + self.lines() * size_of::<Line>()
    }

    fn sides(&self) -> usize {
        (self.posts() + 2 * self.size * POST_ROOM).next_multiple_of(4096)
    }

    fn letters(&self) -> usize {
        self.sides() + 2 * self.size * self.side
    }

    fn bytes(&self) -> usize {
        let each = if self.letter > 0 { HEADER_ROOM + self.letter } else { 0 };
        self.letters() + self.size * self.size * PLACES as usize * each
    }
}

impl Board {
    /// A new board for the ranks of a group, and what the others find it by.
    pub fn new(size: usize) -> Option<(Self, Address)> {
        let plan = Plan::new(size)?;
        let (memory, address) = Memory::create(plan.bytes())?;
        Some((Self { memory, plan }, address))
    }

    /// The board at this address, if this process can reach it.
    pub fn open(address: &Address, size: usize) -> Option<Self> {
        let plan = Plan::new(size)?;
        let memory = Memory::open(address, plan.bytes())?;
        Some(Self { memory, plan })
    }

    /// Ranks that meet on it.
    pub fn size(&self) -> usize {
        self.plan.size
    }

    /// All ranks have opened it.
    pub fn is_shared(&mut self) {
        self.memory.is_shared();
    }

    fn lines(&self) -> &[Line] {
        // SAFETY: within the memory, aligned, and only ever used as counters.
        unsafe { std::slice::from_raw_parts(self.memory.at(Memory::SEAL).cast(), self.plan.lines()) }
    }

    /// A number that the decider gives to all with its word.
    pub fn number(&self) -> &Line {
        &self.lines()[0]
    }

    fn counters(&self) -> Counters<'_> {
        let lines = self.lines();
        Counters { word: &lines[1], shown: &lines[2..2 + self.plan.size] }
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
        self.memory.at(self.plan.posts() + (2 * rank + rounds.side()) * POST_ROOM)
    }

    /// Bytes of a side.
    pub fn room(&self) -> usize {
        self.plan.side
    }

    /// The side of a rank in this round, aligned to a cache line.
    pub fn side(&self, rank: usize, rounds: &Rounds) -> *mut u8 {
        self.memory.at(self.plan.sides() + (2 * rank + rounds.side()) * self.plan.side)
    }

    /// Bytes that a letter may bring.
    pub fn letter_room(&self) -> usize {
        self.plan.letter
    }

    /// Posts a letter, unless the receiver has yet to take others. `data` are the bytes that go with the header.
    ///
    /// # Safety
    /// So many bytes are readable, and not more than there is room for.
    pub unsafe fn post_letter(&self, (from, to): (usize, usize), header: &[u8], data: *const u8, len: usize) -> bool {
        let letters = self.letters(from, to);
        let Some(place) = letters.free().filter(|_| header.len() < HEADER_ROOM && self.plan.letter > 0) else {
            return false;
        };
        let place = self.letter(from, to, place);
        // SAFETY: within the letter, which is this rank's to write.
        unsafe {
            place.write(header.len() as u8);
            place.add(1).copy_from_nonoverlapping(header.as_ptr(), header.len());
            copy_out(data, place.add(HEADER_ROOM), len);
        }
        letters.post();
        true
    }

    /// The header of the next letter, if there is one, and where the bytes are that go with it.
    pub fn next_letter(&self, (from, to): (usize, usize)) -> Option<(Box<[u8]>, *const u8)> {
        let place = self.letter(from, to, self.letters(from, to).next()?);
        // SAFETY: within the letter. Whatever another process may do to it, a copy is bytes.
        let header = unsafe { place.cast::<[u8; HEADER_ROOM]>().read() };
        let header = &header[1..][..usize::from(header[0])];
        // SAFETY: as above.
        Some((header.into(), unsafe { place.add(HEADER_ROOM) }))
    }

    /// The next letter has been read.
    pub fn take_letter(&self, (from, to): (usize, usize)) {
        self.letters(from, to).take();
    }

    fn letters(&self, from: usize, to: usize) -> Letters<'_> {
        let first = 2 + self.plan.size + 2 * (from * self.plan.size + to);
        Letters { posted: &self.lines()[first], taken: &self.lines()[first + 1] }
    }

    fn letter(&self, from: usize, to: usize, place: u64) -> *mut u8 {
        let number = (from * self.plan.size + to) * PLACES as usize + place as usize;
        self.memory.at(self.plan.letters() + number * (HEADER_ROOM + self.plan.letter))
    }
}

#[cfg(test)]
mod tests {
    use super::Plan;

    #[test]
    fn every_rank_has_a_share_of_a_side() {
        let sizes: Vec<(usize, usize)> =
            (2..2000).filter_map(|size| Plan::new(size).map(|plan| (size, plan.side))).collect();
        assert!(sizes.len() > 200);
        // Of the widest elements.
        assert!(sizes.iter().all(|(size, side)| side / size_of::<f64>() / size > 0));
    }
}
