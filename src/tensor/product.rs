//! Products of matrices in host memory, on one thread; several make [parts](super::product_parts()). They are Flex's,
//! by the same `gemm`, but for where the result goes and for a matrix that lies transposed (the weight, in the gradient
//! of an activation). Flex has it packed, element by element from as many lines of memory as a panel of `gemm` is wide:
//! for 32 rows that takes as long as all the rest, and for 1024 a tenth of it, where the lines clash in the first
//! cache. Here few rows are multiplied without packing, and for others such a matrix is put the right way round first,
//! in [panels](Panel) that stay in the caches.
//!
//! Whatever parts a product is made in, its elements are the same to the last bit: ranks with other numbers of threads
//! compute the same. So [which way](Way) a part is made depends on the whole product, `gemm` adds up as many terms at
//! once as it does for any size, and no part is so small that it has another order for it.

use std::cell::Cell;
use std::ops::{Add, Range};

use burn::tensor::f16;

use super::panel::Panel;

/// Rows for which a transposed matrix is not packed, if it has so many elements.
const FEW_ROWS: Range<usize> = 2..193;
const MANY_ELEMENTS: usize = 64 * 1024;
/// Bytes: of columns that begin so far apart, or a multiple of it, the first cache has no room for as many lines as
/// `gemm` packs at once.
const CLASHING: usize = 2048;
/// The most terms that are added up at once. Of more than that, how many `gemm` takes depends on rows and columns.
const DEPTH: usize = 512;
/// Elements of a panel of a transposed matrix, but for some more columns: as many as fit into the second cache.
const OF_PANEL: usize = 256 * 1024;
/// Of fewer rows or columns than this `gemm` may add up in another order.
pub(super) const UNIT: usize = 16;
thread_local! {
    /// A panel's memory, which stays with the thread: that of steps is for what is there for longer.
    static PANEL: Cell<Vec<u64>> = const { Cell::new(Vec::new()) };
}

/// Gives work the memory of a panel of so many elements.
fn with_panel<T>(elements: usize, work: impl FnOnce(*mut T)) {
    let mut memory = PANEL.take();
    let words = (elements * size_of::<T>()).div_ceil(size_of::<u64>());
    memory.resize(memory.len().max(words), 0);
    work(memory.as_mut_ptr().cast());
    PANEL.set(memory);
}

/// Elements of a row that are transposed at once: with as many of all rows they fit into the first cache.
const TILE: usize = 64;

/// The floats that are multiplied. (Those of bfloat16 are, in `f32`.)
pub(crate) trait Multiplied: Copy + Sync + Add<Output = Self> + 'static {
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

impl<T> Strided<T> {
    /// With rows and columns swapped.
    pub(crate) fn turned(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }

    /// The elements of one that lies column by column, row by row at `first`.
    ///
    /// # Safety
    /// The matrix has these rows and columns, and there is room for as many elements, which nobody else has.
    pub(crate) unsafe fn turned_to(self, first: *mut T, [rows, columns]: [usize; 2]) -> Self
    where
        T: Copy,
    {
        // SAFETY: as the caller says.
        unsafe { Panel { first, rows, columns, apart: columns }.fill(self) };
        Self { first: first.cast_const(), row: columns as isize, column: 1 }
    }

    /// From a row on.
    pub(crate) fn below(self, row: usize) -> Self {
        Self { first: self.first.wrapping_offset(row as isize * self.row), ..self }
    }
}

/// Ranges of about so many that are all of `whole`, in order, as large as each other but for less than two [`UNIT`]s,
/// at whose multiples they begin; none is shorter than one, if `whole` is not.
pub(super) fn spans(whole: usize, size: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let units = whole / UNIT;
    let number = whole.div_ceil(size.max(1)).min(units).max(usize::from(whole > 0));
    let begin = move |place: usize| if place == number { whole } else { (place * units + number / 2) / number * UNIT };
    (0..number).map(move |place| begin(place)..begin(place + 1))
}

/// How a product is made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Way {
    /// By `gemm` alone.
    AsItLies,
    /// Column by column, so that `gemm` reads the right matrix along its memory.
    ByColumns,
    /// In [panels](Panel) of the right matrix, which lies column by column.
    ByPanels,
}

/// One product: of `rows x inner` by `inner x columns`.
#[derive(Debug)]
pub(crate) struct Product<T> {
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    pub(crate) columns: usize,
    pub(crate) left: Strided<T>,
    pub(crate) right: Strided<T>,
    /// Whether it is added to what is there.
    pub(crate) adds: bool,
}

impl<T: Multiplied> Product<T> {
    /// The multiplications that it takes.
    pub(crate) fn work(&self) -> usize {
        self.rows.saturating_mul(self.columns).saturating_mul(self.inner)
    }

    /// The way in which it takes the least time.
    pub(crate) fn way(&self) -> Way {
        let Self { rows, inner, columns, ref right, .. } = *self;
        let is_transposed = right.row == 1 && right.column.unsigned_abs() > 1;
        let is_packed_slowly = is_transposed && columns * inner >= MANY_ELEMENTS && T::READ_AS_THEY_LIE;
        let clashes = (right.column.unsigned_abs() * size_of::<T>()).is_multiple_of(CLASHING);
        match is_packed_slowly {
            true if clashes && rows >= FEW_ROWS.end => Way::ByPanels,
            true if FEW_ROWS.contains(&rows) => Way::ByColumns,
            _ => Way::AsItLies,
        }
    }

    /// Writes every element, or adds to it, on this thread, in rows that are so far apart. Without additions nothing is
    /// read there. `way` is that of the whole product, of which this may be a part.
    ///
    /// # Safety
    /// The factors have their elements. `out` has a place for each element that nobody else has, and there is something
    /// in it if that is added to.
    pub(crate) unsafe fn write(&self, way: Way, out: *mut T, row_stride: usize) {
        if self.rows * self.columns == 0 {
            return;
        }
        // SAFETY: as the caller says.
        unsafe {
            match way {
                Way::AsItLies => self.gemm(out, [row_stride as isize, 1], self.adds),
                Way::ByColumns => self.by_columns(out, row_stride),
                Way::ByPanels => self.by_panels(out, row_stride),
            }
        }
    }

    /// [`Way::ByColumns`].
    ///
    /// # Safety
    /// That of `write`.
    unsafe fn by_columns(&self, out: *mut T, row_stride: usize) {
        let Self { rows, inner, columns, left, right, adds } = *self;
        let width = (OF_PANEL / rows).next_multiple_of(UNIT);
        with_panel(rows * columns.min(width + UNIT), |first: *mut T| {
            for span in spans(columns, width) {
                let (begin, columns) = (span.start, span.len());
                let right = right.turned().below(begin).turned();
                let product = Product { rows, inner, columns, left, right, adds: false };
                let by_column = Strided { first: first.cast_const(), row: 1, column: rows as isize };
                // SAFETY: the memory has so many elements, for which it is aligned, and nothing else refers to it; they
                // are all written before they are read. The rest is as the caller says, of some columns.
                unsafe {
                    let out = out.add(begin);
                    product.gemm(first, [1, rows as isize], false);
                    if !adds {
                        let whole = Panel { first: out, rows, columns, apart: row_stride };
                        whole.fill(by_column);
                        continue;
                    }
                    for begin in (0..columns).step_by(TILE) {
                        for row in 0..rows {
                            for column in begin..columns.min(begin + TILE) {
                                let place = out.add(row * row_stride + column);
                                *place = *place + *first.add(column * rows + row);
                            }
                        }
                    }
                }
            }
        });
    }

    /// [`Way::ByPanels`].
    ///
    /// # Safety
    /// That of `write`.
    unsafe fn by_panels(&self, out: *mut T, row_stride: usize) {
        let Self { rows, inner, columns, left, right, adds } = *self;
        let depth = DEPTH.min(inner);
        let width = (OF_PANEL / depth).next_multiple_of(UNIT);
        with_panel(depth * columns.min(width + UNIT), |first: *mut T| {
            for span in spans(columns, width) {
                for row in (0..inner).step_by(depth) {
                    let (column, columns) = (span.start, span.len());
                    let panel = Panel { first, rows: depth.min(inner - row), columns, apart: columns };
                    let product = Product {
                        rows,
                        inner: panel.rows,
                        columns: panel.columns,
                        left: left.turned().below(row).turned(),
                        right: Strided { first: first.cast_const(), row: panel.columns as isize, column: 1 },
                        adds: adds || row > 0,
                    };
                    // SAFETY: the memory has the elements of a panel, for which it is aligned, and nothing else refers
                    // to it. The rest is as the caller says, of a part of the matrix.
                    unsafe {
                        panel.fill(right.below(row).turned().below(column).turned());
                        product.gemm(out.add(column), [row_stride as isize, 1], product.adds);
                    }
                }
            }
        });
    }

    /// As [`write`](Self::write), to a matrix as it lies.
    ///
    /// # Safety
    /// That of `write`.
    pub(crate) unsafe fn write_to(&self, out: Strided<T>) {
        // SAFETY: as the caller says.
        unsafe { self.gemm(out.first.cast_mut(), [out.row, out.column], self.adds) }
    }

    /// To places that are so far apart along rows and columns.
    ///
    /// # Safety
    /// That of `write`.
    unsafe fn gemm(&self, out: *mut T, [row, column]: [isize; 2], adds: bool) {
        let Self { rows, inner, columns, left, right, .. } = *self;
        // Of nothing it writes zeros.
        for begin in (0..inner.max(1)).step_by(DEPTH) {
            let (left, right) = (left.turned().below(begin).turned(), right.below(begin));
            let adds = adds || begin > 0;
            // SAFETY: as the caller says, of some columns of the left matrix and the same rows of the right one.
            unsafe {
                gemm::gemm(
                    rows,
                    columns,
                    DEPTH.min(inner - begin),
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
                    gemm::Parallelism::None,
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random, between -1 and 1.
    fn numbers(len: usize, salt: f32) -> Vec<f32> {
        (0..len).map(|place| ((place as f32 + salt) * 12.9898).sin()).collect()
    }

    /// Into rows with something between them, and onto what is there, which a product that does not add never reads.
    #[test]
    fn products_are_written_and_added_where_they_are_wanted() {
        let (columns, row_stride) = (251, 260);
        let few = [(1, true, true), (7, true, false), (7, true, true), (64, true, true), (7, false, true)];
        let few = few.into_iter().map(|(rows, transposed, adds)| (rows, 271, transposed, adds));
        // By panels, of which there are two.
        let many = [(193, 768, true, true), (193, 768, true, false), (193, 271, true, true)];
        for (rows, inner, transposed, adds) in few.chain(many) {
            let (left, right) = (numbers(rows * inner, 0.5), numbers(inner * columns, 0.25));
            let [row, column] = if transposed { [1, inner] } else { [columns, 1] };
            let strided = |data: &[f32], [row, column]: [usize; 2]| Strided {
                first: data.as_ptr(),
                row: row as isize,
                column: column as isize,
            };
            let (l, r) = (strided(&left, [inner, 1]), strided(&right, [row, column]));
            let product = Product { rows, inner, columns, left: l, right: r, adds };
            let before = if adds { numbers(rows * row_stride, 0.75) } else { vec![f32::NAN; rows * row_stride] };
            let mut out = before.clone();
            // SAFETY: all of them are that large.
            unsafe { product.write(product.way(), out.as_mut_ptr(), row_stride) };
            for place in 0..rows * row_stride {
                let (at, to) = (place / row_stride, place % row_stride);
                if to >= columns {
                    assert_eq!(out[place].to_bits(), before[place].to_bits(), "nothing is written between rows");
                    continue;
                }
                let terms =
                    (0..inner).map(|k| f64::from(left[at * inner + k]) * f64::from(right[k * row + to * column]));
                let expected = terms.sum::<f64>() + if adds { f64::from(before[place]) } else { 0.0 };
                let found = f64::from(out[place]);
                let bound = 1e-6 * (100.0 + expected.abs());
                assert!((found - expected).abs() <= bound, "{rows} {transposed} {adds}: {found} for {expected}");
            }
        }
    }
}
