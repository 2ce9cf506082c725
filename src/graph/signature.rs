//! The signature of a module: what a captured step depends on in it.

use burn::module::ParamId;
use burn::tensor::{DType, Shape};

use crate::Error;
use crate::params::{FoundParams, NewDims};

/// The tensors and training flags of a module, in the order in which a visitor meets them: two modules that have the
/// same are captured as the same graph.
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
    /// Lazy parameters are not made, and no autodiff leaf is, but for those whose training setting shows in no other
    /// way: lazy ones, and trained ones on a plain device.
    pub(crate) fn of_step(params: &FoundParams, dims: &NewDims) -> Self {
        Self::of(params, dims, true)
    }

    /// The signature for a forward alone, which a capture takes in evaluation mode: nothing is trained, no flag is on.
    pub(crate) fn of_forward(params: &FoundParams, dims: &NewDims) -> Self {
        Self::of(params, dims, false)
    }

    fn of(params: &FoundParams, dims: &NewDims, trains: bool) -> Self {
        let mut plain = false;
        let tensors = params.all().map(|param| {
            let (id, found) = (param.id(), param.dims());
            if !param.is_float() {
                return (id, Shape::from(found), param.dtype(), TensorUse::Index);
            }
            let trained = trains && param.trains();
            plain |= trained && !param.device().is_autodiff();
            let shape = Shape::from(dims(id, &found).unwrap_or(found));
            (id, shape, param.dtype(), if trained { TensorUse::Trained } else { TensorUse::Frozen })
        });
        let tensors = tensors.collect();
        let flags = if trains { params.flags().to_vec() } else { Vec::new() };
        Self { tensors, flags, plain }
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
