//! Parts of a matrix that lies transposed, put the right way round: panels that stay in the caches.

use pulp::NullaryFnOnce;

use super::product::Strided;
use super::vectors::vectorized;

/// Rows and columns that are turned at once: they are in registers.
const BLOCK: usize = 4;

/// A panel, row by row: its first element, how many rows and columns it has, and how far apart rows are.
#[derive(Clone, Copy)]
pub(super) struct Panel<T> {
    pub(super) first: *mut T,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) apart: usize,
}

/// A panel and what it is filled with.
struct Turning<T> {
    panel: Panel<T>,
    /// The first element of the first column, and how far apart columns are.
    source: *const T,
    apart: isize,
}

impl<T: Copy> Panel<T> {
    /// Fills it with the elements of a matrix of its rows and columns, whose columns have one element behind the other.
    ///
    /// # Safety
    /// The matrix has these elements, and there is room for them in the panel, which nobody else has.
    pub(super) unsafe fn fill(self, of: Strided<T>) {
        vectorized(Turning { panel: self, source: of.first, apart: of.column });
    }
}

impl<T: Copy> NullaryFnOnce for Turning<T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Panel { first, rows, columns, apart } = self.panel;
        let (whole_rows, whole_columns) = (rows / BLOCK * BLOCK, columns / BLOCK * BLOCK);
        for row in (0..whole_rows).step_by(BLOCK) {
            for column in (0..whole_columns).step_by(BLOCK) {
                // SAFETY: a block of both, as the caller of `fill` says.
                unsafe {
                    let read = |place: usize| {
                        let at = self.source.offset((column + place) as isize * self.apart).add(row);
                        at.cast::<[T; BLOCK]>().read_unaligned()
                    };
                    let block: [[T; BLOCK]; BLOCK] = [read(0), read(1), read(2), read(3)];
                    for (place, line) in turned(block).into_iter().enumerate() {
                        let at = first.add((row + place) * apart + column);
                        at.cast::<[T; BLOCK]>().write_unaligned(line);
                    }
                }
            }
        }
        for row in 0..rows {
            let from = if row < whole_rows { whole_columns } else { 0 };
            for column in from..columns {
                // SAFETY: one element of both.
                unsafe {
                    *first.add(row * apart + column) = *self.source.offset(column as isize * self.apart).add(row)
                };
            }
        }
    }
}

#[inline(always)]
fn turned<T: Copy>([a, b, c, d]: [[T; BLOCK]; BLOCK]) -> [[T; BLOCK]; BLOCK] {
    [[a[0], b[0], c[0], d[0]], [a[1], b[1], c[1], d[1]], [a[2], b[2], c[2], d[2]], [a[3], b[3], c[3], d[3]]]
}
