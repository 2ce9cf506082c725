//! Which gradients are reduced together.

use burn::tensor::DType;

/// Divides parameters into buckets: `order` is that in which backward completes them; all of a bucket have one dtype.
///
/// `sizes` and `dtypes` are bytes and dtype of each parameter. The first bucket closes at `first` bytes, the others at
/// `limit`; a parameter that would overfill a bucket opens the next.
pub(super) fn divide(
    order: &[usize],
    sizes: &[usize],
    dtypes: &[DType],
    first: usize,
    limit: usize,
) -> Vec<Vec<usize>> {
    let mut buckets: Vec<Vec<usize>> = Vec::new();
    let mut filled = 0;
    for &param in order {
        let room = if buckets.len() <= 1 { first } else { limit };
        match buckets.last_mut() {
            Some(open) if filled + sizes[param] <= room && dtypes[open[0]] == dtypes[param] => {
                open.push(param);
                filled += sizes[param];
            }
            _ => {
                buckets.push(vec![param]);
                filled = sizes[param];
            }
        }
    }
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bucket_is_small_and_no_bucket_overflows() {
        let sizes = [4, 4, 4, 4, 20, 4];
        let buckets = divide(&[5, 4, 3, 2, 1, 0], &sizes, &[DType::F32; 6], 4, 10);
        assert_eq!(buckets, [vec![5], vec![4], vec![3, 2], vec![1, 0]]);
    }

    #[test]
    fn dtypes_do_not_mix() {
        let dtypes = [DType::F32, DType::F32, DType::BF16, DType::F32];
        assert_eq!(divide(&[0, 1, 2, 3], &[1; 4], &dtypes, 100, 100), [vec![0, 1], vec![2], vec![3]]);
    }
}
