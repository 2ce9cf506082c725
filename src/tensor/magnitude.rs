//! Sums of squares, largest magnitudes and finiteness of tensors in host memory, in one pass over their elements.
//!
//! Elements are taken in blocks of a fixed length, whose sums are added up in order: the result does not depend on the
//! number of threads.

use std::borrow::Cow;

use burn::backend::TensorMetadata;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{DType, Element, bf16, f16};
use bytemuck::Pod;
use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::vectorized;
use crate::Error;

/// Elements of a block: some hundred KiB, which a core reads in the time that it takes to hand out work.
pub(super) const BLOCK: usize = 1 << 16;

/// Sums that run side by side, so that none waits for the one before.
pub(super) const WIDE: usize = 32;

/// The sum of the squares of all elements, each divided by `unit` first. Not finite if an element is not, or if it
/// overflows.
///
/// # Errors
/// [`Error::UnsupportedDType`] if the tensor has no plain floats.
pub(crate) fn squares(tensor: &FlexTensor, unit: f64) -> Result<f64, Error> {
    Ok(match tensor.dtype() {
        DType::F64 => squares_of(&elements::<f64>(tensor), unit),
        DType::F32 => squares_of(&elements::<f32>(tensor), unit),
        DType::F16 => squares_of(&elements::<f16>(tensor), unit),
        DType::BF16 => squares_of(&elements::<bf16>(tensor), unit),
        dtype => return Err(Error::UnsupportedDType { operation: "the norm of gradients", dtype }),
    })
}

/// The largest magnitude. NaN if an element is, else infinite if one is.
///
/// # Errors
/// As [`squares`].
pub(crate) fn largest(tensor: &FlexTensor) -> Result<f64, Error> {
    Ok(match tensor.dtype() {
        DType::F64 => largest_of(&elements::<f64>(tensor)),
        DType::F32 => largest_of(&elements::<f32>(tensor)),
        DType::F16 => largest_of(&elements::<f16>(tensor)),
        DType::BF16 => largest_of(&elements::<bf16>(tensor)),
        dtype => return Err(Error::UnsupportedDType { operation: "the norm of gradients", dtype }),
    })
}

/// Whether no element is NaN or infinite. It is done by the thread that calls, best when the tensor has just been
/// written and is still in the cache.
///
/// # Errors
/// As [`squares`].
pub(crate) fn is_finite(tensor: &FlexTensor) -> Result<bool, Error> {
    Ok(match tensor.dtype() {
        DType::F64 => all_finite(&elements::<f64>(tensor), |x| x * 0.0),
        DType::F32 => all_finite(&elements::<f32>(tensor), |x| x * 0.0),
        // A 16-bit exponent of ones, and nothing else, carries into the sign.
        DType::F16 => !any_sign(&elements::<f16>(tensor), |x| (x.to_bits() & 0x7fff) + 0x0400),
        DType::BF16 => !any_sign(&elements::<bf16>(tensor), |x| (x.to_bits() & 0x7fff) + 0x0080),
        dtype => return Err(Error::UnsupportedDType { operation: "a look for NaN and infinity", dtype }),
    })
}

/// The elements in any order.
fn elements<E: Element + Pod>(tensor: &FlexTensor) -> Cow<'_, [E]> {
    let len = tensor.shape().num_elements();
    if is_one_run(tensor.layout()) {
        let start = tensor.layout().start_offset();
        return Cow::Borrowed(&tensor.storage::<E>()[start..start + len]);
    }
    let packed = tensor.to_contiguous();
    let start = packed.layout().start_offset();
    Cow::Owned(packed.storage::<E>()[start..start + len].to_vec())
}

/// Whether the elements are one run of memory in whatever order of the dims, as those of a transposed tensor are.
pub(super) fn is_one_run(layout: &Layout) -> bool {
    let mut dims: Vec<(isize, usize)> =
        layout.strides().iter().copied().zip(layout.shape().iter().copied()).filter(|(_, size)| *size != 1).collect();
    dims.sort_unstable();
    let mut next = 1;
    dims.into_iter().all(|(stride, size)| {
        let follows = stride == next;
        next *= size as isize;
        follows
    })
}

/// A float with its magnitude as bits, which are ordered as magnitudes are, infinity and NaN last.
pub(super) trait Magnitude: Copy + Send + Sync {
    type Order: Ord + Copy + Default + Send;

    fn wide(self) -> f64;
    /// The sum as burn rounds it on the host: those of 16 bits are computed in `f32`.
    fn plus(self, other: Self) -> Self;
    fn magnitude(self) -> Self::Order;
    fn of(bits: Self::Order) -> f64;
}

macro_rules! magnitude {
    ($($float:ty: $bits:ty, $wide:expr, $plus:expr);* $(;)?) => {$(
        impl Magnitude for $float {
            type Order = $bits;

            #[inline(always)]
            fn wide(self) -> f64 {
                $wide(self)
            }

            #[inline(always)]
            fn plus(self, other: Self) -> Self {
                $plus(self, other)
            }

            #[inline(always)]
            fn magnitude(self) -> $bits {
                self.to_bits() & (<$bits>::MAX >> 1)
            }

            fn of(bits: $bits) -> f64 {
                Self::from_bits(bits).wide()
            }
        }
    )*};
}

magnitude! {
    f64: u64, |x| x, |x, y| x + y;
    f32: u32, f64::from, |x, y| x + y;
    f16: u16, |x: f16| f64::from(x.to_f32()), |x: f16, y: f16| f16::from_f32(x.to_f32() + y.to_f32());
    bf16: u16, |x: bf16| f64::from(f32::from_bits(u32::from(x.to_bits()) << 16)),
        |x: bf16, y: bf16| bf16::from_f32(x.to_f32() + y.to_f32());
}

fn squares_of<E: Magnitude>(elements: &[E], unit: f64) -> f64 {
    let per_unit = 1.0 / unit;
    let block = |elements: &[E]| vectorized(BlockSquares { elements, per_unit });
    if elements.len() <= BLOCK {
        return block(elements);
    }
    elements.par_chunks(BLOCK).map(block).collect::<Vec<f64>>().into_iter().sum()
}

/// The sum of the squares of a block.
struct BlockSquares<'a, E> {
    elements: &'a [E],
    per_unit: f64,
}

impl<E: Magnitude> NullaryFnOnce for BlockSquares<'_, E> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        let mut sums = [0.0; WIDE];
        let (whole, rest) = self.elements.as_chunks::<WIDE>();
        for some in whole {
            for (sum, element) in sums.iter_mut().zip(some) {
                let x = element.wide() * self.per_unit;
                *sum += x * x;
            }
        }
        for (sum, element) in sums.iter_mut().zip(rest) {
            let x = element.wide() * self.per_unit;
            *sum += x * x;
        }
        sums.iter().sum()
    }
}

fn largest_of<E: Magnitude>(elements: &[E]) -> f64 {
    let block = |block: &[E]| block.iter().fold(E::Order::default(), |most, element| most.max(element.magnitude()));
    let most = match elements.len() <= BLOCK {
        true => block(elements),
        false => elements.par_chunks(BLOCK).map(block).max().unwrap_or_default(),
    };
    E::of(most)
}

/// Whether the sum of what `zero` makes of the elements is 0: what is not finite becomes NaN, all else 0.
fn all_finite<E: Copy + Default + std::ops::AddAssign + PartialEq>(elements: &[E], zero: impl Fn(E) -> E) -> bool {
    let mut sums = [E::default(); WIDE];
    let (whole, rest) = elements.as_chunks::<WIDE>();
    for some in whole {
        sums.iter_mut().zip(some).for_each(|(sum, element)| *sum += zero(*element));
    }
    sums.iter_mut().zip(rest).for_each(|(sum, element)| *sum += zero(*element));
    sums.iter().all(|sum| *sum == E::default())
}

fn any_sign<E: Copy>(elements: &[E], bits: impl Fn(E) -> u16) -> bool {
    let mut seen = [0; WIDE];
    let (whole, rest) = elements.as_chunks::<WIDE>();
    for some in whole {
        seen.iter_mut().zip(some).for_each(|(seen, element)| *seen |= bits(*element));
    }
    seen.iter_mut().zip(rest).for_each(|(seen, element)| *seen |= bits(*element));
    seen.into_iter().any(|seen| seen & 0x8000 != 0)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Shape, TensorData};

    use super::*;

    fn tensor<E: burn::tensor::Element>(values: Vec<E>, dims: impl Into<Shape>) -> FlexTensor {
        FlexTensor::from_data(TensorData::new(values, dims.into()))
    }

    #[test]
    fn every_float_is_measured_in_f64() {
        let values: Vec<f64> = (0..1000).map(|n| ((n * 37 % 101) as f64 - 50.0) / 64.0).collect();
        let expected: f64 = values.iter().map(|x| x * x).sum();
        let in_f64 = tensor(values.clone(), [10, 100]);
        let in_f32 = tensor(values.iter().map(|x| *x as f32).collect(), [1000]);
        let in_f16 = tensor(values.iter().map(|x| f16::from_f64(*x)).collect(), [20, 50]);
        // Multiples of 1/64 below 1 need 6 bits: all dtypes hold them exactly.
        let in_bf16 = tensor(values.iter().map(|x| bf16::from_f64(*x)).collect(), [1000]);
        for tensor in [in_f64, in_f32, in_f16, in_bf16] {
            assert_eq!(squares(&tensor, 1.0).unwrap(), expected, "{:?}", tensor.dtype());
            assert_eq!(squares(&tensor, 0.5).unwrap(), 4.0 * expected);
            assert_eq!(largest(&tensor).unwrap(), 50.0 / 64.0);
        }
    }

    #[test]
    fn no_order_of_dims_costs_a_copy_and_parts_of_buffers_are_not_taken_for_the_whole() {
        let whole = tensor((0..24).map(|n| n as f32).collect(), [2, 3, 4]);
        let turned = whole.permute(&[2, 0, 1]);
        assert!(matches!(elements::<f32>(&turned), Cow::Borrowed(_)));
        assert_eq!(squares(&turned, 1.0).unwrap(), squares(&whole, 1.0).unwrap());

        let part = whole.narrow(2, 1, 2);
        let expected: f64 = (0..24).filter(|n| [1, 2].contains(&(n % 4))).map(|n| (n * n) as f64).sum();
        assert_eq!(squares(&part, 1.0).unwrap(), expected);
        assert_eq!(largest(&part).unwrap(), 22.0);
        let rows = whole.narrow(0, 1, 1);
        assert!(matches!(elements::<f32>(&rows), Cow::Borrowed(_)));
        assert_eq!(squares(&rows, 1.0).unwrap(), (12..24).map(|n| (n * n) as f64).sum::<f64>());

        let one = tensor(vec![3.0f32], [1, 1]);
        let everywhere = FlexTensor::from_arc(one.data_arc(), Layout::new([2, 5].into(), vec![0, 0], 0), DType::F32);
        assert_eq!(squares(&everywhere, 1.0).unwrap(), 90.0);
        assert_eq!(squares(&tensor(Vec::<f32>::new(), [0, 3]), 1.0).unwrap(), 0.0);
        assert_eq!(largest(&tensor(Vec::<f32>::new(), [0, 3])).unwrap(), 0.0);
    }

    #[test]
    fn no_number_of_threads_changes_a_bit() {
        let values: Vec<f32> = (0..5 * BLOCK + 777).map(|n| (n as f32 * 0.37).sin()).collect();
        let tensor = tensor(values, [5 * BLOCK + 777]);
        let by = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| squares(&tensor, 1.0).unwrap())
        };
        assert_eq!(by(1).to_bits(), by(3).to_bits());
        assert_eq!(by(1).to_bits(), by(8).to_bits());
    }

    #[test]
    fn what_is_not_finite_is_seen_wherever_it_is() {
        for len in [1, 7, 8, 9, BLOCK, BLOCK + 1, 3 * BLOCK] {
            for place in [0, len / 2, len - 1] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut values = vec![1.0; len];
                    values[place] = bad;
                    let tensor = tensor(values, [len]);
                    assert!(!squares(&tensor, 1.0).unwrap().is_finite(), "{bad} at {place} of {len}");
                    let most = largest(&tensor).unwrap();
                    assert!(if bad.is_nan() { most.is_nan() } else { most == f64::INFINITY });
                }
            }
        }
    }

    #[test]
    fn a_look_for_what_is_not_finite_finds_it_in_every_dtype() {
        let look = |values: &[f64], dtype: DType| {
            let data = TensorData::new(values.to_vec(), [values.len()]).convert_dtype(dtype);
            is_finite(&FlexTensor::from_data(data)).unwrap()
        };
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            // The largest that f16 has, the smallest normal and something below.
            let mut values = vec![65504.0, -65504.0, 0.0, -0.0, 6.2e-5, 6e-8, 1.0];
            values.resize(100, -3.5);
            assert!(look(&values, dtype), "{dtype:?}");
            for place in [0, 31, 32, 96, 99] {
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    let kept = std::mem::replace(&mut values[place], bad);
                    assert!(!look(&values, dtype), "{bad} at {place} in {dtype:?}");
                    values[place] = kept;
                }
            }
        }
        assert!(look(&[f64::from(f32::MAX), f64::from(f32::MIN)], DType::F32));
        assert!(look(&[f64::MAX, f64::MIN, f64::MIN_POSITIVE / 2.0], DType::F64));
        assert!(look(&[], DType::F32));
    }

    #[test]
    fn ints_are_refused() {
        assert!(squares(&tensor(vec![1i64], [1]), 1.0).unwrap_err().to_string().contains("I64"));
    }
}
