//! Views of matrices in host memory, and Flex's multiplication of them into buffers that exist already.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Shape, bf16, f16};

use crate::comm::Element;
use crate::tensor::{Multiplied, Pool, Product, Strided};

/// A view of a matrix: any strides, nothing copied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    /// From the first element on.
    pub data: &'a [T],
    pub rows: usize,
    pub columns: usize,
    pub row_stride: isize,
    pub column_stride: isize,
}

impl<'a, T: Copy> Matrix<'a, T> {
    /// The last two dims of a tensor as they lie; the others are 1.
    pub fn of(tensor: &'a FlexTensor) -> Self
    where
        T: Real,
    {
        let layout = tensor.layout();
        let (shape, strides) = (layout.shape(), layout.strides());
        let [row, column] = [shape.num_dims() - 2, shape.num_dims() - 1];
        let data = elements_of(tensor);
        Self {
            data,
            rows: shape[row],
            columns: shape[column],
            row_stride: strides[row],
            column_stride: strides[column],
        }
    }

    /// Rows one behind the other.
    pub fn packed(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self::spread(data, rows, columns, columns)
    }

    /// Rows at even distances.
    pub fn spread(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { data, rows, columns, row_stride: row_stride as isize, column_stride: 1 }
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

    fn strided(&self) -> Strided<T> {
        Strided { first: self.data.as_ptr(), row: self.row_stride, column: self.column_stride }
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
    pub fn elements(&self) -> impl Iterator<Item = T> + use<'a, T> {
        let Self { data, rows, columns, row_stride, column_stride } = *self;
        (0..rows).flat_map(move |row| {
            (0..columns).map(move |column| data[(row as isize * row_stride + column as isize * column_stride) as usize])
        })
    }
}

/// The elements from the first of a tensor on.
pub(super) fn elements_of<T: Real>(tensor: &FlexTensor) -> &[T] {
    // An empty tensor may begin behind the end.
    tensor.storage().get(tensor.layout().start_offset()..).unwrap_or_default()
}

/// A right factor that is multiplied several times: made ready once.
#[derive(Debug)]
pub(super) struct PreparedFactor<'a, T: Real> {
    rows: usize,
    columns: usize,
    packed: T::Packed<'a>,
}

impl<'a, T: Real> PreparedFactor<'a, T> {
    pub fn new(matrix: Matrix<'a, T>) -> Self {
        Self { rows: matrix.rows, columns: matrix.columns, packed: T::pack(matrix) }
    }

    pub fn columns(&self) -> usize {
        self.columns
    }
}

/// Rows to be written, at even distances.
#[derive(Debug)]
pub(super) struct OutputRows<'a, T> {
    data: &'a mut [T],
    row_stride: usize,
}

impl<'a, T> OutputRows<'a, T> {
    /// One behind the other.
    pub fn packed(data: &'a mut [T], columns: usize) -> Self {
        Self { data, row_stride: columns }
    }

    pub fn spread(data: &'a mut [T], row_stride: usize) -> Self {
        Self { data, row_stride }
    }
}

/// Writes `sum of left * right` to its place; what is made on the way is made in memory of `pool`.
///
/// # Panics
/// If the dims do not fit, which callers check.
pub(super) fn multiply<T: Real>(
    terms: &[(Matrix<'_, T>, &PreparedFactor<'_, T>)],
    out: OutputRows<'_, T>,
    pool: &Arc<Pool>,
) {
    let (rows, columns) = terms.first().map_or((0, 0), |(left, right)| (left.rows, right.columns));
    let fits = |(left, right): &(Matrix<'_, T>, &PreparedFactor<'_, T>)| {
        (left.rows, left.columns, right.columns) == (rows, right.rows, columns)
    };
    assert!(terms.iter().all(fits), "dims are checked before");
    if rows * columns == 0 {
        return;
    }
    assert!((rows - 1) * out.row_stride + columns <= out.data.len(), "dims are checked before");
    let terms: Vec<_> =
        terms.iter().filter(|(left, _)| left.columns > 0).map(|(left, right)| (*left, &right.packed)).collect();
    match terms.is_empty() {
        true => out.data.chunks_mut(out.row_stride).for_each(|row| row[..columns].fill(T::default())),
        false => T::multiply(&terms, out, columns, pool),
    }
}

/// The floats that are multiplied.
pub(super) trait Real: Element + bytemuck::Pod {
    /// A right factor, made ready.
    type Packed<'a>: std::fmt::Debug;

    fn pack(matrix: Matrix<'_, Self>) -> Self::Packed<'_>;

    /// Writes the sum of products of matrices that are not empty.
    fn multiply(
        terms: &[(Matrix<'_, Self>, &Self::Packed<'_>)],
        out: OutputRows<'_, Self>,
        columns: usize,
        pool: &Arc<Pool>,
    );
}

macro_rules! real {
    ($($float:ty),*) => {$(
        impl Real for $float {
            type Packed<'a> = Matrix<'a, Self>;

            fn pack(matrix: Matrix<'_, Self>) -> Matrix<'_, Self> {
                matrix
            }

            fn multiply(
                terms: &[(Matrix<'_, Self>, &Matrix<'_, Self>)],
                out: OutputRows<'_, Self>,
                _: usize,
                _: &Arc<Pool>,
            ) {
                for (number, (left, right)) in terms.iter().enumerate() {
                    gemm(*left, **right, out.data, out.row_stride, number > 0);
                }
            }
        }
    )*};
}
real!(f32, f64, f16);

/// As Flex: multiplied in `f32`, rounded once.
impl Real for bf16 {
    type Packed<'a> = (Vec<f32>, usize, usize);

    fn pack(matrix: Matrix<'_, Self>) -> (Vec<f32>, usize, usize) {
        (matrix.elements().map(bf16::to_f32).collect(), matrix.rows, matrix.columns)
    }

    fn multiply(
        terms: &[(Matrix<'_, Self>, &Self::Packed<'_>)],
        out: OutputRows<'_, Self>,
        columns: usize,
        pool: &Arc<Pool>,
    ) {
        let rows = terms.first().map_or(0, |(left, _)| left.rows);
        let mut sum = pool.tensor(Shape::from(vec![rows, columns]), DType::F32);
        let sum: &mut [f32] = sum.storage_mut();
        for (number, (left, (right, inner, columns))) in terms.iter().enumerate() {
            let wide: Vec<f32> = left.elements().map(bf16::to_f32).collect();
            let left = Matrix::packed(&wide, rows, left.columns);
            gemm(left, Matrix::packed(right, *inner, *columns), sum, *columns, number > 0);
        }
        for (row, wide) in out.data.chunks_mut(out.row_stride).zip(sum.chunks(columns)) {
            row.iter_mut().zip(wide).for_each(|(out, wide)| *out = bf16::from_f32(*wide));
        }
    }
}

/// What Flex's `float_matmul` does, but for where the result goes, and that it can be added to what is there.
fn gemm<T: Multiplied>(left: Matrix<'_, T>, right: Matrix<'_, T>, out: &mut [T], row_stride: usize, adds: bool) {
    let (rows, columns, inner) = (left.rows, right.columns, left.columns);
    assert!(!left.is_empty() && !right.is_empty() && left.fits() && right.fits());
    assert!(right.rows == inner && columns <= row_stride && (rows - 1) * row_stride + columns <= out.len());
    let (left, right) = (left.strided(), right.strided());
    let product = Product { rows, inner, columns, left, right, adds };
    // SAFETY: all elements lie within their slices, as was just checked, and `out` is lent for writing.
    unsafe { product.write_on_threads(out.as_mut_ptr(), row_stride) };
}

/// A tensor with any values, to be written over: in memory that captured steps of this thread keep, if there are any.
pub(super) fn empty_tensor<T: Real>(dims: &[usize], pool: &Arc<Pool>) -> FlexTensor {
    pool.tensor(Shape::from(dims.to_vec()), T::DTYPE)
}
