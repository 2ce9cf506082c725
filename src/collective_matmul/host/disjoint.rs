//! Disjoint slices of one tensor, which different threads write at the same time.
//!
//! While one part of a result travels, the next is computed into the same buffer. A [`DisjointSlice`] is a part that
//! one thread has to itself: slices of one tensor are cut once, so they don't overlap, and each keeps the buffer alive.
//! When all are dropped, and no sooner, the tensor can be had.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use burn::backend::flex::FlexTensor;

use super::matrix::Real;
use crate::Error;

/// The tensor behind the slices: kept alive, neither read nor written through this.
struct SharedTensor(FlexTensor);

/// Exclusive access to some elements of a tensor.
pub(super) struct DisjointSlice<T> {
    data: *mut T,
    len: usize,
    _tensor: Arc<SharedTensor>,
}

// SAFETY: a slice is the only way to its elements, as a `&mut [T]` would be; the shared tensor is never touched but to
// drop it.
unsafe impl<T: Send> Send for DisjointSlice<T> {}

impl<T> Deref for DisjointSlice<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the elements are initialised, kept alive by the shared tensor, and this slice's alone.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T> DerefMut for DisjointSlice<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

/// What remains when slices are cut: gives the tensor back.
pub(super) struct SplitTensor(Arc<SharedTensor>);

/// Cuts a tensor with no other owner into slices of these lengths, one behind the other.
pub(super) fn disjoint_slices<T: Real>(
    mut tensor: FlexTensor,
    lens: impl Iterator<Item = usize>,
) -> (SplitTensor, Vec<DisjointSlice<T>>) {
    // Elements live on the heap: they stay where they are when the tensor moves.
    let storage = tensor.storage_mut::<T>();
    let (start, mut left) = (storage.as_mut_ptr(), storage.len());
    let shared = Arc::new(SharedTensor(tensor));
    let mut data = start;
    let slices = lens.map(|len| {
        let len = len.min(left);
        let slice = DisjointSlice { data, len, _tensor: shared.clone() };
        left -= len;
        // SAFETY: there are `len` more elements.
        data = unsafe { data.add(len) };
        slice
    });
    let slices = slices.collect();
    (SplitTensor(shared), slices)
}

impl SplitTensor {
    /// The tensor, once all slices are gone.
    ///
    /// # Errors
    /// If one is not.
    pub fn tensor(self) -> Result<FlexTensor, Error> {
        let still = |_| Error::invalid("a sharded product", "a part of the result is still on its way");
        Arc::try_unwrap(self.0).map(|shared| shared.0).map_err(still)
    }
}
