//! Makes maxima and minima propagate NaN over a transport whose own ones ignore it.

use burn::tensor::Tensor;

use super::ReduceOp;

/// The rows, each followed by a mask of as many elements: 0, or where there is a NaN a number that wins in `op`.
pub(super) fn append_nan_mask(rows: Tensor<2>, op: ReduceOp) -> Tensor<2> {
    let winner = if op == ReduceOp::Min { -1.0 } else { 1.0 };
    let nan = rows.clone().is_nan();
    let marks = rows.zeros_like().mask_fill(nan, winner);
    Tensor::cat(vec![rows, marks], 1)
}

/// The reduction of rows with masks, with NaN where the mask says so.
pub(super) fn apply_nan_mask(reduced: Tensor<2>) -> Tensor<2> {
    let [_, both] = reduced.dims();
    let rows = reduced.clone().slice_dim(1, 0..both / 2);
    let marks = reduced.slice_dim(1, both / 2..both);
    rows.mask_fill(marks.not_equal_elem(0.0), f64::NAN)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, TensorData};

    use super::*;

    /// A reduction that leaves NaN out, as NCCL's does.
    fn careless(parts: Vec<Tensor<2>>, op: ReduceOp) -> Tensor<2> {
        let clean = |part: Tensor<2>, other: &Tensor<2>| {
            let nan = part.clone().is_nan();
            part.mask_where(nan, other.clone())
        };
        let fold = |a: Tensor<2>, b: Tensor<2>| {
            let (left, right) = (clean(a.clone(), &b), clean(b, &a));
            if op == ReduceOp::Max { left.max_pair(right) } else { left.min_pair(right) }
        };
        parts.into_iter().reduce(fold).unwrap()
    }

    #[test]
    fn a_nan_of_any_rank_is_in_the_result() {
        const DIMS: [usize; 2] = [3, 2];
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let brought =
            [[1.0, nan, -3.0, inf, 0.0, -5.0], [2.0, 7.0, nan, -inf, -0.0, -6.0], [0.5, 1.0, nan, 3.0, 0.0, -7.0]];
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for (op, expected) in
                [(ReduceOp::Max, [2.0, nan, nan, inf, 0.0, -5.0]), (ReduceOp::Min, [0.5, nan, nan, -inf, 0.0, -7.0])]
            {
                let tensor = |values: [f32; 6]| {
                    let data = TensorData::new(values.to_vec(), DIMS).convert_dtype(dtype);
                    Tensor::<2>::from_data(data, (&Device::flex(), dtype))
                };
                let parts: Vec<_> = brought.into_iter().map(|values| append_nan_mask(tensor(values), op)).collect();
                assert!(parts.iter().all(|part| part.dims() == [3, 4] && part.dtype() == dtype));
                let found = apply_nan_mask(careless(parts, op));
                assert_eq!(found.dtype(), dtype);
                let found: Vec<f32> = found.into_data().iter::<f32>().collect();
                let same = |(x, y): (&f32, &f32)| x == y || x.is_nan() && y.is_nan();
                assert!(found.iter().zip(&expected).all(same), "{op:?} of {dtype:?}: {found:?}");
                let careless = careless(brought.into_iter().map(tensor).collect(), op);
                assert!(careless.into_data().iter::<f32>().any(|x| !x.is_nan()), "{op:?}: the stand-in leaves it out");
            }
        }
    }
}
