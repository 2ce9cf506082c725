//! Structures of tensors: the inputs of a step, and its extra outputs.

use burn::backend::DispatchTensor;
use burn::prelude::*;
use burn::tensor::{Bool, Int};

use super::graph_error;
use crate::error::Error;

/// What [`GraphInputs::map_tensors`] does with each tensor, in order.
pub trait TensorMapper {
    /// Maps one tensor of any kind. The result must have the kind and the rank of `tensor`.
    ///
    /// # Errors
    /// Whatever the mapper finds wrong with the tensor.
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error>;

    /// Called before the tensors of element `index` of a tuple, array or list.
    fn enter(&mut self, index: usize);

    /// Called after them.
    fn exit(&mut self);
}

/// A structure of tensors that a step takes as its inputs, or gives besides the loss.
///
/// Implemented for float, int and bool tensors, `()`, tuples up to six, arrays, `Vec` and `Option`. For a batch struct of
/// your own, map each tensor field in a fixed order:
///
/// ```
/// use burn::prelude::*;
/// use burn_parallel::{Error, graph::{GraphInputs, TensorMapper}};
///
/// #[derive(Clone)]
/// struct Batch { images: Tensor<4>, targets: Tensor<1, Int> }
///
/// impl GraphInputs for Batch {
///     fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
///         let (images, targets) = (self.images, self.targets).map_tensors(mapper)?;
///         Ok(Self { images, targets })
///     }
/// }
/// ```
pub trait GraphInputs: Sized {
    /// Hands every tensor to `mapper`, always in the same order, and rebuilds the structure from what it returns.
    ///
    /// # Errors
    /// The first error of the mapper.
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error>;
}

macro_rules! tensor_inputs {
    ($($kind:ty),*) => {$(
        impl<const D: usize> GraphInputs for Tensor<D, $kind> {
            fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
                mapper.map(self.into_dispatch()).map(Self::from_dispatch)
            }
        }
    )*};
}
tensor_inputs!(Float, Int, Bool);

impl GraphInputs for () {
    fn map_tensors(self, _: &mut dyn TensorMapper) -> Result<Self, Error> {
        Ok(())
    }
}

fn element<T: GraphInputs>(index: usize, value: T, mapper: &mut dyn TensorMapper) -> Result<T, Error> {
    mapper.enter(index);
    let value = value.map_tensors(mapper);
    mapper.exit();
    value
}

macro_rules! tuple_inputs {
    ($($name:ident $index:tt),+) => {
        impl<$($name: GraphInputs),+> GraphInputs for ($($name,)+) {
            fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
                Ok(($(element($index, self.$index, mapper)?,)+))
            }
        }
    };
}
tuple_inputs!(A 0);
tuple_inputs!(A 0, B 1);
tuple_inputs!(A 0, B 1, C 2);
tuple_inputs!(A 0, B 1, C 2, D 3);
tuple_inputs!(A 0, B 1, C 2, D 3, E 4);
tuple_inputs!(A 0, B 1, C 2, D 3, E 4, F 5);

impl<T: GraphInputs> GraphInputs for Vec<T> {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        self.into_iter().enumerate().map(|(index, value)| element(index, value, mapper)).collect()
    }
}

impl<T: GraphInputs, const N: usize> GraphInputs for [T; N] {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        let values: Vec<T> = Vec::from(self).map_tensors(mapper)?;
        values.try_into().map_err(|_| graph_error("an array of inputs changed its length while it was mapped"))
    }
}

impl<T: GraphInputs> GraphInputs for Option<T> {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        self.map(|value| value.map_tensors(mapper)).transpose()
    }
}
