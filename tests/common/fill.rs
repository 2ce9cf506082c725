//! Numbers that are the same in every run, for batches and parameters: burn draws from a generator that all tests of a
//! process share.

use burn::module::{Module, ModuleMapper, Param};
use burn::prelude::*;
use burn::tensor::{DType, TensorData};

/// Numbers in [-1, 1) that are the same everywhere.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn tensor<const D: usize>(&mut self, shape: [usize; D], device: &Device) -> Tensor<D> {
        let n = shape.iter().product();
        Tensor::from_data(TensorData::new((0..n).map(|_| self.next()).collect::<Vec<f32>>(), shape), device)
    }

    pub fn class(&mut self, classes: usize) -> i64 {
        ((self.next() + 1.0) / 2.0 * classes as f32) as i64 % classes as i64
    }

    pub fn classes<const D: usize>(&mut self, shape: [usize; D], classes: usize, device: &Device) -> Tensor<D, Int> {
        let n = shape.iter().product();
        Tensor::from_data(TensorData::new((0..n).map(|_| self.class(classes)).collect::<Vec<i64>>(), shape), device)
    }
}

/// Replaces the values of every trained parameter by what the rule makes of its dims and of the values that burn has
/// drawn, unless that is `None`.
struct Fill<R>(R);

impl<R: FnMut(&[usize], &dyn Fn() -> Vec<f32>) -> Option<Vec<f32>>> ModuleMapper for Fill<R> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        let drawn = || value.clone().inner().into_data().convert::<f32>().try_into_vec::<f32>().unwrap();
        let new = value.is_require_grad().then(|| (self.0)(&value.dims(), &drawn)).flatten();
        let value = match new {
            Some(new) => {
                let new = Tensor::<D>::from_data(TensorData::new(new, value.shape()), &value.device());
                new.cast(value.dtype()).detach().require_grad()
            }
            None => value,
        };
        Param::from_mapped_value(id, value, mapper)
    }
}

/// A model with values at the scale of burn's own; what burn makes constant, as biases, stays so.
pub fn seeded<M: Module>(model: M) -> M {
    let mut numbers = Numbers(7);
    model.map(&mut Fill(|dims: &[usize], drawn: &dyn Fn() -> Vec<f32>| {
        let drawn = drawn();
        let bound = (dims[dims.len() - 1] as f32 / drawn.len() as f32).sqrt().min(0.5);
        let constant = drawn.iter().all(|x| *x == drawn[0]);
        (!constant).then(|| drawn.iter().map(|_| numbers.next() * bound).collect())
    }))
}

/// A model in which every parameter has values that differ, biases and those of norms too.
pub fn filled<M: Module>(model: M) -> M {
    filled_from(7, model)
}

/// [`filled`], with other numbers for each seed.
pub fn filled_from<M: Module>(seed: u64, model: M) -> M {
    let mut numbers = Numbers(seed);
    model.train().map(&mut Fill(|dims: &[usize], _: &dyn Fn() -> Vec<f32>| {
        let (scale, mean) = if dims.len() > 1 { (1.0 / (dims[0] as f32).sqrt(), 0.0) } else { (0.5, 0.3) };
        Some((0..dims.iter().product()).map(|_| numbers.next() * scale + mean).collect())
    }))
}

/// A model whose floats are of another dtype, each trained or not as before.
pub fn cast<M: Module>(model: M, dtype: impl Into<DType>) -> M {
    struct Cast(DType);
    impl ModuleMapper for Cast {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (id, value, mapper) = param.consume();
            let trained = value.is_require_grad();
            Param::from_mapped_value(id, value.cast(self.0).detach().set_require_grad(trained), mapper)
        }
    }
    model.map(&mut Cast(dtype.into()))
}
