//! Sums of squares over tensors that are on the host or on a device.

use burn::tensor::{DType, Tensor};

use super::{PlainTensor, magnitude};
use crate::Error;

/// What a look at a tensor tells, as far as it is in host memory.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Look {
    /// The sum of the squares of its elements, if that was wanted.
    pub squares: Option<f64>,
    /// Whether no element is NaN or infinite.
    pub finite: Option<bool>,
}

/// How many elements this thread has looked at, and of how many it was to sum up the squares: tests count them.
#[cfg(test)]
pub(crate) mod looked {
    use std::cell::Cell;

    thread_local! {
        static ELEMENTS: Cell<[usize; 2]> = const { Cell::new([0; 2]) };
    }

    pub(in crate::tensor) fn add(elements: usize, squares: bool) {
        let [all, squared] = ELEMENTS.get();
        ELEMENTS.set([all + elements, squared + if squares { elements } else { 0 }]);
    }

    /// Those since the last call.
    pub(crate) fn take() -> [usize; 2] {
        ELEMENTS.take()
    }
}

/// A sum of squares: of tensors in host memory, and of those on a device, which is read at the end.
#[derive(Debug, Default)]
pub(crate) struct Squares {
    host: f64,
    device: Option<Tensor<1>>,
}

impl Squares {
    /// Adds the squares of a tensor. `known` is their sum, if somebody has it.
    ///
    /// # Errors
    /// [`Error::UnsupportedDType`] if it has no plain floats.
    pub(crate) fn add(&mut self, tensor: &PlainTensor, known: Option<f64>) -> Result<(), Error> {
        if let Some(squares) = known {
            self.host += squares;
            return Ok(());
        }
        #[cfg(test)]
        looked::add(tensor.elements(), true);
        if tensor.on_flex() {
            self.host += magnitude::squares(&tensor.clone().into_flex()?, 1.0)?;
            return Ok(());
        }
        let elements = tensor.elements();
        if elements == 0 {
            return Ok(());
        }
        let flat = tensor.clone().reshape([elements]).float::<1>()?;
        let flat = if flat.dtype() == DType::F64 { flat } else { flat.cast(DType::F32) };
        self.add_on_device((flat.clone() * flat).sum());
        Ok(())
    }

    fn add_on_device(&mut self, sum: Tensor<1>) {
        self.device = Some(match self.device.take() {
            Some(before) if before.dtype() != sum.dtype() => before.cast(DType::F64) + sum.cast(DType::F64),
            Some(before) => before + sum,
            None => sum,
        });
    }

    /// Adds another sum, multiplied by a factor.
    pub(crate) fn add_scaled(&mut self, other: Self, factor: f64) {
        self.host += other.host * factor;
        if let Some(sum) = other.device {
            self.add_on_device(sum.mul_scalar(factor));
        }
    }

    /// The sum.
    pub(crate) fn read(self) -> f64 {
        self.host + self.device.map_or(0.0, Tensor::into_scalar::<f64>)
    }
}

impl PlainTensor {
    /// In one pass over the elements of a tensor in host memory: the sum of their squares, if `wanted`, and whether all
    /// of them are finite. Nothing of a tensor that is elsewhere, or of no plain floats.
    pub(crate) fn look_on_host(&self, wanted: bool) -> Look {
        let Some(tensor) = self.on_flex().then(|| self.clone().into_flex().ok()).flatten() else {
            return Look::default();
        };
        #[cfg(test)]
        looked::add(self.elements(), wanted);
        let squares = if wanted { magnitude::squares(&tensor, 1.0).ok() } else { None };
        // The squares of large elements of `f64` overflow.
        let finite = match squares {
            Some(squares) if squares.is_finite() => Some(true),
            _ => magnitude::is_finite(&tensor).ok(),
        };
        Look { squares, finite }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    #[test]
    fn one_look_tells_squares_and_finiteness() {
        let look = |values: Vec<f64>, dtype: DType| {
            let data = TensorData::new(values, [3]).convert_dtype(dtype);
            PlainTensor::from_data(data, &Device::flex()).look_on_host(true)
        };
        let told = |squares, finite| Look { squares, finite: Some(finite) };
        assert_eq!(look(vec![1.0, -2.0, 3.0], DType::F32), told(Some(14.0), true));
        let bad = look(vec![1.0, f64::NAN, 3.0], DType::F32);
        assert!(bad.squares.unwrap().is_nan() && bad.finite == Some(false));
        // Finite, and too large to be squared.
        assert_eq!(look(vec![1.0, 1e200, 3.0], DType::F64), told(Some(f64::INFINITY), true));
        let unasked = PlainTensor::from_data(TensorData::new(vec![1.0f32], [1]), &Device::flex());
        assert_eq!(unasked.look_on_host(false), told(None, true));
    }
}
