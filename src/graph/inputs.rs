//! Structures of tensors: the inputs of a step, and its extra outputs.

use burn::backend::flex::FlexTensor;
use burn::backend::{BackendTensor, DispatchKindConversion, DispatchTensor, Flex, TensorMetadata};
use burn::prelude::*;
use burn::tensor::{Bool, DType, Int};
use burn_ir::HandleKind;

use super::graph_error;
use crate::comm::Payload;
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

/// A plain Flex tensor of any kind, as a result of a step.
#[derive(Clone, Debug)]
pub enum GraphTensor {
    /// A float tensor.
    Float(FlexTensor),
    /// An int tensor.
    Int(FlexTensor),
    /// A bool tensor.
    Bool(FlexTensor),
}

impl GraphTensor {
    /// The tensor as an ordinary float tensor of rank `D`, without a copy.
    ///
    /// # Errors
    /// [`Error::Graph`] if it is of another kind or rank.
    pub fn float<const D: usize>(self) -> Result<Tensor<D>, Error> {
        match self {
            Self::Float(tensor) if tensor.layout().shape().num_dims() == D => {
                Ok(Tensor::from_primitive::<Flex>(tensor))
            }
            other => Err(other.mismatch("float", D)),
        }
    }

    /// The tensor as an ordinary int tensor of rank `D`, without a copy.
    ///
    /// # Errors
    /// [`Error::Graph`] if it is of another kind or rank.
    pub fn int<const D: usize>(self) -> Result<Tensor<D, Int>, Error> {
        match self {
            Self::Int(tensor) if tensor.layout().shape().num_dims() == D => Ok(Tensor::from_primitive::<Flex>(tensor)),
            other => Err(other.mismatch("int", D)),
        }
    }

    /// The tensor as an ordinary bool tensor of rank `D`, without a copy.
    ///
    /// # Errors
    /// [`Error::Graph`] if it is of another kind or rank.
    pub fn bool<const D: usize>(self) -> Result<Tensor<D, Bool>, Error> {
        match self {
            Self::Bool(tensor) if tensor.layout().shape().num_dims() == D => Ok(Tensor::from_primitive::<Flex>(tensor)),
            other => Err(other.mismatch("bool", D)),
        }
    }

    fn mismatch(&self, wanted: &str, rank: usize) -> Error {
        let tensor = self.tensor();
        graph_error(format!(
            "an output was asked for as a {wanted} tensor of rank {rank}, but it is {:?} of shape {:?}",
            tensor.dtype(),
            tensor.layout().shape().as_slice()
        ))
    }

    /// A tensor as the kind that its dtype says.
    pub(crate) fn of_dtype(tensor: FlexTensor, dtype: DType) -> Self {
        match dtype {
            dtype if dtype.is_float() => Self::Float(tensor),
            dtype if dtype.is_bool() => Self::Bool(tensor),
            _ => Self::Int(tensor),
        }
    }

    pub(crate) fn tensor(&self) -> &FlexTensor {
        match self {
            Self::Float(tensor) | Self::Int(tensor) | Self::Bool(tensor) => tensor,
        }
    }

    pub(crate) fn into_tensor(self) -> FlexTensor {
        match self {
            Self::Float(tensor) | Self::Int(tensor) | Self::Bool(tensor) => tensor,
        }
    }

    pub(crate) fn into_dispatch(self) -> DispatchTensor {
        match self {
            Self::Float(tensor) => Tensor::<1>::from_primitive::<Flex>(tensor).into_dispatch(),
            Self::Int(tensor) => Tensor::<1, Int>::from_primitive::<Flex>(tensor).into_dispatch(),
            Self::Bool(tensor) => Tensor::<1, Bool>::from_primitive::<Flex>(tensor).into_dispatch(),
        }
    }

    pub(crate) fn into_handle(self) -> HandleKind<Flex> {
        match self {
            Self::Float(tensor) => HandleKind::Float(tensor),
            Self::Int(tensor) => HandleKind::Int(tensor),
            Self::Bool(tensor) => HandleKind::Bool(tensor),
        }
    }

    pub(crate) fn from_handle(handle: HandleKind<Flex>) -> Result<Self, Error> {
        match handle {
            HandleKind::Float(tensor) => Ok(Self::Float(tensor)),
            HandleKind::Int(tensor) => Ok(Self::Int(tensor)),
            HandleKind::Bool(tensor) => Ok(Self::Bool(tensor)),
            HandleKind::Quantized(_) => Err(graph_error("a step cannot give a quantized tensor")),
        }
    }

    /// A user's tensor, with or without autodiff, as a plain Flex primitive sharing its buffer.
    pub(crate) fn from_user(tensor: DispatchTensor, what: &str) -> Result<Self, Error> {
        let dtype = tensor.dtype();
        // The kind of a dispatch tensor follows from its dtype.
        let plain = if dtype.is_float() {
            without_autodiff(Tensor::<1>::from_dispatch(tensor))
        } else if dtype.is_bool() {
            without_autodiff(Tensor::<1, Bool>::from_dispatch(tensor))
        } else if dtype.is_int() || dtype.is_uint() {
            without_autodiff(Tensor::<1, Int>::from_dispatch(tensor))
        } else {
            return Err(graph_error(format!("{what} is {dtype:?}: quantized tensors cannot enter a graph")));
        };
        match <DispatchTensor as DispatchKindConversion<Flex>>::try_into_backend(plain) {
            Ok(BackendTensor::Float(tensor)) => Ok(Self::Float(tensor)),
            Ok(BackendTensor::Int(tensor)) => Ok(Self::Int(tensor)),
            Ok(BackendTensor::Bool(tensor)) => Ok(Self::Bool(tensor)),
            Ok(_) => Err(graph_error(format!("{what} is neither a float, an int nor a bool tensor"))),
            Err(problem) => Err(graph_error(format!("{what} must be on Device::flex(), where graphs run: {problem}"))),
        }
    }
}

/// A tensor of any rank and kind travels as it is.
impl Payload for GraphTensor {
    type Home = ();

    fn fixed_dtype() -> Option<DType> {
        None
    }

    fn into_host(self) -> Result<(FlexTensor, ()), Error> {
        Ok((self.into_tensor(), ()))
    }

    fn from_host(data: FlexTensor, (): &()) -> Result<Self, Error> {
        let dtype = data.dtype();
        Ok(Self::of_dtype(data, dtype))
    }
}

// A primitive carries no static rank: the `D` of the tensor in between is not looked at.
fn without_autodiff<K: burn::tensor::kind::Autodiff>(tensor: Tensor<1, K>) -> DispatchTensor {
    tensor.inner().into_dispatch()
}
