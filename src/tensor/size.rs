//! Measures the norms of tensors, on the host or on a device.

use burn::tensor::{DType, Tensor};

use super::{PlainTensor, magnitude};
use crate::Error;

/// How the size of a gradient is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Norm {
    /// The root of the sum of the squares of all elements.
    #[default]
    L2,
    /// The largest magnitude.
    Infinity,
}

/// A sum of squares above this is taken apart, so that no sum over the ranks overflows.
const LARGE: f64 = 1e300;

/// How large something is: under [`Norm::L2`] its sum of squares, `unit * unit * sum`, taken apart since that may
/// overflow; under [`Norm::Infinity`] the `unit`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct PartialNorm {
    pub unit: f64,
    pub sum: f64,
}

impl PartialNorm {
    pub fn nothing(norm: Norm) -> Self {
        match norm {
            Norm::L2 => Self { unit: 1.0, sum: 0.0 },
            Norm::Infinity => Self { unit: 0.0, sum: 0.0 },
        }
    }

    pub fn is_finite(self) -> bool {
        self.unit.is_finite() && self.sum.is_finite()
    }

    pub fn with(self, other: Self, norm: Norm) -> Self {
        match norm {
            Norm::Infinity => {
                // A NaN on either side stays.
                let larger = self.unit.is_nan() || self.unit >= other.unit;
                if larger { self } else { other }
            }
            Norm::L2 if self.unit == other.unit => Self { unit: self.unit, sum: self.sum + other.sum },
            Norm::L2 => {
                let unit = self.unit.max(other.unit);
                let part = |size: Self| size.sum * (size.unit / unit).powi(2);
                Self { unit, sum: part(self) + part(other) }
            }
        }
    }

    pub fn norm(self, norm: Norm) -> f64 {
        match norm {
            Norm::L2 => self.unit * self.sum.sqrt(),
            Norm::Infinity => self.unit,
        }
    }
}

/// The size of each tensor. What is in host memory is read there, once; on a device there is a small reduction for
/// each, and one read for all.
///
/// # Errors
/// [`Error::UnsupportedDType`] if one has no plain floats; [`Error::InvalidArgument`] if a device cannot be read.
pub(crate) fn sizes(tensors: &[&PlainTensor], norm: Norm) -> Result<Vec<PartialNorm>, Error> {
    if tensors.iter().all(|tensor| tensor.on_flex()) {
        return tensors.iter().map(|tensor| on_host(tensor, norm)).collect();
    }
    on_device(tensors, norm)
}

fn on_host(tensor: &PlainTensor, norm: Norm) -> Result<PartialNorm, Error> {
    let tensor = tensor.clone().into_flex()?;
    if norm == Norm::Infinity {
        return Ok(PartialNorm { unit: magnitude::largest(&tensor)?, sum: 0.0 });
    }
    let sum = magnitude::squares(&tensor, 1.0)?;
    if sum < LARGE {
        return Ok(PartialNorm { unit: 1.0, sum });
    }
    let unit = magnitude::largest(&tensor)?;
    let sum = if unit.is_finite() { magnitude::squares(&tensor, unit)? } else { unit };
    Ok(PartialNorm { unit: if unit.is_finite() { unit } else { 1.0 }, sum })
}

/// By operations of the tensors' backend, whose sums of 16-bit and 32-bit floats are `f32`.
fn on_device(tensors: &[&PlainTensor], norm: Norm) -> Result<Vec<PartialNorm>, Error> {
    if norm == Norm::Infinity {
        let largest = numbers(tensors, |tensor, _| largest(tensor))?;
        return Ok(largest.into_iter().map(|unit| PartialNorm { unit, sum: 0.0 }).collect());
    }
    let sums = numbers(tensors, |tensor, _| (tensor.clone() * tensor).sum())?;
    let mut sizes: Vec<PartialNorm> = sums.into_iter().map(|sum| PartialNorm { unit: 1.0, sum }).collect();
    // Either not finite, or its squares are too large for the dtype: seldom, so it may cost more.
    let beyond: Vec<usize> =
        (0..sizes.len()).filter(|place| sizes[*place].sum.is_nan() || sizes[*place].sum >= LARGE).collect();
    if beyond.is_empty() {
        return Ok(sizes);
    }
    let tensors: Vec<&PlainTensor> = beyond.iter().map(|place| tensors[*place]).collect();
    let units = numbers(&tensors, |tensor, _| largest(tensor))?;
    let sums = numbers(&tensors, |tensor, place| {
        let scaled = tensor / units[place];
        (scaled.clone() * scaled).sum()
    })?;
    for ((place, unit), sum) in beyond.into_iter().zip(units).zip(sums) {
        let finite = unit.is_finite();
        sizes[place] = if finite { PartialNorm { unit, sum } } else { PartialNorm { unit: 1.0, sum: unit } };
    }
    Ok(sizes)
}

/// The largest magnitude; infinite if an element is not finite. Whether a maximum keeps a NaN differs between devices.
fn largest(tensor: Tensor<1>) -> Tensor<1> {
    let nan = tensor.clone().is_nan();
    tensor.abs().mask_fill(nan, f32::INFINITY).max()
}

/// One number of each tensor, brought to the host together.
fn numbers(tensors: &[&PlainTensor], number: impl Fn(Tensor<1>, usize) -> Tensor<1>) -> Result<Vec<f64>, Error> {
    let wide = tensors.iter().any(|tensor| tensor.dtype() == DType::F64);
    let dtype = if wide { DType::F64 } else { DType::F32 };
    let mut made = Vec::with_capacity(tensors.len());
    for (place, tensor) in tensors.iter().enumerate() {
        let elements = tensor.elements();
        let flat = (*tensor).clone().reshape([elements]).float::<1>()?;
        let flat = if matches!(flat.dtype(), DType::F64 | DType::F32) { flat } else { flat.cast(DType::F32) };
        made.push(match elements {
            0 => Tensor::zeros([1], (&flat.device(), dtype)),
            _ => {
                let one = number(flat, place);
                if one.dtype() == dtype { one } else { one.cast(dtype) }
            }
        });
    }
    let data = PlainTensor::from(Tensor::cat(made, 0)).into_data()?;
    data.convert::<f64>().try_into_vec().map_err(|problem| {
        Error::invalid("clip_grad_norm", format!("the sizes of the gradients cannot be read: {problem:?}"))
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn plain(values: Vec<f64>, dtype: DType) -> PlainTensor {
        let len = values.len();
        Tensor::<1>::from_data(TensorData::new(values, [len]), (&Device::flex(), dtype)).into()
    }

    fn norms(values: &[Vec<f64>], dtype: DType, norm: Norm) -> [f64; 2] {
        let tensors: Vec<PlainTensor> = values.iter().map(|values| plain(values.clone(), dtype)).collect();
        let tensors: Vec<&PlainTensor> = tensors.iter().collect();
        [on_device(&tensors, norm).unwrap(), sizes(&tensors, norm).unwrap()].map(|sizes| {
            sizes.into_iter().fold(PartialNorm::nothing(norm), |sum, size| sum.with(size, norm)).norm(norm)
        })
    }

    #[test]
    fn the_device_and_the_host_agree() {
        let values = vec![vec![3.0, -4.0], vec![12.0], vec![], vec![84.0, 0.0, 0.0]];
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            assert_eq!(norms(&values, dtype, Norm::L2), [85.0; 2], "{dtype:?}");
            assert_eq!(norms(&values, dtype, Norm::Infinity), [84.0; 2], "{dtype:?}");
        }
    }

    #[test]
    fn squares_that_overflow_are_no_reason_to_call_a_norm_infinite() {
        let close = |found: [f64; 2], expected: f64| {
            assert!(found.iter().all(|norm| (norm / expected - 1.0).abs() < 1e-6), "{found:?}, not {expected}");
        };
        close(norms(&[vec![3e30, -4e30], vec![1.0]], DType::F32, Norm::L2), 5e30);
        close(norms(&[vec![3e200, 0.0], vec![4e200], vec![1e-3]], DType::F64, Norm::L2), 5e200);
        close(norms(&[vec![3e150], vec![4e150]], DType::F64, Norm::L2), 5e150);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for non_finite in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
                for norm in [Norm::L2, Norm::Infinity] {
                    for place in 0..3 {
                        let mut values = vec![vec![1.0, 2.0], vec![3.0], vec![1e2]];
                        values[place][0] = non_finite;
                        assert!(
                            norms(&values, dtype, norm).iter().all(|norm| !norm.is_finite()),
                            "{non_finite} {dtype:?}"
                        );
                    }
                }
            }
        }
    }
}
