//! A plain array: the reference, which shares no code with what it judges.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
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

/// What a rank holds, by the ids of the parameters: values, or gradients, of which each must have one.
pub fn parameters<M: Module>(model: &M, gradients: Option<&GradientsParams>) -> BTreeMap<String, Dense> {
    struct Parameters<'a>(Option<&'a GradientsParams>, BTreeMap<String, Dense>);
    impl ModuleVisitor for Parameters<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let dense = match self.0 {
                None => Dense::of(&param.val()),
                Some(gradients) => Dense::of(&gradients.get::<D>(param.id).expect("every parameter is used")),
            };
            assert!(self.1.insert(param.id.to_string(), dense).is_none());
        }
    }
    let mut visitor = Parameters(gradients, BTreeMap::new());
    model.visit(&mut visitor);
    visitor.1
}

/// Fills every parameter with numbers of a seed, in a dtype, small enough for sums over the first dim to stay near 1.
pub fn filled<M: Module>(model: M, seed: u64, device: &Device, dtype: DType) -> M {
    struct Fill<'a>(u64, &'a Device, DType);
    impl ModuleMapper for Fill<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            self.0 += 1;
            let (id, value, _) = param.consume();
            let mut dense = Dense::fractions(&value.dims(), self.0);
            let scale = (value.dims()[0] as f64).sqrt();
            dense.values.iter_mut().for_each(|value| *value /= scale);
            Param::initialized(id, dense.tensor(self.1, self.2).require_grad())
        }
    }
    model.map(&mut Fill(seed * 100, device, dtype))
}
