//! Memory that is used again: what large tensors of captured steps are made in.
//!
//! The system gives and takes memory of this size page by page, each of which it zeroes when it is first touched. That
//! takes longer than to write it. So it stays with the steps of a thread, in two forms: an arena in which tensors that
//! live and die within a step have places that were worked out before, so that it is as large as the step needs; and
//! allocations for tensors that leave the step or whose end is not known, which are used again by the next of about
//! their size.

use std::alloc::{Layout, handle_alloc_error};
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use burn::backend::flex::{FlexTensor, Layout as Strides};
use burn::tensor::{Bytes, DType, Shape};
use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty};

use super::allocations::{Allocation, Allocations};
use super::arena::Arena;
use crate::lock::lock;

/// What is smaller comes from the allocator, which keeps it.
pub(crate) const FROM: usize = 256 << 10;

/// The memory that the captured steps of a thread take turns in. It goes back to the system with the last of them.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    allocations: Mutex<Allocations>,
    /// As large as the largest step of those that have run.
    arena: Mutex<Option<Arc<Arena>>>,
    /// How many tensors did not find their place free.
    #[cfg(test)]
    elsewhere: std::sync::atomic::AtomicUsize,
}

thread_local! {
    static OF_THREAD: RefCell<Weak<Pool>> = const { RefCell::new(Weak::new()) };
}

impl Pool {
    /// That of this thread: one for all who hold it at the same time.
    pub(crate) fn of_thread() -> Arc<Self> {
        OF_THREAD.with_borrow_mut(|known| {
            known.upgrade().unwrap_or_else(|| {
                let pool = Arc::new(Self::default());
                *known = Arc::downgrade(&pool);
                pool
            })
        })
    }

    /// One that keeps no more than so many bytes that no tensor holds.
    pub(crate) fn keeping(bytes: usize) -> Self {
        Self { allocations: Mutex::new(Allocations::limited(bytes)), ..Self::default() }
    }

    /// Room for so many bytes, with any values.
    pub(crate) fn room(self: &Arc<Self>, bytes: usize) -> Room {
        if bytes < FROM {
            return Room { backing: Backing::Allocation(Allocation::zeroed(bytes), Weak::new()), bytes };
        }
        self.large_room(bytes).unwrap_or_else(|layout| handle_alloc_error(layout))
    }

    /// The same for many bytes, if there is memory for them.
    fn large_room(self: &Arc<Self>, bytes: usize) -> Result<Room, Layout> {
        let allocation = self.allocations().lend(bytes)?;
        Ok(Room { backing: Backing::Allocation(allocation, Arc::downgrade(self)), bytes })
    }

    /// Room in the arena, of which the step needs `size` bytes, from `start` on; elsewhere if somebody is still there.
    pub(crate) fn room_at(self: &Arc<Self>, start: usize, bytes: usize, size: usize) -> Room {
        let arena = {
            let mut arena = lock(&self.arena);
            // Of an arena that is too small tensors keep the rest alive.
            let large = arena.take().filter(|arena| arena.size() >= size);
            arena.insert(large.unwrap_or_else(|| Arc::new(Arena::new(size)))).clone()
        };
        match arena.lend(start, bytes) {
            true => Room { backing: Backing::Arena(arena, start), bytes },
            false => {
                #[cfg(test)]
                self.elsewhere.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                self.room(bytes)
            }
        }
    }

    /// A tensor with any values, to be written over.
    pub(crate) fn tensor(self: &Arc<Self>, shape: Shape, dtype: DType) -> FlexTensor {
        let bytes = shape.num_elements() * dtype.size();
        if bytes < FROM {
            return FlexTensor::empty(shape, dtype);
        }
        // SAFETY: the memory of the pool was zeroed when it was new.
        FlexTensor::new(unsafe { self.room(bytes).filled() }, Strides::contiguous(shape), dtype)
    }

    /// A tensor of floats with any values, to be written over; `None` if it is too small, or larger than anything.
    ///
    /// # Errors
    /// What there is no memory for.
    pub(crate) fn large_tensor(self: &Arc<Self>, dims: &[usize], dtype: DType) -> Option<Result<FlexTensor, Layout>> {
        let elements = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim))?;
        let may_be = |bytes: &usize| *bytes >= FROM && *bytes <= isize::MAX as usize / 2;
        let bytes = elements.checked_mul(dtype.size()).filter(may_be).filter(|_| dtype.is_float())?;
        // SAFETY: the memory of the pool was zeroed when it was new.
        let tensor = |room: Room| unsafe { room.filled() };
        let shape = Shape::from(dims.to_vec());
        Some(self.large_room(bytes).map(|room| FlexTensor::new(tensor(room), Strides::contiguous(shape), dtype)))
    }

    #[cfg(test)]
    pub(crate) fn elsewhere(&self) -> usize {
        self.elsewhere.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Bytes that no tensor holds.
    #[cfg(test)]
    pub(crate) fn free(&self) -> usize {
        self.allocations().idle
    }

    fn allocations(&self) -> MutexGuard<'_, Allocations> {
        lock(&self.allocations)
    }
}

/// What memory a room is in.
#[derive(Debug)]
enum Backing {
    /// In an allocation of its own, which returns to its pool, if there still is one.
    Allocation(Allocation, Weak<Pool>),
    /// In an arena, from there on.
    Arena(Arc<Arena>, usize),
    /// Given back.
    Nowhere,
}

/// Memory for a tensor; it can be used again when it is dropped.
#[derive(Debug)]
pub(crate) struct Room {
    backing: Backing,
    bytes: usize,
}

impl Room {
    /// Where it begins, at a multiple of 64 bytes.
    pub(crate) fn pointer(&self) -> *mut u8 {
        match &self.backing {
            Backing::Allocation(allocation, _) => allocation.pointer(),
            Backing::Arena(arena, start) => arena.pointer(*start),
            Backing::Nowhere => std::ptr::null_mut(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// # Safety
    /// All bytes have been written.
    pub(crate) unsafe fn filled(self) -> Bytes {
        let bytes = self.bytes;
        // SAFETY: the caller has set them.
        unsafe { Bytes::from_controller(Box::new(self), bytes) }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.backing, Backing::Nowhere) {
            Backing::Arena(arena, start) => arena.take_back(start),
            Backing::Allocation(allocation, pool) => {
                let Some(pool) = pool.upgrade() else { return };
                pool.allocations().take_back(allocation);
            }
            Backing::Nowhere => {}
        }
    }
}

impl AllocationController for Room {
    /// burn knows alignments up to this one.
    fn alloc_align(&self) -> usize {
        align_of::<u128>()
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        // SAFETY: the allocation is at least so large, and lent for writing.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer().cast(), self.bytes) })
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        // SAFETY: the allocation is at least so large.
        Ok(unsafe { std::slice::from_raw_parts(self.pointer().cast(), self.bytes) })
    }
}

#[cfg(test)]
mod tests {
    use super::super::allocations::{KEEP, SLACK};
    use super::*;

    fn filled(pool: &Arc<Pool>, bytes: usize, with: u8) -> Bytes {
        let room = pool.room(bytes);
        // SAFETY: it has so many bytes, which are all written.
        unsafe {
            room.pointer().write_bytes(with, bytes);
            room.filled()
        }
    }

    #[test]
    fn memory_is_taken_again() {
        let pool = Pool::of_thread();
        pool.allocations().most = 16 * FROM;
        let first = filled(&pool, FROM, 7);
        let place = first.as_ptr();
        assert_eq!((first.len(), first[FROM - 1], pool.free()), (FROM, 7, 0));
        let mut copy = first.clone();
        copy[0] = 1;
        assert_eq!(first[0], 7);
        drop((first, copy));
        assert_eq!(pool.free(), FROM);
        // What is larger does not fit.
        let large = filled(&pool, FROM + FROM / 8, 9);
        assert_eq!((large.len(), pool.free()), (FROM + FROM / 8, FROM));
        assert_eq!(filled(&pool, FROM, 3).as_ptr(), place);
    }

    #[test]
    fn memory_outlives_its_pool_and_goes_with_it() {
        let (pool, again) = (Pool::of_thread(), Pool::of_thread());
        assert!(Arc::ptr_eq(&pool, &again));
        let bytes = filled(&pool, FROM, 5);
        drop(filled(&pool, FROM, 6));
        let known = Arc::downgrade(&pool);
        drop((pool, again));
        assert!(known.upgrade().is_none());
        assert_eq!((bytes[0], bytes.len()), (5, FROM));
        let sent = std::thread::spawn(move || bytes[FROM - 1]).join();
        assert_eq!(sent.ok(), Some(5));
    }

    #[test]
    fn sizes_take_turns_in_little_more_than_the_largest_takes() {
        let pool = Pool::of_thread();
        for size in [8, 12, 16, 24] {
            let some: Vec<Room> = (0..96 / size).map(|_| pool.room(size * FROM)).collect();
            drop(some);
            let held = pool.free();
            assert!((96 * FROM..=96 * FROM + 96 * FROM / SLACK).contains(&held), "{size}: {held}");
        }
        let all = pool.allocations().free.iter().map(|(size, of_size)| size * of_size.len()).sum::<usize>();
        assert_eq!(all, pool.free());
    }

    /// Gradients, and in the midst of each step something small for a moment.
    #[test]
    fn what_is_there_for_a_moment_costs_no_large_piece() {
        let pool = Pool::of_thread();
        for step in 0..3 {
            drop(pool.room(FROM));
            assert!(step == 0 || pool.free() == 33 * FROM, "step {step}: {}", pool.free());
            let all: Vec<Room> = (0..4).map(|_| pool.room(8 * FROM)).collect();
            drop(all);
        }
    }

    /// One gradient of some MiB, and at another time of each step a panel of 1 MiB.
    #[test]
    fn a_few_sizes_do_not_push_each_other_out() {
        let pool = Pool::of_thread();
        let mut places = Vec::new();
        for _ in 0..3 {
            drop(pool.room(4 * FROM));
            places.push(pool.room(16 * FROM).pointer());
            assert_eq!(pool.free(), 20 * FROM);
        }
        assert!(places.iter().all(|place| *place == places[0]));
    }

    #[test]
    fn no_more_is_kept_than_a_limit() {
        let pool = Arc::new(Pool::keeping(9 * FROM));
        let rooms: Vec<Room> = [4, 6, 5, 4].map(|times| pool.room(times * FROM)).into();
        drop(rooms);
        // The first and the third: with the second, or the last, it would be more.
        assert_eq!(pool.free(), 9 * FROM);
        let again = pool.room(5 * FROM);
        assert_eq!(pool.free(), 4 * FROM);
        drop(again);
        assert_eq!(pool.free(), 9 * FROM);
    }

    #[test]
    fn what_is_not_taken_again_is_given_back() {
        let pool = Pool::of_thread();
        drop(filled(&pool, 4 * FROM, 1));
        for _ in 0..2 * KEEP {
            drop(pool.room(FROM));
        }
        assert_eq!(pool.free(), FROM);
    }
}
