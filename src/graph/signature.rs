//! What a captured step depends on in a module, read without changing it.

use burn::module::{Flag, Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Int, Shape, Tensor};

use crate::error::Error;
use crate::params::{LazyParam, NewDims};

/// The tensors and training flags of a module, in the order in which a visitor meets them: two modules that have the same
/// are captured as the same graph.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Signature {
    tensors: Vec<(ParamId, Shape, DType, TensorUse)>,
    flags: Vec<(ParamId, bool)>,
    /// Whether something that is trained is on a device without autodiff.
    plain: bool,
}

/// What a capture makes of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum TensorUse {
    Trained,
    Frozen,
    /// An int or bool.
    Index,
}

impl Signature {
    /// The signature for a training step, which a capture takes in training mode: a parameter on a plain device has its
    /// training settings switched on. Float parameters have the dims that `dims` says, as in
    /// [`meta_module`](crate::params::meta_module).
    ///
    /// Lazy parameters are not made, and no autodiff leaf is, but for those whose training setting shows in no other way:
    /// lazy ones, and trained ones on a plain device.
    pub(crate) fn of_step<M: Module>(module: &M, dims: &NewDims) -> Self {
        Self::of(module, dims, true)
    }

    /// The signature for a forward alone, which a capture takes in evaluation mode: nothing is trained, no flag is on.
    pub(crate) fn of_forward<M: Module>(module: &M, dims: &NewDims) -> Self {
        Self::of(module, dims, false)
    }

    fn of<M: Module>(module: &M, dims: &NewDims, trains: bool) -> Self {
        let mut visitor =
            ReadSignature { dims, trains, found: Self { tensors: Vec::new(), flags: Vec::new(), plain: false } };
        module.visit(&mut visitor);
        visitor.found
    }

    /// Demands that burn's optimizers can train the model: that it is on a device with autodiff.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it is not.
    pub(crate) fn can_train(&self) -> Result<(), Error> {
        if !self.plain {
            return Ok(());
        }
        let problem = "the model is on a device without autodiff, where burn's optimizers do not train: make it on \
                       `device.autodiff()` (`fork` keeps what a model was made with), or call `train` on it";
        Err(Error::invalid("step", problem))
    }

    /// Whether all float parameters are known.
    pub(crate) fn is_known(&self, known: impl Fn(ParamId) -> bool) -> bool {
        self.tensors.iter().all(|(id, .., used)| *used == TensorUse::Index || known(*id))
    }
}

struct ReadSignature<'a> {
    dims: &'a NewDims<'a>,
    trains: bool,
    found: Signature,
}

impl ModuleVisitor for ReadSignature<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (found, dtype, trained) = if param.is_initialized() {
            let value = param.base();
            let trained = self.trains
                && match value.is_autodiff() {
                    true => value.is_require_grad(),
                    false => param.clone().train().is_require_grad(),
                };
            self.found.plain |= trained && !value.is_autodiff();
            (value.shape(), value.dtype(), trained)
        } else {
            let LazyParam { placeholder, trained, device } = LazyParam::of(param);
            self.found.plain |= trained && self.trains && !device.is_autodiff();
            (param.lazy_shape(), placeholder.base().dtype(), trained && self.trains)
        };
        let shape = (self.dims)(param.id, found.as_slice()).map_or(found, Shape::from);
        let used = if trained { TensorUse::Trained } else { TensorUse::Frozen };
        self.found.tensors.push((param.id, shape, dtype, used));
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let value = param.val();
        self.found.tensors.push((param.id, value.shape(), value.dtype(), TensorUse::Index));
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        let value = param.val();
        self.found.tensors.push((param.id, value.shape(), value.dtype(), TensorUse::Index));
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        if self.trains {
            self.found.flags.push((flag.id, flag.clone().train().is_enabled()));
        }
    }
}
