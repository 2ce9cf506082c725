//! Products as they enter tiles: a right factor that lies transposed, as the keys of attention, is put the right way
//! round once for all tiles of its matrix. `gemm` would do that for each of them, element by element.

use burn::tensor::Element;
use bytemuck::Pod;

use super::super::multiply::Factor;
use crate::tensor::{Multiplied, Strided};

/// Of fewer rows nothing is put the right way round, which would take longer than to multiply.
const MANY_ROWS: usize = 8;

/// A product as it enters, of `rows x inner` by `inner x columns`.
pub(super) struct Enters<'a, T> {
    pub(super) left: Factor<'a, T>,
    pub(super) right: Factor<'a, T>,
    pub(super) rows: usize,
    pub(super) inner: usize,
    pub(super) columns: usize,
}

impl<T: Multiplied + Element + Pod> Enters<'_, T> {
    /// The elements of [`right`](Self::right) that need room.
    pub(super) fn turned(&self) -> usize {
        if self.rows < MANY_ROWS { 0 } else { self.inner * self.columns }
    }

    /// The right factor of one of the batch.
    ///
    /// # Safety
    /// There is room for the elements of [`turned`](Self::turned), which nobody else has.
    pub(super) unsafe fn right(&self, number: usize, batch: &[usize], room: *mut T) -> Strided<T> {
        let right = self.right.of(number, batch);
        if self.turned() == 0 || right.row != 1 || right.column == 1 {
            return right;
        }
        // SAFETY: the factor has these elements; the rest is as the caller says.
        unsafe { right.turned_to(room, [self.inner, self.columns]) }
    }
}
