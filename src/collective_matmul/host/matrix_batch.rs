//! Left factors of any number of dims as a batch of matrices at even distances.

use burn::backend::flex::FlexTensor;

use super::matrix::{Matrix, Real, elements_of};

/// A length, and the distance between neighbours.
type Stride = (usize, isize);

/// Matrices of one size at even distances: the outer places of a tensor, and the rows of each.
#[derive(Debug, Clone, Copy)]
pub(super) struct MatrixBatch<'a, T> {
    first: Matrix<'a, T>,
    pub outer: usize,
    stride: isize,
}

impl<'a, T: Real> MatrixBatch<'a, T> {
    /// A tensor that lies [evenly](even) around `dim`.
    ///
    /// # Panics
    /// If it does not.
    pub fn of(tensor: &'a FlexTensor, dim: usize) -> Self {
        let [(outer, stride), (rows, row_stride), (columns, column_stride)] =
            lies(tensor, dim).expect("a tensor that lies evenly was asked for");
        let data = elements_of(tensor);
        Self { first: Matrix { data, rows, columns, row_stride, column_stride }, outer, stride }
    }

    /// Rows of each outer place.
    pub fn rows(&self) -> usize {
        self.first.rows
    }

    pub fn columns(&self) -> usize {
        self.first.columns
    }

    /// The rows of an outer place.
    pub fn matrix(&self, place: usize) -> Matrix<'a, T> {
        let from = (place as isize * self.stride) as usize;
        Matrix { data: self.first.data.get(from..).unwrap_or_default(), ..self.first }
    }

    /// All rows as one matrix, if they are at even distances.
    pub fn flat(&self) -> Option<Matrix<'a, T>> {
        let (rows, row_stride) = joined((self.outer, self.stride), (self.first.rows, self.first.row_stride))?;
        Some(Matrix { rows, row_stride, ..self.first })
    }
}

/// The tensor, copied if the dims before `dim`, or those from it to the last but one, are not at even distances as one.
pub(super) fn even(tensor: FlexTensor, dim: usize) -> FlexTensor {
    match lies(&tensor, dim) {
        Some(_) => tensor,
        None => tensor.to_contiguous(),
    }
}

/// Outer places, rows and columns. Views here only run ahead, so that a flip does not lie evenly.
fn lies(tensor: &FlexTensor, dim: usize) -> Option<[Stride; 3]> {
    let layout = tensor.layout();
    let dims: Vec<Stride> = layout.shape().iter().copied().zip(layout.strides().iter().copied()).collect();
    let (last, leading) = dims.split_last()?;
    let (before, rows) = leading.split_at_checked(dim)?;
    let as_one = |dims: &[Stride]| dims.iter().copied().try_fold((1, 1), joined);
    let ahead = dims.iter().all(|(_, stride)| *stride >= 0);
    ahead.then_some([as_one(before)?, as_one(rows)?, *last])
}

/// Two dims as one.
fn joined(outer: Stride, inner: Stride) -> Option<Stride> {
    match (outer, inner) {
        ((0, _), _) | (_, (0, _)) => Some((0, 1)),
        ((1, _), inner) => Some(inner),
        (outer, (1, _)) => Some(outer),
        ((many, far), (few, near)) => (far == near * few as isize).then_some((many * few, near)),
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::flex::{FlexTensor, Layout};
    use burn::tensor::{Bytes, DType, Shape};

    use super::*;

    fn counted(dims: [usize; 3]) -> FlexTensor {
        let values: Vec<f32> = (0..dims.iter().product::<usize>()).map(|value| value as f32).collect();
        FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(Shape::from(dims)), DType::F32)
    }

    /// Every row of a stack, element by element.
    fn rows(stack: &MatrixBatch<'_, f32>) -> Vec<f32> {
        (0..stack.outer).flat_map(|place| stack.matrix(place).elements().collect::<Vec<_>>()).collect()
    }

    #[test]
    fn views_are_seen_as_they_lie() {
        for order in [[0, 1, 2], [1, 0, 2], [0, 2, 1], [2, 1, 0], [2, 0, 1], [1, 2, 0]] {
            for dims in [[2, 3, 4], [1, 3, 2], [3, 1, 5], [2, 2, 1]] {
                let view = counted(dims).permute(&order);
                let wanted: Vec<f32> = view.to_contiguous().as_slice::<f32>().unwrap().to_vec();
                for dim in 0..2 {
                    let even = even(view.clone(), dim);
                    let stack = MatrixBatch::<f32>::of(&even, dim);
                    assert_eq!(rows(&stack), wanted, "{order:?} {dims:?} {dim}");
                    if let Some(flat) = stack.flat() {
                        assert_eq!(flat.elements().collect::<Vec<_>>(), wanted, "{order:?} {dims:?} {dim}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_lies_evenly_is_not_copied() {
        let positions_first = counted([4, 2, 3]).permute(&[1, 0, 2]);
        assert!(lies(&positions_first, 1).is_some());
        assert!(lies(&positions_first, 0).is_none());
        assert!(MatrixBatch::<f32>::of(&counted([4, 2, 3]), 1).flat().is_some());
        assert!(MatrixBatch::<f32>::of(&positions_first, 1).flat().is_none());
    }
}
