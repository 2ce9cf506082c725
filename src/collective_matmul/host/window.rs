//! A tensor whose parts are worked on by different threads at the same time.
//!
//! While one part of a result travels, the next is computed into the same buffer. A [`Window`] is a part that one thread has
//! to itself: windows of one tensor are cut once, so they don't overlap, and each keeps the buffer alive. When all are
//! dropped, and no sooner, the tensor can be had.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use burn::backend::flex::FlexTensor;

use super::matrix::Real;
use crate::Error;

/// The tensor behind windows. Nobody reads or writes it through this.
struct Frame(FlexTensor);

/// The right to read and write some elements of a tensor that nobody else looks at.
pub(super) struct Window<T> {
    data: *mut T,
    len: usize,
    _frame: Arc<Frame>,
}

// SAFETY: a window is the only way to its elements, as a `&mut [T]` would be; the frame is never touched but to drop it.
unsafe impl<T: Send> Send for Window<T> {}

impl<T> Deref for Window<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the elements are initialised, kept alive by the frame, and this window's alone.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T> DerefMut for Window<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

/// What remains when windows are cut: gives the tensor back.
pub(super) struct Framed(Arc<Frame>);

/// Cuts a tensor that nobody else holds into windows of these lengths, one behind the other.
pub(super) fn windows<T: Real>(mut tensor: FlexTensor, lens: impl Iterator<Item = usize>) -> (Framed, Vec<Window<T>>) {
    // Elements live on the heap: they stay where they are when the tensor moves.
    let storage = tensor.storage_mut::<T>();
    let (start, mut left) = (storage.as_mut_ptr(), storage.len());
    let frame = Arc::new(Frame(tensor));
    let mut data = start;
    let windows = lens.map(|len| {
        let len = len.min(left);
        let window = Window { data, len, _frame: frame.clone() };
        left -= len;
        // SAFETY: there are `len` more elements.
        data = unsafe { data.add(len) };
        window
    });
    let windows = windows.collect();
    (Framed(frame), windows)
}

impl Framed {
    /// The tensor, once all windows are gone.
    ///
    /// # Errors
    /// If one is not.
    pub fn tensor(self) -> Result<FlexTensor, Error> {
        let still = |_| Error::invalid("a sharded product", "a part of the result is still on its way");
        Arc::try_unwrap(self.0).map(|frame| frame.0).map_err(still)
    }
}
