//! Products of matrices in host memory: Flex's, by the same `gemm` and split over threads by the same rules, but for
//! where the result goes and that few rows by a matrix that lies transposed (the gradient of an activation by a weight)
//! are multiplied as they lie. Flex has that matrix packed first, which for 32 rows takes as long as all the rest.

use std::mem::MaybeUninit;
use std::ops::{Add, Range};
use std::sync::Arc;

use burn::tensor::f16;

use super::Pool;

/// Flex's: from so many multiplications on several threads make one product.
pub(crate) const SPLIT_FROM: usize = 192 * 192 * 192;
/// Rows for which a transposed matrix is not packed, if it has so many elements.
const FEW_ROWS: Range<usize> = 2..65;
const MANY_ELEMENTS: usize = 64 * 1024;
/// Elements of a row that are transposed at once: with as many of all rows they fit into the first cache.
const TILE: usize = 64;

/// The floats that are multiplied. (Those of bfloat16 are, in `f32`.)
pub(crate) trait Multiplied: Copy + Add<Output = Self> + 'static {
    const ZERO: Self;
    const ONE: Self;
    /// Whether `gemm` can read a matrix as it lies. Elements of 16 bits it makes wider while it packs them.
    const READ_AS_THEY_LIE: bool;
}

macro_rules! multiplied {
    ($($float:ty: $zero:expr, $one:expr, $read:expr);*) => {$(
        impl Multiplied for $float {
            const ZERO: Self = $zero;
            const ONE: Self = $one;
            const READ_AS_THEY_LIE: bool = $read;
        }
    )*};
}
multiplied!(f32: 0.0, 1.0, true; f64: 0.0, 1.0, true; f16: f16::ZERO, f16::ONE, false);

/// A matrix as it lies in memory: its first element, and how far apart neighbours are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strided<T> {
    pub(crate) first: *const T,
    pub(crate) row: isize,
    pub(crate) column: isize,
}

/// One product: of `rows x inner` by `inner x columns`.
#[derive(Debug)]
pub(crate) struct Product<'a, T> {
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    pub(crate) columns: usize,
    pub(crate) left: Strided<T>,
    pub(crate) right: Strided<T>,
    /// Whether it is added to what is there.
    pub(crate) adds: bool,
    /// What is made on the way is made in.
    pub(crate) pool: &'a Arc<Pool>,
}

impl<T: Multiplied> Product<'_, T> {
    /// The multiplications that it takes.
    pub(crate) fn work(&self) -> usize {
        self.rows.saturating_mul(self.columns).saturating_mul(self.inner)
    }

    /// Writes every element, or adds to it, in rows that are so far apart. Without additions nothing is read there.
    ///
    /// # Safety
    /// The factors have their elements. `out` has a place for each element that nobody else has, and there is something
    /// in it if that is added to.
    pub(crate) unsafe fn write(&self, out: *mut T, row_stride: usize, parallelism: gemm::Parallelism) {
        let Self { rows, inner, columns, ref right, pool, .. } = *self;
        if rows * columns == 0 {
            return;
        }
        let is_transposed = right.row == 1 && right.column.unsigned_abs() > 1;
        let few = FEW_ROWS.contains(&rows) && columns * inner >= MANY_ELEMENTS;
        if !(is_transposed && few && T::READ_AS_THEY_LIE) {
            // SAFETY: as the caller says.
            return unsafe { self.gemm(out, [row_stride as isize, 1], self.adds, parallelism) };
        }
        // Column by column, so that `gemm` reads the matrix along its memory.
        let room = pool.room(rows * columns * size_of::<T>());
        let by_column = room.pointer().cast::<MaybeUninit<T>>();
        // SAFETY: the room has so many elements, for which it is aligned, and nothing else refers to it; they are all
        // written before they are read.
        unsafe {
            self.gemm(by_column.cast(), [1, rows as isize], false, parallelism);
            for begin in (0..columns).step_by(TILE) {
                for row in 0..rows {
                    for column in begin..columns.min(begin + TILE) {
                        let (value, place) = (*by_column.add(column * rows + row), out.add(row * row_stride + column));
                        let value = value.assume_init();
                        *place = if self.adds { *place + value } else { value };
                    }
                }
            }
        }
    }

    /// As [`write`](Self::write), to places that are so far apart along rows and columns.
    ///
    /// # Safety
    /// That of `write`.
    unsafe fn gemm(&self, out: *mut T, [row, column]: [isize; 2], adds: bool, parallelism: gemm::Parallelism) {
        let Self { rows, inner, columns, ref left, ref right, .. } = *self;
        // SAFETY: as the caller says.
        unsafe {
            gemm::gemm(
                rows,
                columns,
                inner,
                out,
                column,
                row,
                adds,
                left.first,
                left.column,
                left.row,
                right.first,
                right.column,
                right.row,
                if adds { T::ONE } else { T::ZERO },
                T::ONE,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}
