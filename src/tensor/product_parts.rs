//! Products in parts that threads make by themselves. That takes less than `gemm`'s own threads, which go through one
//! product together: nobody waits for others within a product, and few rows are shared out as well.

use std::ops::Range;

use rayon::prelude::*;

use super::product::{Multiplied, Product};

/// Multiplications of a part that are worth the way to another thread.
const LEAST: usize = 1 << 20;
/// Parts of a product for each thread, so that one that is held up leaves some to the others; of several products,
/// whose parts are of unlike sizes, twice as many.
const OF_THREAD: usize = 2;
/// Rows or columns of a part are a multiple of this, but for the last.
const UNIT: usize = 16;

/// Some rows and columns of a product.
#[derive(Debug, Clone)]
pub(crate) struct ProductPart {
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
}

/// Runs all parts of one product, or of several, which take so many multiplications in all: on the threads of this
/// rank, if that is worth it. `parts` is told the most multiplications of a part.
pub(crate) fn run_parts<P, I>(all: usize, several: bool, parts: impl FnOnce(usize) -> I, run: impl Fn(P) + Send + Sync)
where
    P: Send,
    I: Iterator<Item = P>,
{
    let threads = rayon::current_num_threads();
    if threads == 1 || all < 2 * LEAST {
        return parts(usize::MAX).for_each(run);
    }
    let number = if several { 2 * OF_THREAD * threads } else { OF_THREAD * threads };
    let parts: Vec<P> = parts((all / number).max(LEAST)).collect();
    // Small ones some at a time.
    let together = parts.len().div_ceil(2 * number);
    parts.into_par_iter().with_min_len(together).for_each(run);
}

/// The parts of a product of so many rows and columns: their longer side is halved until none takes more than `most`
/// multiplications.
pub(crate) fn product_parts(
    [rows, columns]: [usize; 2],
    inner: usize,
    most: usize,
) -> impl Iterator<Item = ProductPart> + Clone {
    let mut of_part = [rows, columns];
    while of_part.iter().fold(inner, |all, size| all.saturating_mul(*size)) > most {
        let longer = usize::from(of_part[1] > of_part[0]);
        if of_part[longer] <= UNIT {
            break;
        }
        of_part[longer] = of_part[longer].div_ceil(2).next_multiple_of(UNIT);
    }
    let [high, wide] = of_part;
    let cut = |whole: usize, size: usize| (0..whole).step_by(size.max(1)).map(move |from| from..whole.min(from + size));
    cut(rows, high)
        .flat_map(move |rows| cut(columns, wide).map(move |columns| ProductPart { rows: rows.clone(), columns }))
}

impl<T: Multiplied> Product<T> {
    /// That of some of its rows and columns.
    pub(crate) fn part(&self, part: &ProductPart) -> Self {
        let Self { inner, left, right, adds, .. } = *self;
        Self {
            rows: part.rows.len(),
            inner,
            columns: part.columns.len(),
            left: left.below(part.rows.start),
            right: right.turned().below(part.columns.start).turned(),
            adds,
        }
    }

    /// As [`write`](Self::write), on the threads of this rank if it is large enough.
    ///
    /// # Safety
    /// That of `write`.
    pub(crate) unsafe fn write_on_threads(&self, out: *mut T, row_stride: usize) {
        let Self { rows, columns, inner, .. } = *self;
        let parts = |most| product_parts([rows, columns], inner, most);
        let whole = WholeProduct { product: self, out };
        run_parts(self.work(), false, parts, |part: ProductPart| whole.write(&part, row_stride));
    }
}

/// A product and where it is made.
struct WholeProduct<'a, T> {
    product: &'a Product<T>,
    out: *mut T,
}

// SAFETY: factors are read, and each part writes elements of its own.
unsafe impl<T: Sync> Sync for WholeProduct<'_, T> {}

impl<T: Multiplied> WholeProduct<'_, T> {
    fn write(&self, part: &ProductPart, row_stride: usize) {
        let out = self.out.wrapping_add(part.rows.start * row_stride + part.columns.start);
        // SAFETY: as the caller of `write_on_threads` says; parts have no element in common.
        unsafe { self.product.part(part).write(out, row_stride) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_all_of_a_product_once() {
        for [rows, columns] in [[1, 1], [16, 1536], [1024, 256], [100, 37], [7, 3000], [0, 5], [5, 0]] {
            for most in [usize::MAX, 1 << 20, 1 << 14, 1] {
                let mut times = vec![0; rows * columns];
                for part in product_parts([rows, columns], 64, most) {
                    assert!(!part.rows.is_empty() && !part.columns.is_empty());
                    for row in part.rows.clone() {
                        part.columns.clone().for_each(|column| times[row * columns + column] += 1);
                    }
                    let small = part.rows.len().max(part.columns.len()) <= UNIT;
                    assert!(small || part.rows.len() * part.columns.len() * 64 <= most);
                }
                assert!(times.iter().all(|times| *times == 1), "{rows} {columns} {most}");
            }
        }
    }

    #[test]
    fn the_longer_side_is_cut() {
        let sizes = |rows, columns, most| {
            let parts: Vec<_> = product_parts([rows, columns], 1, most).collect();
            (parts.len(), [parts[0].rows.len(), parts[0].columns.len()])
        };
        assert_eq!(sizes(1024, 256, 1024 * 64), (4, [256, 256]));
        assert_eq!(sizes(16, 1536, 16 * 384), (4, [16, 384]));
        assert_eq!(sizes(64, 64, 64 * 64), (1, [64, 64]));
    }
}
