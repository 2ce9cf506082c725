//! Products of tensors in host memory, several at a time and as sums of some, into memory that was used before and that
//! nobody zeroes first. On several threads they are made in [parts](product_parts()), of all of them together.

use std::ops::Range;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{DType, Element, Shape};

use crate::tensor::{Multiplied, Product, ProductPart, Room, Strided, product_parts, run_parts};

/// Whether [`multiply`] knows a dtype.
pub(crate) fn multiplies(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64)
}

/// A product of tensors, or the sum of several, and where it is made.
pub(crate) struct WantedProduct<'a> {
    /// Factors of one dtype of those that [`multiplies`].
    pub(crate) factors: Vec<[&'a FlexTensor; 2]>,
    pub(crate) dims: &'a [usize],
    pub(crate) room: Room,
}

/// Products, each of the dims it has.
///
/// # Panics
/// If dims do not fit each other, which burn has checked when the products were recorded.
pub(crate) fn multiply(sums: Vec<WantedProduct<'_>>, dtype: DType) -> Vec<FlexTensor> {
    let multiply = if dtype == DType::F64 { multiply_as::<f64> } else { multiply_as::<f32> };
    multiply(sums)
}

/// A factor as it lies in memory.
pub(super) struct Factor<'a, T> {
    data: &'a [T],
    /// The place of its first element.
    start: isize,
    /// Along each dim of the batch, 0 where it is broadcast.
    batch: Vec<isize>,
    row: isize,
    column: isize,
}

impl<'a, T: Element + bytemuck::Pod> Factor<'a, T> {
    /// One of `rows` and `columns`, for each of a batch.
    pub(super) fn new(tensor: &'a FlexTensor, batch: &[usize], [rows, columns]: [usize; 2]) -> Self {
        let (shape, strides) = (tensor.layout().shape().as_slice(), tensor.layout().strides());
        let (data, start) = (tensor.storage::<T>(), tensor.layout().start_offset() as isize);
        let [own_batch @ .., own_rows, own_columns] = shape else { panic!("a factor has rows and columns") };
        assert!([*own_rows, *own_columns] == [rows, columns] && own_batch.len() <= batch.len(), "dims fit");
        let missing = batch.len() - own_batch.len();
        let along = own_batch.iter().zip(&batch[missing..]).zip(strides).map(|((own, size), stride)| {
            assert!(own == size || *own == 1, "dims are broadcast");
            if own == size && *own > 1 { *stride } else { 0 }
        });
        let along = std::iter::repeat_n(0, missing).chain(along).collect();
        // No element that is read lies outside.
        let ends = shape.iter().zip(strides).map(|(size, stride)| (*size as isize - 1) * stride);
        let (first, last) = ends.fold((start, start), |(first, last), end| (first + end.min(0), last + end.max(0)));
        assert!(shape.contains(&0) || first >= 0 && last < data.len() as isize, "a tensor lies in its memory");
        Self { data, start, batch: along, row: strides[shape.len() - 2], column: strides[shape.len() - 1] }
    }

    /// One of a batch.
    pub(super) fn of(&self, number: usize, batch: &[usize]) -> Strided<T> {
        let offset = self.start + offset(number, batch, &self.batch);
        Strided { first: self.data.as_ptr().wrapping_offset(offset), row: self.row, column: self.column }
    }
}

/// Where one of a batch begins, if its neighbours along each dim are so far apart.
pub(super) fn offset(mut number: usize, batch: &[usize], strides: &[isize]) -> isize {
    let mut offset = 0;
    for (size, stride) in batch.iter().zip(strides).rev() {
        offset += (number % size) as isize * stride;
        number /= size;
    }
    offset
}

/// A product or a sum of products for each of a batch, and where the first begins.
struct ProductBatch<'a, T> {
    batch: &'a [usize],
    rows: usize,
    columns: usize,
    /// Left and right factors, and what they have in common.
    terms: Vec<(Factor<'a, T>, Factor<'a, T>, usize)>,
    out: *mut T,
}

// SAFETY: factors are read, and each part writes elements of its own.
unsafe impl<T: Sync> Sync for ProductBatch<'_, T> {}

impl<'a, T: Multiplied + Element + bytemuck::Pod> ProductBatch<'a, T> {
    fn new(factors: &[[&'a FlexTensor; 2]], dims: &'a [usize], room: &Room) -> Self {
        let [batch @ .., rows, columns] = dims else { panic!("a product has rows and columns") };
        let (rows, columns) = (*rows, *columns);
        let elements: usize = dims.iter().product();
        assert_eq!(room.bytes(), elements * size_of::<T>(), "a product has room for its elements");
        assert!(!factors.is_empty(), "there is a product");
        let term = |[left, right]: &[&'a FlexTensor; 2]| {
            let inner = left.layout().shape().last().copied().unwrap_or(0);
            (Factor::new(left, batch, [rows, inner]), Factor::new(right, batch, [inner, columns]), inner)
        };
        Self { batch, rows, columns, terms: factors.iter().map(term).collect(), out: room.pointer().cast() }
    }

    /// How many there are of the batch.
    fn number(&self) -> usize {
        self.batch.iter().product()
    }

    fn inner(&self) -> usize {
        self.terms.iter().map(|(_, _, inner)| inner).sum()
    }

    /// The multiplications of each.
    fn work(&self) -> usize {
        self.rows.saturating_mul(self.columns).saturating_mul(self.inner())
    }

    /// Writes a part of one of the batch.
    ///
    /// # Safety
    /// Nobody else has the elements of the part.
    unsafe fn write(&self, number: usize, part: &ProductPart) {
        let Self { batch, rows, columns, ref terms, out } = *self;
        for (place, (left, right, inner)) in terms.iter().enumerate() {
            let (left, right) = (left.of(number, batch), right.of(number, batch));
            let product = Product { rows, inner: *inner, columns, left, right, adds: place > 0 };
            // SAFETY: the factors were found to lie in their memory. The room has a place for each element, row by row,
            // with something in it if that is added to; those of the part are nobody else's.
            unsafe {
                let out = out.add(number * rows * columns + part.rows.start * columns + part.columns.start);
                product.part(part).write(product.way(), out, columns);
            }
        }
    }
}

fn multiply_as<T: Multiplied + Element + bytemuck::Pod>(sums: Vec<WantedProduct<'_>>) -> Vec<FlexTensor> {
    let batches: Vec<ProductBatch<'_, T>> =
        sums.iter().map(|sum| ProductBatch::new(&sum.factors, sum.dims, &sum.room)).collect();
    let all = batches.iter().map(|batch| batch.work().saturating_mul(batch.number()));
    let all = all.fold(0, usize::saturating_add);
    let parts = |most| {
        batches.iter().flat_map(move |batch| {
            let parts = product_parts([batch.rows, batch.columns], batch.inner(), most);
            // Small ones some at a time.
            let (number, together) = (batch.number(), (most / batch.work().max(1)).max(1));
            let numbers =
                (0..number).step_by(together).map(move |first| first..number.min(first.saturating_add(together)));
            numbers.flat_map(move |numbers| parts.clone().map(move |part| (batch, numbers.clone(), part)))
        })
    };
    run_parts(all, batches.len() > 1, parts, |(batch, numbers, part): (&ProductBatch<'_, T>, Range<usize>, _)| {
        // SAFETY: parts have no element in common.
        numbers.for_each(|number| unsafe { batch.write(number, &part) });
    });
    drop(batches);
    let made = |sum: WantedProduct<'_>| {
        let layout = Layout::contiguous(Shape::from(sum.dims.to_vec()));
        // SAFETY: the parts of a first product are all of its elements, which it has written.
        FlexTensor::new(unsafe { sum.room.filled() }, layout, T::dtype())
    };
    sums.into_iter().map(made).collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor, TensorData};

    use super::*;
    use crate::tensor::{PlainTensor, Pool};

    /// burn's product and this one, and whether the second was multiplied as it lies.
    fn compare<const D: usize>(what: &str, left: Tensor<D>, right: Tensor<D>) {
        let flex = |tensor: &Tensor<D>| PlainTensor::from(tensor.clone()).into_flex().unwrap();
        let expected = left.clone().matmul(right.clone());
        let pool = Pool::of_thread();
        // The second time in the memory of the first.
        for _ in 0..2 {
            let room = pool.room(expected.shape().num_elements() * expected.dtype().size());
            let (left, right, dims) = (flex(&left), flex(&right), expected.dims());
            let wanted = WantedProduct { factors: vec![[&left, &right]], dims: &dims, room };
            let found = multiply(vec![wanted], expected.dtype()).remove(0);
            let found: Tensor<D> = PlainTensor::from_flex(found).float().unwrap();
            let (expected, found) = (expected.clone().cast(DType::F64), found.cast(DType::F64));
            let (expected, found) = (expected.into_data(), found.into_data());
            assert_eq!(expected.shape(), found.shape(), "{what}");
            for (expected, found) in expected.iter::<f64>().zip(found.iter::<f64>()) {
                let same = (expected - found).abs() <= 1e-5 * (1.0 + expected.abs()) || expected == found;
                assert!(same || expected.is_nan() && found.is_nan(), "{what}: {expected} and {found}");
            }
        }
    }

    /// Numbers that look random, between -1 and 1.
    fn numbers<const D: usize>(dims: [usize; D], dtype: DType) -> Tensor<D> {
        let number = |place: usize| ((place as f32 + 0.5) * 12.9898).sin();
        let all = (0..dims.iter().product()).map(number).collect::<Vec<f32>>();
        Tensor::<D>::from_data(TensorData::new(all, dims), &Device::flex()).cast(dtype)
    }

    #[test]
    fn products_of_all_layouts() {
        for dtype in [DType::F32, DType::F64] {
            for (m, k, n) in [(1, 1, 1), (1, 70, 3), (3, 5, 7), (33, 2, 129), (17, 65, 1), (2, 0, 3), (0, 2, 3)] {
                for (left, right) in [(false, false), (true, false), (false, true), (true, true)] {
                    let of = |rows, columns, swapped| match swapped {
                        true => numbers([columns, rows], dtype).swap_dims(0, 1),
                        false => numbers([rows, columns], dtype),
                    };
                    compare(&format!("{m} {k} {n} {left} {right}"), of(m, k, left), of(k, n, right));
                }
            }
        }
    }

    #[test]
    fn few_rows_by_what_is_transposed() {
        for dtype in [DType::F32, DType::F64] {
            for rows in [2, 7, 64, 192, 193] {
                let right = numbers([271, 243], dtype).swap_dims(0, 1);
                compare(&format!("{rows} {dtype:?}"), numbers([rows, 243], dtype), right);
            }
            // Of more columns than there are at once.
            let right = numbers([3001, 24], dtype).swap_dims(0, 1);
            compare(&format!("wide {dtype:?}"), numbers([190, 24], dtype), right);
        }
    }

    /// Of one panel and of several, whole and cut.
    #[test]
    fn many_rows_by_what_is_transposed() {
        for dtype in [DType::F32, DType::F64] {
            for (rows, inner, columns) in [(193, 256, 256), (200, 1280, 603), (261, 512, 130), (199, 768, 1025)] {
                let right = numbers([columns, inner], dtype).swap_dims(0, 1);
                compare(&format!("{rows} {inner} {columns} {dtype:?}"), numbers([rows, inner], dtype), right.clone());
                let left = numbers([inner, rows], dtype).swap_dims(0, 1);
                compare(&format!("{rows} {inner} {columns} {dtype:?}, both"), left, right);
            }
        }
        let right = numbers([3, 300, 256], DType::F32).swap_dims(1, 2);
        compare("batch", numbers([3, 197, 256], DType::F32), right);
    }

    #[test]
    fn batches_views_and_broadcasts() {
        let dtype = DType::F32;
        compare("batch", numbers([3, 5, 7], dtype), numbers([3, 7, 4], dtype));
        compare("broadcast", numbers([3, 5, 7], dtype), numbers([1, 7, 4], dtype));
        compare("both", numbers([2, 1, 5, 7], dtype), numbers([1, 3, 7, 4], dtype));
        compare("large", numbers([6, 64, 70], dtype), numbers([6, 70, 90], dtype));
        let heads = |salt: usize| numbers([2, 9, 4, 8 + salt], dtype).swap_dims(1, 2);
        compare("heads", heads(0), heads(0).swap_dims(2, 3));
        let cut = numbers([4, 20, 9], dtype).slice([1..3, 3..11, 2..8]);
        compare("cut", cut.clone(), cut.swap_dims(1, 2));
        let flipped = numbers([2, 6, 5], dtype).flip([1, 2]);
        compare("flipped", flipped, numbers([2, 5, 3], dtype));
        compare("expanded", numbers([1, 6, 1], dtype).expand([4, 6, 5]), numbers([4, 5, 3], dtype));
    }

    /// Products and sums of products of odd sizes, of batches and transposed factors, each in parts among those of the
    /// others.
    #[test]
    fn several_at_once_on_several_threads() {
        for dtype in [DType::F32, DType::F64] {
            let swapped = |dims| numbers::<3>(dims, dtype).swap_dims(1, 2);
            let terms: Vec<Vec<[Tensor<3>; 2]>> = vec![
                vec![[numbers([3, 67, 130], dtype), numbers([3, 130, 131], dtype)]],
                vec![[numbers([3, 67, 130], dtype), numbers([1, 130, 19], dtype)]],
                vec![[numbers([1, 67, 130], dtype), swapped([2, 1001, 130])]],
                vec![[swapped([1, 300, 253]), swapped([1, 65, 300])]],
                vec![[numbers([1001, 8, 40], dtype), numbers([1001, 40, 9], dtype)]],
                vec![
                    [numbers([1, 149, 120], dtype), swapped([1, 701, 120])],
                    [swapped([1, 33, 149]), numbers([1, 33, 701], dtype)],
                    [numbers([1, 149, 7], dtype), numbers([1, 7, 701], dtype)],
                ],
            ];
            let sum = |terms: &Vec<[Tensor<3>; 2]>| {
                terms.iter().map(|[left, right]| left.clone().matmul(right.clone())).reduce(|a, b| a + b).unwrap()
            };
            let expected: Vec<Tensor<3>> = terms.iter().map(sum).collect();
            let flex = |tensor: &Tensor<3>| PlainTensor::from(tensor.clone()).into_flex().unwrap();
            let factors: Vec<Vec<[FlexTensor; 2]>> =
                terms.iter().map(|terms| terms.iter().map(|factors| factors.each_ref().map(flex)).collect()).collect();
            let dims: Vec<[usize; 3]> = expected.iter().map(Tensor::dims).collect();
            let mut alone: Vec<TensorData> = Vec::new();
            for threads in [1, 2, 3, 5, 8] {
                let made = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                    let pool = Pool::of_thread();
                    let wanted = factors.iter().zip(&dims).map(|(factors, dims)| WantedProduct {
                        factors: factors.iter().map(|[left, right]| [left, right]).collect(),
                        dims,
                        room: pool.room(dims.iter().product::<usize>() * dtype.size()),
                    });
                    multiply(wanted.collect(), dtype)
                });
                let made = made.into_iter().map(|made| PlainTensor::from_flex(made).float::<3>().unwrap());
                for (number, (expected, made)) in expected.iter().zip(made).enumerate() {
                    assert_eq!((made.dims(), made.dtype()), (expected.dims(), dtype));
                    let worst = (made.clone() - expected.clone()).abs().max().into_scalar::<f64>();
                    assert!(worst <= 1e-4, "{dtype:?}, {number} on {threads} threads: apart by {worst}");
                    match threads {
                        1 => alone.push(made.into_data()),
                        _ => assert_eq!(made.into_data(), alone[number], "{dtype:?}, {number} on {threads} threads"),
                    }
                }
            }
        }
    }

    #[test]
    fn numbers_that_are_none_stay() {
        let with = |value: f32| {
            numbers([32, 270], DType::F32).slice_assign([3..4, 5..6], Tensor::from_data([[value]], &Device::flex()))
        };
        for value in [f32::NAN, f32::INFINITY] {
            compare("left", with(value), numbers([270, 260], DType::F32));
            compare("right", numbers([5, 32], DType::F32), with(value));
            compare("skinny", with(value), numbers([260, 270], DType::F32).swap_dims(0, 1));
        }
    }
}
