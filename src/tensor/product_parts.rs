//! Products in parts that threads make by themselves. That takes less than `gemm`'s own threads, which go through one
//! product together: nobody waits for others within a product, and few rows are shared out as well.

use std::ops::Range;

use rayon::prelude::*;

use super::product::{Multiplied, Product, UNIT, Way, spans};

/// Multiplications of a part that are worth the way to another thread.
const LEAST: usize = 1 << 20;
/// Parts of a product for each thread, so that one that is held up leaves some to the others; of several products,
/// whose parts are of unlike sizes, twice as many.
const OF_THREAD: usize = 2;
/// Parts of fewer elements are not halved: of a few hundred `gemm` would add up in another order.
const ELEMENTS: usize = 4096;

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
    parts((all / number).max(LEAST)).collect::<Vec<P>>().into_par_iter().for_each(run);
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
        if of_part[longer] <= UNIT || of_part[0] * of_part[1] < ELEMENTS {
            break;
        }
        of_part[longer] = of_part[longer].div_ceil(2).next_multiple_of(UNIT);
    }
    let [high, wide] = of_part;
    spans(rows, high)
        .flat_map(move |rows| spans(columns, wide).map(move |columns| ProductPart { rows: rows.clone(), columns }))
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
        let whole = WholeProduct { product: self, way: self.way(), out };
        run_parts(self.work(), false, parts, |part: ProductPart| whole.write(&part, row_stride));
    }
}

/// A product and where it is made.
struct WholeProduct<'a, T> {
    product: &'a Product<T>,
    way: Way,
    out: *mut T,
}

// SAFETY: factors are read, and each part writes elements of its own.
unsafe impl<T: Sync> Sync for WholeProduct<'_, T> {}

impl<T: Multiplied> WholeProduct<'_, T> {
    fn write(&self, part: &ProductPart, row_stride: usize) {
        let out = self.out.wrapping_add(part.rows.start * row_stride + part.columns.start);
        // SAFETY: as the caller of `write_on_threads` says; parts have no element in common.
        unsafe { self.product.part(part).write(self.way, out, row_stride) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use burn::tensor::f16;

    use super::super::product::Strided;
    use super::*;

    fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
    }

    #[test]
    fn parts_are_all_of_a_product_once() {
        for [rows, columns] in [[1, 1], [16, 1536], [1024, 256], [100, 37], [7, 3000], [0, 5], [5, 0]] {
            for most in [usize::MAX, 1 << 20, 1 << 14, 1] {
                let mut times = vec![0; rows * columns];
                for part in product_parts([rows, columns], 64, most) {
                    assert!(!part.rows.is_empty() && !part.columns.is_empty());
                    assert!(part.rows.start.is_multiple_of(UNIT) && part.columns.start.is_multiple_of(UNIT));
                    for row in part.rows.clone() {
                        part.columns.clone().for_each(|column| times[row * columns + column] += 1);
                    }
                    // Each side is up to a unit longer than what is small enough.
                    assert!(part.rows.len() * part.columns.len() <= 4 * ELEMENTS.max(most / 64));
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

    /// All parts run, and are as large as is worth the way to another thread.
    #[test]
    fn few_multiplications_are_not_shared_out() {
        let most = |threads, all, several| {
            on_threads(threads, || {
                let (mut most, ran) = (0, AtomicUsize::new(0));
                let parts = |told| {
                    most = told;
                    0..100
                };
                run_parts(all, several, parts, |part| _ = ran.fetch_add(1 << (part % 50), Ordering::Relaxed));
                assert_eq!(ran.into_inner(), 2 * ((1 << 50) - 1));
                most
            })
        };
        assert_eq!(most(1, usize::MAX, true), usize::MAX);
        assert_eq!(most(3, 2 * LEAST - 1, false), usize::MAX);
        assert_eq!([false, true].map(|several| most(3, 2 * LEAST, several)), [LEAST; 2]);
        assert_eq!([false, true].map(|several| most(3, 120 * LEAST, several)), [20 * LEAST, 10 * LEAST]);
    }

    /// Into rows with something between them, and onto what is there: to the bit what one thread makes, on any number
    /// of them. The last five are made by panels or column by column where the right factor is turned.
    fn compare<T: Multiplied + Send + bytemuck::Pod>(of: fn(f32) -> T) {
        let few = [[131, 129, 130], [1, 700, 3001], [128, 768, 128], [33, 1500, 64], [2100, 513, 17], [15, 5000, 256]];
        let many = [[17, 513, 257], [3, 1800, 2938], [517, 256, 19], [200, 512, 1025], [321, 1536, 450]];
        for [rows, inner, columns] in few.into_iter().chain(many) {
            for (left_turned, right_turned, adds) in
                [(false, false, false), (true, false, true), (false, true, false), (true, true, true)]
            {
                let numbers = |len: usize, salt: f32| -> Vec<T> {
                    (0..len).map(|place| of(((place as f32 + salt) * 12.9898).sin())).collect()
                };
                let (left, right) = (numbers(rows * inner, 0.5), numbers(inner * columns, 0.25));
                let row_stride = columns + 3;
                let before = numbers(rows * row_stride, 0.75);
                let product = || {
                    let strided = |data: &[T], [rows, columns]: [usize; 2], turned| {
                        let by_rows = Strided { first: data.as_ptr(), row: columns as isize, column: 1 };
                        if turned { Strided { row: 1, column: rows as isize, ..by_rows } } else { by_rows }
                    };
                    let (left, right) =
                        (strided(&left, [rows, inner], left_turned), strided(&right, [inner, columns], right_turned));
                    Product { rows, inner, columns, left, right, adds }
                };
                let mut alone = before.clone();
                // SAFETY: all of them are that large.
                unsafe { product().write(product().way(), alone.as_mut_ptr(), row_stride) };
                let between = |place: &usize| place % row_stride >= columns;
                let bits = |elements: &[T], place: usize| bytemuck::bytes_of(&elements[place]).to_vec();
                assert!((0..alone.len()).filter(between).all(|place| bits(&alone, place) == bits(&before, place)));
                for threads in [1, 2, 3, 5, 8] {
                    let mut out = before.clone();
                    // SAFETY: the same.
                    on_threads(threads, || unsafe { product().write_on_threads(out.as_mut_ptr(), row_stride) });
                    let apart = (0..out.len()).find(|place| bits(&out, *place) != bits(&alone, *place));
                    assert_eq!(
                        apart, None,
                        "{rows} {inner} {columns} {left_turned} {right_turned} {adds} on {threads} threads"
                    );
                }
            }
        }
    }

    #[test]
    fn threads_make_the_bits_of_the_whole_product() {
        compare::<f32>(|number| number);
        compare::<f64>(f64::from);
        compare::<f16>(f16::from_f32);
    }
}
