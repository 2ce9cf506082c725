//! A plain array: the reference, which shares no code with what it judges.

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_parallel::comm::part;

#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    pub dims: Vec<usize>,
    pub values: Vec<f64>,
}

impl Dense {
    /// Small integers, which every float dtype holds and adds exactly.
    pub fn integers(dims: &[usize], seed: u64) -> Self {
        let value = |index: usize| {
            let mixed =
                (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ seed.wrapping_mul(0xbf58_476d_1ce4_e5b9));
            ((mixed >> 33) % 7) as f64 - 3.0
        };
        Self { dims: dims.to_vec(), values: (0..dims.iter().product()).map(value).collect() }
    }

    /// Values between -1 and 1.
    pub fn fractions(dims: &[usize], seed: u64) -> Self {
        let (coarse, fine) = (Self::integers(dims, seed), Self::integers(dims, seed ^ 0x5555));
        let values = coarse.values.iter().zip(&fine.values).map(|(a, b)| a / 4.0 + b / 13.0).collect();
        Self { dims: dims.to_vec(), values }
    }

    pub fn zeros(dims: &[usize]) -> Self {
        Self { dims: dims.to_vec(), values: vec![0.0; dims.iter().product()] }
    }

    pub fn sum(all: impl IntoIterator<Item = Self>) -> Self {
        let add = |mut total: Self, next: Self| {
            assert_eq!(total.dims, next.dims);
            total.values.iter_mut().zip(next.values).for_each(|(total, value)| *total += value);
            total
        };
        all.into_iter().reduce(add).expect("at least one")
    }

    /// Some of the rows along `dim`.
    pub fn rows(&self, dim: usize, range: std::ops::Range<usize>) -> Self {
        let inner: usize = self.dims[dim + 1..].iter().product();
        let chosen = |index: &usize| range.contains(&(index / inner.max(1) % self.dims[dim].max(1)));
        let values = (0..self.values.len()).filter(chosen).map(|index| self.values[index]).collect();
        let mut dims = self.dims.clone();
        dims[dim] = range.len();
        Self { dims, values }
    }

    /// The part of `rank` of `size` along `dim`.
    pub fn part(&self, dim: usize, size: usize, rank: usize) -> Self {
        self.rows(dim, part(self.dims[dim], size, rank))
    }

    pub fn tensor<const D: usize>(&self, device: &Device, dtype: DType) -> Tensor<D> {
        Tensor::from_data(TensorData::new(self.values.clone(), self.dims.clone()), (device, dtype))
    }

    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        let data = tensor.clone().inner().into_data();
        Self { dims: tensor.dims().to_vec(), values: data.iter::<f64>().collect() }
    }

    #[track_caller]
    pub fn assert_near(&self, expected: &Self, tolerance: f64, what: &str) {
        assert_eq!(self.dims, expected.dims, "{what}");
        for (index, (a, b)) in self.values.iter().zip(&expected.values).enumerate() {
            assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{what}: {a} for {b} at {index}");
        }
    }
}
