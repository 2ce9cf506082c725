//! Matrices in host memory, and the multiplication of Flex on views of them, into places that exist already.

use std::borrow::Cow;
use std::ops::Range;

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::{bf16, f16};

use crate::comm::Element;

/// Flex's threshold: with fewer multiplications than this, a product is made by one thread.
const PARALLEL_THRESHOLD: usize = 192 * 192 * 192;

/// A view of a matrix: any strides, nothing copied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    /// From the first element on.
    data: &'a [T],
    pub rows: usize,
    pub columns: usize,
    row_stride: isize,
    column_stride: isize,
}

impl<'a, T: Real> Matrix<'a, T> {
    /// A tensor of two dims as it lies.
    pub fn of(tensor: &'a FlexTensor) -> Self {
        let layout = tensor.layout();
        let (shape, strides) = (layout.shape(), layout.strides());
        let storage: &[T] = tensor.storage();
        // An empty tensor may begin behind the end.
        let data = storage.get(layout.start_offset()..).unwrap_or_default();
        Self { data, rows: shape[0], columns: shape[1], row_stride: strides[0], column_stride: strides[1] }
    }

    /// Rows one behind the other.
    pub fn packed(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self { data, rows, columns, row_stride: columns as isize, column_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        let Self { data, rows, columns, row_stride, column_stride } = self;
        Self { data, rows: columns, columns: rows, row_stride: column_stride, column_stride: row_stride }
    }

    /// Some of the rows.
    pub fn rows(self, rows: Range<usize>) -> Self {
        let from = (rows.start as isize * self.row_stride) as usize;
        let data = self.data.get(from..).unwrap_or_default();
        Self { data, rows: rows.len(), ..self }
    }

    fn is_empty(&self) -> bool {
        self.rows == 0 || self.columns == 0
    }

    /// Whether every element of the view lies within its data.
    fn fits(&self) -> bool {
        let last = |len: usize, stride: isize| (len - 1) as isize * stride;
        self.row_stride >= 0
            && self.column_stride >= 0
            && last(self.rows, self.row_stride) + last(self.columns, self.column_stride) < self.data.len() as isize
    }

    /// All elements row by row.
    fn elements(&self) -> impl Iterator<Item = T> + use<'a, T> {
        let Self { data, rows, columns, row_stride, column_stride } = *self;
        (0..rows).flat_map(move |row| {
            (0..columns).map(move |column| data[(row as isize * row_stride + column as isize * column_stride) as usize])
        })
    }
}

/// A right factor that is multiplied several times: made ready once.
#[derive(Debug)]
pub(super) struct Factor<'a, T: Real> {
    rows: usize,
    columns: usize,
    ready: T::Ready<'a>,
}

impl<'a, T: Real> Factor<'a, T> {
    pub fn new(matrix: Matrix<'a, T>) -> Self {
        Self { rows: matrix.rows, columns: matrix.columns, ready: T::ready(matrix) }
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Writes `left * self` over `out`, row by row.
    ///
    /// # Panics
    /// If the dims don't fit, which whoever made the matrices has checked.
    pub fn multiply(&self, left: Matrix<'_, T>, out: &mut [T]) {
        assert_eq!((left.columns, out.len()), (self.rows, left.rows * self.columns), "dims are checked before");
        if out.is_empty() {
            return;
        }
        match left.columns {
            0 => out.fill(T::default()),
            _ => T::multiply(left, &self.ready, out),
        }
    }
}

/// The floats that are multiplied.
pub(super) trait Real: Element + bytemuck::Pod {
    /// A right factor, made ready.
    type Ready<'a>: std::fmt::Debug;

    fn ready(matrix: Matrix<'_, Self>) -> Self::Ready<'_>;

    /// Writes the product of matrices that are not empty.
    fn multiply(left: Matrix<'_, Self>, right: &Self::Ready<'_>, out: &mut [Self]);
}

macro_rules! real {
    ($($float:ty: $zero:expr, $one:expr);*) => {$(
        impl Real for $float {
            type Ready<'a> = Matrix<'a, Self>;

            fn ready(matrix: Matrix<'_, Self>) -> Matrix<'_, Self> {
                matrix
            }

            fn multiply(left: Matrix<'_, Self>, right: &Matrix<'_, Self>, out: &mut [Self]) {
                gemm(left, *right, out, $zero, $one);
            }
        }
    )*};
}
real!(f32: 0.0, 1.0; f64: 0.0, 1.0; f16: f16::ZERO, f16::ONE);

/// As Flex: multiplied in `f32`, rounded once.
impl Real for bf16 {
    type Ready<'a> = (Vec<f32>, usize, usize);

    fn ready(matrix: Matrix<'_, Self>) -> (Vec<f32>, usize, usize) {
        (matrix.elements().map(bf16::to_f32).collect(), matrix.rows, matrix.columns)
    }

    fn multiply(left: Matrix<'_, Self>, (right, rows, columns): &(Vec<f32>, usize, usize), out: &mut [Self]) {
        let wide: Vec<f32> = left.elements().map(bf16::to_f32).collect();
        let mut product = vec![0f32; out.len()];
        let left = Matrix::packed(&wide, left.rows, left.columns);
        gemm(left, Matrix::packed(right, *rows, *columns), &mut product, 0.0, 1.0);
        out.iter_mut().zip(product).for_each(|(out, wide)| *out = bf16::from_f32(wide));
    }
}

/// What Flex's `float_matmul` does, but for where the result goes.
fn gemm<T: Real>(left: Matrix<'_, T>, right: Matrix<'_, T>, out: &mut [T], zero: T, one: T) {
    let (m, n, k) = (left.rows, right.columns, left.columns);
    assert!(!left.is_empty() && !right.is_empty() && left.fits() && right.fits() && out.len() == m * n);
    let parallelism = match m.saturating_mul(n).saturating_mul(k) >= PARALLEL_THRESHOLD {
        true => gemm::Parallelism::Rayon(0),
        false => gemm::Parallelism::None,
    };
    // SAFETY: all elements lie within their slices, as was just checked, and `out` is lent for writing.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            left.data.as_ptr(),
            left.column_stride,
            left.row_stride,
            right.data.as_ptr(),
            right.column_stride,
            right.row_stride,
            zero,
            one,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// The rows of a tensor, one behind the other; copied only if they lie otherwise.
pub(super) fn packed_rows<T: Real>(tensor: &FlexTensor) -> Cow<'_, [T]> {
    match tensor.as_slice::<T>() {
        Some(rows) => Cow::Borrowed(rows),
        None => Cow::Owned(Matrix::of(tensor).elements().collect()),
    }
}

/// Room for a matrix: pages of zeros that are not touched before they are written.
pub(super) fn room<T: Real>(rows: usize, columns: usize) -> FlexTensor {
    FlexTensor::empty([rows, columns].into(), T::DTYPE)
}

/// `left^T * right`, as a new tensor.
pub(super) fn transposed_product<T: Real>(left: &FlexTensor, right: &FlexTensor) -> FlexTensor {
    debug_assert_eq!(left.shape()[0], right.shape()[0]);
    product(Matrix::<T>::of(left).transposed(), &Factor::new(Matrix::of(right)))
}

/// A product as a new tensor.
pub(super) fn product<T: Real>(left: Matrix<'_, T>, right: &Factor<'_, T>) -> FlexTensor {
    let mut out = room::<T>(left.rows, right.columns());
    right.multiply(left, out.storage_mut());
    out
}
