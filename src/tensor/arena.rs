//! One allocation of memory in which the tensors of a step have their places.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use super::allocations::Allocation;
use crate::lock::lock;

/// Memory whose places are lent, each to one tensor at a time. Whoever works out the places may err in who is still
/// there: a place that is not free is not lent.
#[derive(Debug)]
pub(super) struct Arena {
    allocation: Allocation,
    /// Where places that are lent begin and end.
    lent: Mutex<BTreeMap<usize, usize>>,
}

impl Arena {
    pub(super) fn new(bytes: usize) -> Self {
        Self { allocation: Allocation::zeroed(bytes), lent: Mutex::default() }
    }

    pub(super) fn size(&self) -> usize {
        self.allocation.size()
    }

    /// Lends `bytes` from `start` on, if all of them are free.
    pub(super) fn lend(&self, start: usize, bytes: usize) -> bool {
        let Some(end) = start.checked_add(bytes).filter(|end| *end <= self.size() && bytes > 0) else { return false };
        let mut lent = self.lent();
        let before = lent.range(..end).next_back();
        let free = before.is_none_or(|(_, before)| *before <= start);
        if free {
            lent.insert(start, end);
        }
        free
    }

    /// Takes back what was lent from `start` on.
    pub(super) fn take_back(&self, start: usize) {
        self.lent().remove(&start);
    }

    /// Where a place begins.
    ///
    /// # Panics
    /// If it is not within the arena.
    pub(super) fn pointer(&self, start: usize) -> *mut u8 {
        assert!(start <= self.size(), "a place that was lent lies in its arena");
        // SAFETY: the place lies within the allocation.
        unsafe { self.allocation.pointer().add(start) }
    }

    fn lent(&self) -> MutexGuard<'_, BTreeMap<usize, usize>> {
        lock(&self.lent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_byte_is_lent_twice() {
        let arena = Arena::new(100);
        assert!(arena.lend(20, 30));
        for (start, bytes) in
            [(20, 30), (0, 21), (49, 1), (30, 5), (0, 100), (90, 11), (101, 1), (usize::MAX, 2), (5, 0)]
        {
            assert!(!arena.lend(start, bytes), "{start} {bytes}");
        }
        assert!(arena.lend(0, 20) && arena.lend(50, 50));
        arena.take_back(20);
        assert!(!arena.lend(19, 5) && arena.lend(25, 25) && !arena.lend(20, 6) && arena.lend(20, 5));
    }
}
