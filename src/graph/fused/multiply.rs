//! Products of tensors in host memory, and sums of products, into memory that was used before and that nobody zeroes
//! first: matrix by matrix of a batch ([`Product`]), split over threads by Flex's rules.

use std::mem::MaybeUninit;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{DType, Element, Shape};
use rayon::prelude::*;

use crate::tensor::{Multiplied, Product, Room, SPLIT_FROM, Strided};

/// Flex's: from so many multiplications on several threads make several products of a batch.
const SPLIT_BATCH_FROM: usize = 128 * 128 * 128;

/// Whether [`multiply`] knows a dtype.
pub(crate) fn multiplies(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64)
}

/// The product of two tensors of one dtype of those that [`multiplies`], or the sum of the products of such pairs, of
/// the dims `dims`, made in `room`.
///
/// # Panics
/// If dims do not fit each other, which burn has checked when the products were recorded.
pub(crate) fn multiply(factors: &[[FlexTensor; 2]], dims: &[usize], dtype: DType, room: Room) -> FlexTensor {
    let multiply = if dtype == DType::F64 { multiply_as::<f64> } else { multiply_as::<f32> };
    multiply(factors, dims, room)
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

/// The sizes of a batch of products, and their factors.
struct Products<'a, T> {
    batch: &'a [usize],
    rows: usize,
    columns: usize,
    inner: usize,
    left: Factor<'a, T>,
    right: Factor<'a, T>,
    /// Whether they are added to what is there.
    adds: bool,
}

fn multiply_as<T: Multiplied + Element + bytemuck::Pod>(
    factors: &[[FlexTensor; 2]],
    dims: &[usize],
    room: Room,
) -> FlexTensor {
    let [batch @ .., rows, columns] = dims else { panic!("a product has rows and columns") };
    let (rows, columns) = (*rows, *columns);
    let shape = Shape::from(dims.to_vec());
    let elements = shape.num_elements();
    assert_eq!(room.bytes(), elements * size_of::<T>(), "a product has room for its elements");
    // SAFETY: the room has so many elements, for which it is aligned, and nothing else refers to it.
    let out = unsafe { std::slice::from_raw_parts_mut(room.pointer().cast::<MaybeUninit<T>>(), elements) };
    assert!(!factors.is_empty(), "there is a product");
    for (place, [left, right]) in factors.iter().enumerate() {
        let inner = left.layout().shape().last().copied().unwrap_or(0);
        let (left, right) = (Factor::<T>::new(left, batch, [rows, inner]), Factor::new(right, batch, [inner, columns]));
        if elements > 0 {
            Products { batch, rows, columns, inner, left, right, adds: place > 0 }.run(out);
        }
    }
    // SAFETY: the first product has written every element.
    let bytes = unsafe { room.filled() };
    FlexTensor::new(bytes, Layout::contiguous(shape), T::dtype())
}

impl<T: Multiplied + Element + bytemuck::Pod> Products<'_, T> {
    /// Writes all elements, or adds to all.
    fn run(&self, out: &mut [MaybeUninit<T>]) {
        let of_one = self.rows * self.columns;
        let (number, work) = (out.len() / of_one, of_one.saturating_mul(self.inner));
        let all = work.saturating_mul(number);
        let matrices = out.chunks_exact_mut(of_one).enumerate();
        if work >= SPLIT_FROM && !(number >= 4 && all >= SPLIT_BATCH_FROM) {
            matrices.for_each(|(number, out)| self.one(number, out, gemm::Parallelism::Rayon(0)));
        } else if all >= SPLIT_BATCH_FROM && number > 1 {
            let matrices = out.par_chunks_exact_mut(of_one).enumerate();
            matrices.for_each(|(number, out)| self.one(number, out, gemm::Parallelism::None));
        } else {
            matrices.for_each(|(number, out)| self.one(number, out, gemm::Parallelism::None));
        }
    }

    /// Writes every element of one of the batch, or adds to it.
    fn one(&self, number: usize, out: &mut [MaybeUninit<T>], parallelism: gemm::Parallelism) {
        let Self { batch, rows, columns, inner, ref left, ref right, adds } = *self;
        let (left, right) = (left.of(number, batch), right.of(number, batch));
        let product = Product { rows, inner, columns, left, right, adds };
        assert!(out.len() == rows * columns);
        // SAFETY: the factors were found to lie in their memory. `out` has a place for each element, row by row, with
        // something in it if that is added to.
        unsafe { product.write(out.as_mut_ptr().cast::<T>(), columns, parallelism) };
    }
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
            let factors = [[flex(&left), flex(&right)]];
            let found = multiply(&factors, &expected.dims(), expected.dtype(), room);
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
