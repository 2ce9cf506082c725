//! Structures of tensors: the inputs of a step, and its extra outputs.
//!
//! Public in [`graph`](crate::graph), whose steps take and give them.

use burn::backend::{DispatchTensor, TensorMetadata};
use burn::prelude::*;
use burn::tensor::{Bool, Int};

use crate::Error;

/// What [`TensorTree::map_tensors`] does with each tensor, in order.
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

    /// A plain value beside the tensors, or a digest of one. A captured step has it as a constant, and is captured for
    /// each value that comes.
    fn value(&mut self, _value: u64) {}
}

/// A structure of tensors that a step takes as its inputs, or gives besides the loss.
///
/// Implemented for float, int and bool tensors, tuples up to six, arrays, `Vec` and `Option`, and for `()`, `bool`,
/// integers and floats: a captured step is captured for each value of these. For a batch struct of your own, map each
/// tensor field in a fixed order:
///
/// ```
/// use burn::prelude::*;
/// use burn_parallel::{Error, graph::{TensorTree, TensorMapper}};
///
/// #[derive(Clone)]
/// struct Batch { images: Tensor<4>, targets: Tensor<1, Int> }
///
/// impl TensorTree for Batch {
///     fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
///         let (images, targets) = (self.images, self.targets).map_tensors(mapper)?;
///         Ok(Self { images, targets })
///     }
/// }
/// ```
pub trait TensorTree: Sized {
    /// Hands every tensor to `mapper`, always in the same order, and rebuilds the structure from what it returns.
    ///
    /// # Errors
    /// The first error of the mapper.
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error>;
}

macro_rules! tensor_inputs {
    ($($kind:ty),*) => {$(
        impl<const D: usize> TensorTree for Tensor<D, $kind> {
            fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
                mapper.map(self.into_dispatch()).map(Self::from_dispatch)
            }
        }
    )*};
}
tensor_inputs!(Float, Int, Bool);

macro_rules! value_inputs {
    ($($kind:ty: $digest:expr),*) => {$(
        impl TensorTree for $kind {
            fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
                let digest: fn($kind) -> u64 = $digest;
                mapper.value(digest(self));
                Ok(self)
            }
        }
    )*};
}
value_inputs!(bool: u64::from, u8: u64::from, u16: u64::from, u32: u64::from, u64: |value| value, usize: |value| value as u64);
value_inputs!(i32: |value| value as u64, i64: |value| value as u64, f32: |value| value.to_bits().into(), f64: f64::to_bits);

impl TensorTree for () {
    fn map_tensors(self, _: &mut dyn TensorMapper) -> Result<Self, Error> {
        Ok(())
    }
}

fn element<T: TensorTree>(index: usize, value: T, mapper: &mut dyn TensorMapper) -> Result<T, Error> {
    mapper.enter(index);
    let value = value.map_tensors(mapper);
    mapper.exit();
    value
}

macro_rules! tuple_inputs {
    ($($name:ident $index:tt),+) => {
        impl<$($name: TensorTree),+> TensorTree for ($($name,)+) {
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

impl<T: TensorTree> TensorTree for Vec<T> {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        self.into_iter().enumerate().map(|(index, value)| element(index, value, mapper)).collect()
    }
}

impl<T: TensorTree, const N: usize> TensorTree for [T; N] {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        let values: Vec<T> = Vec::from(self).map_tensors(mapper)?;
        let problem = "an array of inputs changed its length while it was mapped";
        values.try_into().map_err(|_| Error::Graph { problem: problem.into() })
    }
}

impl<T: TensorTree> TensorTree for Option<T> {
    fn map_tensors(self, mapper: &mut dyn TensorMapper) -> Result<Self, Error> {
        self.map(|value| value.map_tensors(mapper)).transpose()
    }
}

/// A place in a structure as text, as `1.0` for the first tensor of the second element.
pub(crate) fn place(path: &[usize]) -> String {
    path.iter().map(usize::to_string).collect::<Vec<_>>().join(".")
}

/// The structure, and the rows of the first tensor in it: the size of its first dim.
///
/// # Errors
/// Those of [`TensorTree::map_tensors`].
pub(crate) fn rows<I: TensorTree>(inputs: I) -> Result<(I, Option<usize>), Error> {
    let mut rows = RowCount::default();
    let inputs = inputs.map_tensors(&mut rows)?;
    Ok((inputs, rows.first))
}

/// The same of the inputs of a step.
///
/// # Errors
/// Also [`Error::InvalidArgument`] if none of them has rows: many an operation of burn cannot take such, and a mean
/// over them is no number.
pub(crate) fn rows_of_step<I: TensorTree>(inputs: I) -> Result<(I, Option<usize>), Error> {
    let mut rows = RowCount::default();
    let inputs = inputs.map_tensors(&mut rows)?;
    match rows {
        RowCount { first: Some(0), most: 0 } => {
            let problem = "the inputs have no rows: a rank without data takes part with no micro-batch, as in \
                           `step_micro_batches(None, ..)`, which is what `join` gives it";
            Err(Error::invalid("step", problem))
        }
        rows => Ok((inputs, rows.first)),
    }
}

/// The rows of the first tensor, and the most that one has.
#[derive(Default)]
struct RowCount {
    first: Option<usize>,
    most: usize,
}

impl TensorMapper for RowCount {
    fn map(&mut self, tensor: DispatchTensor) -> Result<DispatchTensor, Error> {
        let rows = tensor.shape().iter().next().copied();
        self.first = self.first.or(rows);
        self.most = self.most.max(rows.unwrap_or(0));
        Ok(tensor)
    }

    fn enter(&mut self, _: usize) {}

    fn exit(&mut self) {}
}
