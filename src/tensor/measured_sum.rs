//! The sum of tensors with a look at what is added, in one pass over memory.
//!
//! A gradient that is added to those of earlier micro-batches is also measured. It is larger than the caches, so that a
//! pass for each would read it from memory twice.

use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Element, bf16, f16};
use bytemuck::Pod;
use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::magnitude::{BLOCK, Magnitude, WIDE, is_finite, is_one_run};
use super::squares::Look;
#[cfg(test)]
use super::squares::looked;
use super::{PlainTensor, vectorized};

impl PlainTensor {
    /// The [sum](Self::add) with another float tensor, and the sum of the squares of that sum, if it is made side by
    /// side in host memory.
    ///
    /// # Panics
    /// As [`add`](Self::add).
    pub(crate) fn add_and_measure(self, other: &Self) -> (Self, Option<f64>) {
        let term = (self.on_flex() && other.on_flex()).then(|| other.clone().into_flex());
        let Some(Ok(term)) = term else {
            return (self.add(other.clone()), None);
        };
        let Ok(mut sum) = self.into_flex() else { unreachable!("the sum is in host memory") };
        match add_in_place::<true>(&mut sum, &term) {
            Some(squares) => {
                #[cfg(test)]
                looked::add(other.elements(), true);
                (Self::from_flex(sum), Some(squares))
            }
            None => (Self::from_flex(sum).add(other.clone()), None),
        }
    }

    /// The [sum](Self::add) with another float tensor, and a look at that one, with its squares if `wanted`. It is read
    /// once, where both lie alike in host memory and nothing else holds this one.
    ///
    /// # Panics
    /// As [`add`](Self::add).
    pub(crate) fn add_and_look(self, other: &Self, wanted: bool) -> (Self, Look) {
        let term = (self.on_flex() && other.on_flex()).then(|| other.clone().into_flex());
        let Some(Ok(term)) = term else {
            let look = other.look_on_host(wanted);
            return (self.add(other.clone()), look);
        };
        let Ok(mut sum) = self.into_flex() else { unreachable!("the sum is in host memory") };
        match add_in_place::<false>(&mut sum, &term) {
            Some(squares) => {
                #[cfg(test)]
                looked::add(other.elements(), wanted);
                // The squares of large elements of `f64` overflow.
                let finite = if squares.is_finite() { Some(true) } else { is_finite(&term).ok() };
                (Self::from_flex(sum), Look { squares: wanted.then_some(squares), finite })
            }
            None => {
                let look = other.look_on_host(wanted);
                (Self::from_flex(sum).add(other.clone()), look)
            }
        }
    }
}

/// Adds a tensor to a sum, in the place of that, and returns the sum of the squares of what is added, or `OF_SUM` of
/// the sum; `None`, with nothing done, if they cannot be gone through side by side.
fn add_in_place<const OF_SUM: bool>(sum: &mut FlexTensor, term: &FlexTensor) -> Option<f64> {
    let (one, other) = (sum.layout(), term.layout());
    let alike = one.strides() == other.strides() || one.is_contiguous() && other.is_contiguous();
    let fits = sum.dtype() == term.dtype() && sum.shape() == term.shape() && alike && is_one_run(one);
    if !fits || !sum.is_unique() {
        return None;
    }
    match sum.dtype() {
        DType::F64 => Some(add_run::<f64, OF_SUM>(sum, term)),
        DType::F32 => Some(add_run::<f32, OF_SUM>(sum, term)),
        DType::F16 => Some(add_run::<f16, OF_SUM>(sum, term)),
        DType::BF16 => Some(add_run::<bf16, OF_SUM>(sum, term)),
        _ => None,
    }
}

fn add_run<E: Magnitude + Element + Pod, const OF_SUM: bool>(sum: &mut FlexTensor, term: &FlexTensor) -> f64 {
    let (len, to, from) = (term.shape().num_elements(), sum.layout().start_offset(), term.layout().start_offset());
    let (sum, term) = (&mut sum.storage_mut::<E>()[to..to + len], &term.storage::<E>()[from..from + len]);
    let block = |(sum, term): (&mut [E], &[E])| vectorized(BlockSum::<E, OF_SUM> { sum, term });
    if len <= BLOCK {
        return block((sum, term));
    }
    let blocks = sum.par_chunks_mut(BLOCK).zip(term.par_chunks(BLOCK));
    blocks.map(block).collect::<Vec<f64>>().into_iter().sum()
}

/// A block of a sum, and the sum of the squares of what is added or comes out, in the order of
/// [`squares`](super::magnitude::squares).
struct BlockSum<'a, E, const OF_SUM: bool> {
    sum: &'a mut [E],
    term: &'a [E],
}

impl<E: Magnitude, const OF_SUM: bool> NullaryFnOnce for BlockSum<'_, E, OF_SUM> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        let mut squares = [0.0; WIDE];
        let (sums, last_sums) = self.sum.as_chunks_mut::<WIDE>();
        let (terms, last_terms) = self.term.as_chunks::<WIDE>();
        for (sum, term) in sums.iter_mut().zip(terms) {
            // Read into local memory, computed, and written back: the compiler then knows that they are apart.
            let mut some = *sum;
            for place in 0..WIDE {
                some[place] = some[place].plus(term[place]);
                let x = if OF_SUM { some[place] } else { term[place] }.wide();
                squares[place] += x * x;
            }
            *sum = some;
        }
        for (place, (sum, term)) in last_sums.iter_mut().zip(last_terms).enumerate() {
            *sum = sum.plus(*term);
            let x = if OF_SUM { *sum } else { *term }.wide();
            squares[place] += x * x;
        }
        squares.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::super::magnitude;
    use super::*;

    fn tensor(len: usize, from: f64, dtype: DType) -> PlainTensor {
        let values: Vec<f64> = (0..len).map(|n| ((n as f64 + from) * 0.37).sin() * 3.0).collect();
        PlainTensor::from_data(TensorData::new(values, [len]).convert_dtype(dtype), &Device::flex())
    }

    fn bits(tensor: PlainTensor) -> Vec<u8> {
        tensor.into_data().unwrap().as_bytes().to_vec()
    }

    fn address(tensor: &PlainTensor) -> usize {
        tensor.clone().into_flex().unwrap().bytes().as_ptr().addr()
    }

    #[test]
    fn sum_and_squares_are_those_of_a_pass_for_each() {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for len in [0, 1, 31, 32, 100, BLOCK + 77] {
                let (one, other) = (tensor(len, 0.0, dtype), tensor(len, 5.5, dtype));
                let expected = bits(one.clone().add(other.clone()));
                let squares = magnitude::squares(&other.clone().into_flex().unwrap(), 1.0).unwrap();
                let (place, kept) = (address(&one), bits(other.clone()));
                let (sum, look) = one.add_and_look(&other, true);
                assert_eq!(address(&sum), place, "in place, {dtype:?} x {len}");
                assert_eq!(bits(sum), expected, "{dtype:?} x {len}");
                assert_eq!(look.squares.unwrap().to_bits(), squares.to_bits(), "{dtype:?} x {len}");
                assert_eq!(look.finite, Some(true));
                assert_eq!(bits(other.clone()), kept);
                let (sum, squares) = tensor(len, 0.0, dtype).add_and_measure(&other);
                assert_eq!(bits(sum.clone()), expected, "{dtype:?} x {len}");
                let measured = magnitude::squares(&sum.into_flex().unwrap(), 1.0).unwrap();
                assert_eq!(squares.map(f64::to_bits), Some(measured.to_bits()), "{dtype:?} x {len}");
            }
        }
    }

    #[test]
    fn what_cannot_be_gone_through_side_by_side_is_added_all_the_same() {
        let (a, b) = (tensor(12, 0.0, DType::F32).reshape([3, 4]), tensor(12, 1.0, DType::F32).reshape([4, 3]));
        let turned = b.permute(&[1, 0]);
        let expected = bits(a.clone().add(turned.clone()));
        let squares = turned.look_on_host(true).squares.unwrap();
        // Another order of the elements; and a sum that somebody else holds.
        let kept = a.clone();
        for sum in [a.clone(), tensor(12, 0.0, DType::F32).reshape([3, 4])] {
            let (sum, look) = sum.add_and_look(&turned, true);
            assert_eq!((bits(sum), look.squares), (expected.clone(), Some(squares)));
        }
        assert_eq!(bits(kept), bits(a));
        // Both turned alike lie alike.
        let both = || tensor(12, 0.0, DType::F32).reshape([4, 3]).permute(&[1, 0]);
        let (sum, look) = both().add_and_look(&turned, false);
        assert_eq!(bits(sum), bits(both().add(turned)));
        assert_eq!(look, Look { squares: None, finite: Some(true) });
    }

    #[test]
    fn what_is_not_finite_is_seen() {
        let bad = |value: f64, dtype: DType| {
            let values = TensorData::new(vec![1.0, value, 2.0], [3]).convert_dtype(dtype);
            let term = PlainTensor::from_data(values, &Device::flex());
            tensor(3, 0.0, dtype).add_and_look(&term, true).1
        };
        for value in [f64::NAN, f64::INFINITY] {
            assert_eq!(bad(value, DType::F32).finite, Some(false));
            assert_eq!(bad(value, DType::BF16).finite, Some(false));
        }
        // Finite, and too large to be squared.
        assert_eq!(bad(1e200, DType::F64), Look { squares: Some(f64::INFINITY), finite: Some(true) });
    }
}
