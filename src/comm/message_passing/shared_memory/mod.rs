//! Memory that the ranks of a group on one machine share: they agree on collectives in it, and exchange short data.
//!
//! Its layout, one after the other: the seal; counters for the number of a group, for the commits, and for what each
//! rank has published; two counters for the mailbox from each rank to each other; two descriptors and two slots of each
//! rank; the mailbox entries.
//!
//! An agreement by messages takes two of them, some microseconds; in shared memory it takes two cache lines that go
//! from core to core. A rank may write its contribution into its slot before it knows whether the others will call: no
//! rank's buffer is touched by that. `rounds.rs` describes how the ranks avoid conflicts.

mod mailbox;
#[cfg(target_os = "linux")]
mod mapping;
#[cfg(not(target_os = "linux"))]
#[path = "no_mapping.rs"]
mod mapping;
mod rounds;
mod streaming_store;
mod sync;

use self::mailbox::{ENTRIES, Mailbox};
pub(super) use self::mapping::Address;
use self::mapping::SharedMapping;
pub(super) use self::rounds::Rounds;
use self::rounds::{Counter, RoundCounters};
pub(super) use self::streaming_store::copy_out;
use super::call_descriptor::DESCRIPTOR_BYTES;

/// Bytes of the largest slot.
const MAX_SLOT: usize = 1 << 20;
/// Bytes of the largest mailbox entry.
const MAX_ENTRY: usize = 256 << 10;
/// Bytes of the smallest slot: a cache line for each of the ranks that can have one.
const MIN_SLOT: usize = 16 << 10;
/// Bytes of the smallest mailbox entry that is worth its memory.
const MIN_ENTRY: usize = 4 << 10;
/// Bytes of all slots together, and of all mailbox entries together.
const MAX_TOTAL: usize = 8 << 20;
/// Bytes of a descriptor, in whole cache lines.
const DESCRIPTOR_STRIDE: usize = DESCRIPTOR_BYTES.next_multiple_of(128);
/// Bytes of the header of a mailbox entry.
const HEADER_BYTES: usize = 256;

#[derive(Debug)]
pub(super) struct SharedMemory {
    mapping: SharedMapping,
    offsets: Offsets,
}

/// The offsets of the parts.
#[derive(Debug, Clone, Copy)]
struct Offsets {
    size: usize,
    /// Bytes of a slot.
    slot: usize,
    /// Bytes of a mailbox entry, without its header.
    entry: usize,
}

impl Offsets {
    /// The offsets for so many ranks; `None` if they are too many.
    fn new(size: usize) -> Option<Self> {
        let bytes_of_each = |pieces: usize, smallest: usize, largest: usize| {
            let share = MAX_TOTAL / pieces;
            (share >= smallest).then(|| (1 << share.ilog2()).min(largest))
        };
        let slot = bytes_of_each(2 * size, MIN_SLOT, MAX_SLOT)?;
        // Ranks that are too many for mailboxes may still agree in it.
        let entry = bytes_of_each(size * size * ENTRIES as usize, MIN_ENTRY, MAX_ENTRY).unwrap_or(0);
        Some(Self { size, slot, entry })
    }

    fn counter_count(&self) -> usize {
        2 + self.size + 2 * self.size * self.size
    }

    fn descriptors(&self) -> usize {
        SharedMapping::SEAL + self.counter_count() * size_of::<Counter>()
    }

    fn slots(&self) -> usize {
        (self.descriptors() + 2 * self.size * DESCRIPTOR_STRIDE).next_multiple_of(4096)
    }

    fn mailboxes(&self) -> usize {
        self.slots() + 2 * self.size * self.slot
    }

    fn bytes(&self) -> usize {
        let each = if self.entry > 0 { HEADER_BYTES + self.entry } else { 0 };
        self.mailboxes() + self.size * self.size * ENTRIES as usize * each
    }
}

impl SharedMemory {
    /// New shared memory for the ranks of a group, and its address for the others.
    pub fn new(size: usize) -> Option<(Self, Address)> {
        let offsets = Offsets::new(size)?;
        let (mapping, address) = SharedMapping::create(offsets.bytes())?;
        Some((Self { mapping, offsets }, address))
    }

    /// The shared memory at this address, if this process can open it.
    pub fn open(address: &Address, size: usize) -> Option<Self> {
        let offsets = Offsets::new(size)?;
        let mapping = SharedMapping::open(address, offsets.bytes())?;
        Some(Self { mapping, offsets })
    }

    /// Ranks that share it.
    pub fn size(&self) -> usize {
        self.offsets.size
    }

    /// All ranks have opened it.
    pub fn all_opened(&mut self) {
        self.mapping.all_opened();
    }

    fn all_counters(&self) -> &[Counter] {
        // SAFETY: within the memory, aligned, and only ever used as counters.
        unsafe { std::slice::from_raw_parts(self.mapping.at(SharedMapping::SEAL).cast(), self.offsets.counter_count()) }
    }

    /// A number that the group root gives to all with its commit.
    pub fn number(&self) -> &Counter {
        &self.all_counters()[0]
    }

    fn counters(&self) -> RoundCounters<'_> {
        let counters = self.all_counters();
        RoundCounters { committed: &counters[1], published: &counters[2..2 + self.offsets.size] }
    }

    pub fn publish(&self, rounds: &mut Rounds) {
        rounds.publish(self.counters());
    }

    pub fn all_published(&self, rounds: &Rounds) -> bool {
        rounds.all_published(self.counters())
    }

    pub fn commit(&self, rounds: &Rounds) {
        rounds.commit(self.counters());
    }

    pub fn committed(&self, rounds: &Rounds) -> bool {
        rounds.committed(self.counters())
    }

    pub fn write_descriptor(&self, rank: usize, rounds: &Rounds, descriptor: &[u8; DESCRIPTOR_BYTES]) {
        // SAFETY: the descriptor is this rank's own, and nobody reads it now.
        unsafe { self.descriptor(rank, rounds).copy_from_nonoverlapping(descriptor.as_ptr(), DESCRIPTOR_BYTES) };
    }

    pub fn read_descriptor(&self, rank: usize, rounds: &Rounds) -> [u8; DESCRIPTOR_BYTES] {
        let mut descriptor = [0; DESCRIPTOR_BYTES];
        // SAFETY: the descriptor has been published. Whatever another process may have done to it, it is bytes.
        unsafe { self.descriptor(rank, rounds).copy_to_nonoverlapping(descriptor.as_mut_ptr(), DESCRIPTOR_BYTES) };
        descriptor
    }

    fn descriptor(&self, rank: usize, rounds: &Rounds) -> *mut u8 {
        self.mapping.at(self.offsets.descriptors() + (2 * rank + rounds.slot()) * DESCRIPTOR_STRIDE)
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> usize {
        self.offsets.slot
    }

    /// The slot of a rank in this round, aligned to a cache line.
    pub fn slot(&self, rank: usize, rounds: &Rounds) -> *mut u8 {
        self.mapping.at(self.offsets.slots() + (2 * rank + rounds.slot()) * self.offsets.slot)
    }

    /// Bytes of data that a mailbox entry has room for.
    pub fn entry_bytes(&self) -> usize {
        self.offsets.entry
    }

    /// Posts a message, unless the mailbox is full. `data` are the bytes that go with the header.
    ///
    /// # Safety
    /// `len` bytes are readable, and not more than an entry has room for.
    pub unsafe fn post_message(&self, (from, to): (usize, usize), header: &[u8], data: *const u8, len: usize) -> bool {
        let mailbox = self.mailbox(from, to);
        let Some(index) = mailbox.free().filter(|_| header.len() < HEADER_BYTES && self.offsets.entry > 0) else {
            return false;
        };
        let entry = self.entry(from, to, index);
        // SAFETY: within the entry, which is this rank's to write.
        unsafe {
            entry.write(header.len() as u8);
            entry.add(1).copy_from_nonoverlapping(header.as_ptr(), header.len());
            copy_out(data, entry.add(HEADER_BYTES), len);
        }
        mailbox.post();
        true
    }

    /// The header of the next message, if there is one, and the address of its data.
    pub fn next_message(&self, (from, to): (usize, usize)) -> Option<(Box<[u8]>, *const u8)> {
        let entry = self.entry(from, to, self.mailbox(from, to).next()?);
        // SAFETY: within the entry. Whatever another process may do to it, a copy is bytes.
        let header = unsafe { entry.cast::<[u8; HEADER_BYTES]>().read() };
        let header = &header[1..][..usize::from(header[0])];
        // SAFETY: as above.
        Some((header.into(), unsafe { entry.add(HEADER_BYTES) }))
    }

    /// The next message has been read.
    pub fn take_message(&self, (from, to): (usize, usize)) {
        self.mailbox(from, to).take();
    }

    fn mailbox(&self, from: usize, to: usize) -> Mailbox<'_> {
        let first = 2 + self.offsets.size + 2 * (from * self.offsets.size + to);
        Mailbox { posted: &self.all_counters()[first], taken: &self.all_counters()[first + 1] }
    }

    fn entry(&self, from: usize, to: usize, index: u64) -> *mut u8 {
        let number = (from * self.offsets.size + to) * ENTRIES as usize + index as usize;
        self.mapping.at(self.offsets.mailboxes() + number * (HEADER_BYTES + self.offsets.entry))
    }
}

#[cfg(test)]
mod tests {
    use super::Offsets;

    #[test]
    fn every_rank_has_a_share_of_a_slot() {
        let sizes: Vec<(usize, usize)> =
            (2..2000).filter_map(|size| Offsets::new(size).map(|offsets| (size, offsets.slot))).collect();
        assert!(sizes.len() > 200);
        // Of the widest elements.
        assert!(sizes.iter().all(|(size, slot)| slot / size_of::<f64>() / size > 0));
    }
}
