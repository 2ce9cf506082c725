//! Allocations of memory that are used again by their size.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::ptr::NonNull;

/// A cache line, and the widest vector.
pub(crate) const ALIGN: usize = 64;
/// An allocation that is not taken again while so many others are goes back to the system.
pub(super) const KEEP: u64 = 4096;
/// All allocations may take this part more than tensors had at once at most, or so many bytes: what a product turns a
/// factor in is there at other times than a few gradients.
pub(super) const SLACK: usize = 16;
pub(super) const LEAST_SLACK: usize = 1 << 20;

/// The allocations of a pool: those that are free, and what is known of the others.
#[derive(Debug, Default)]
pub(super) struct Allocations {
    /// By bytes; with the time since when.
    pub(super) free: BTreeMap<usize, Vec<(Allocation, u64)>>,
    /// How often an allocation was taken.
    time: u64,
    /// Bytes of allocations that are free, and of those that tensors hold.
    pub(super) idle: usize,
    used: usize,
    /// The most that tensors held at once.
    pub(super) most: usize,
    /// The most bytes of allocations that are free, if there is such a limit: of what comes back then the rest goes to
    /// the system.
    limit: Option<usize>,
}

impl Allocations {
    /// Of which no more bytes are free than these.
    pub(super) fn limited(bytes: usize) -> Self {
        Self { limit: Some(bytes), ..Self::default() }
    }

    /// An allocation of so many bytes or a few more: one that is free, or a new one.
    ///
    /// # Errors
    /// What there is no memory for.
    pub(super) fn lend(&mut self, bytes: usize) -> Result<Allocation, Layout> {
        self.time += 1;
        let found = self.take(bytes);
        let allocation = match found {
            Some(allocation) => allocation,
            None => {
                self.make_room(bytes);
                Allocation::try_zeroed(bytes)?
            }
        };
        self.used += allocation.size();
        self.most = self.most.max(self.used);
        if self.time.is_multiple_of(KEEP) {
            let time = self.time;
            let sizes: Vec<usize> = self.free.keys().copied().collect();
            for size in sizes {
                self.release(size, |of_size| of_size.retain(|(_, since)| since + KEEP > time));
            }
        }
        Ok(allocation)
    }

    /// Takes back an allocation that was lent, if it is to be lent again.
    pub(super) fn take_back(&mut self, allocation: Allocation) {
        let size = allocation.size();
        self.used -= size;
        if self.limit.is_some_and(|limit| self.idle + size > limit) {
            return;
        }
        self.idle += size;
        self.free.entry(size).or_default().push((allocation, self.time));
    }

    /// An allocation of so many bytes or a few more, if there is one: not one that is much larger, which will be wanted
    /// for what is.
    fn take(&mut self, bytes: usize) -> Option<Allocation> {
        let size = *self.free.range(bytes..=bytes + bytes / 4).next()?.0;
        let of_size = self.free.get_mut(&size)?;
        let (allocation, _) = of_size.pop()?;
        if of_size.is_empty() {
            self.free.remove(&size);
        }
        self.idle -= size;
        Some(allocation)
    }

    /// Gives allocations back to the system, those first that have been free for longest, until there is room for so
    /// many bytes more: all take little more than tensors had at once at most. A step that wants large ones after many
    /// small ones would hold both else. A little more, so that what is small and there for a moment does not cost a
    /// large one in each step.
    fn make_room(&mut self, bytes: usize) {
        let most = self.most.max(self.used + bytes);
        let most = most + (most / SLACK).max(LEAST_SLACK);
        while self.idle > 0 && self.used + self.idle + bytes > most {
            let oldest = |of_size: &Vec<(Allocation, u64)>| of_size.iter().map(|(_, since)| *since).min();
            let Some(size) = self.free.iter().min_by_key(|(_, of_size)| oldest(of_size)).map(|(size, _)| *size) else {
                return;
            };
            self.release(size, |of_size| {
                let first = (0..of_size.len()).min_by_key(|at| of_size[*at].1);
                first.into_iter().for_each(|at| drop(of_size.remove(at)));
            });
        }
    }

    /// Drops allocations of one size.
    fn release(&mut self, size: usize, some: impl FnOnce(&mut Vec<(Allocation, u64)>)) {
        let Some(of_size) = self.free.get_mut(&size) else { return };
        let before = of_size.len();
        some(of_size);
        self.idle -= size * (before - of_size.len());
        if of_size.is_empty() {
            self.free.remove(&size);
        }
    }
}

/// An allocation of memory, given back to the system when it is dropped.
#[derive(Debug)]
pub(super) struct Allocation {
    allocated: NonNull<u8>,
    layout: Layout,
    /// From its first aligned byte on.
    bytes: usize,
}

// SAFETY: an allocation is bytes that nothing else refers to.
unsafe impl Send for Allocation {}
// SAFETY: the same; it is changed through `&mut` only.
unsafe impl Sync for Allocation {}

impl Allocation {
    /// Zeros, since kernels refer to elements before they write them: of a large allocation pages that the system
    /// zeroes when they are touched.
    pub(super) fn zeroed(bytes: usize) -> Self {
        Self::try_zeroed(bytes).unwrap_or_else(|layout| handle_alloc_error(layout))
    }

    /// The same, if there is memory for it. The allocator would write the zeros itself if it were asked for more than
    /// its own alignment.
    fn try_zeroed(bytes: usize) -> Result<Self, Layout> {
        let layout = bytes.checked_add(ALIGN).and_then(|bytes| Layout::from_size_align(bytes, align_of::<u128>()).ok());
        let layout = layout.expect("a tensor is smaller than the address space");
        // SAFETY: its size is not 0.
        let allocated = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(layout)?;
        Ok(Self { allocated, layout, bytes })
    }

    /// The first byte, at a multiple of 64.
    pub(super) fn pointer(&self) -> *mut u8 {
        let pointer = self.allocated.as_ptr();
        pointer.wrapping_add(pointer.align_offset(ALIGN))
    }

    pub(super) fn size(&self) -> usize {
        self.bytes
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout, and is dropped once.
        unsafe { dealloc(self.allocated.as_ptr(), self.layout) };
    }
}
