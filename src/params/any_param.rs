//! Parameters of any kind and rank.

use burn::backend::{DispatchTensor, GradientCheckpointingStrategy};
use burn::module::{Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Bool, DType, Device, Gradients, Int, Tensor};

use super::leaf::LazyParam;
use crate::Error;
use crate::tensor::PlainTensor;

/// A float, int or bool parameter, or a running statistic. A lazy one stays lazy unless its [value](Self::value) is
/// asked for.
pub(crate) trait AnyParam: 'static {
    fn id(&self) -> ParamId;

    fn is_float(&self) -> bool {
        false
    }

    fn is_lazy(&self) -> bool;

    fn dims(&self) -> Vec<usize>;

    /// Its dtype. An int or bool that is lazy has that of its device.
    fn dtype(&self) -> DType;

    /// Whether it requires a gradient.
    fn is_trained(&self) -> bool {
        false
    }

    /// Whether training mode makes it require a gradient, also on a device without autodiff.
    fn trains(&self) -> bool {
        false
    }

    /// Its device, with autodiff if it has that.
    fn device(&self) -> Device;

    /// How its operations take part in gradient checkpointing; `None` without autodiff.
    fn checkpointing(&self) -> Option<GradientCheckpointingStrategy> {
        None
    }

    /// Its value as the module uses it. Makes it if it is lazy.
    fn value(&self) -> DispatchTensor;

    /// Its value before any reparameterization. Makes it if it is lazy.
    fn base(&self) -> DispatchTensor;

    /// The same parameter, to be kept. If it is lazy, what makes one of them makes the other.
    fn kept(&self) -> Box<dyn AnyParam>;

    /// Takes its gradient out of those that burn's backward has given. Makes it if it is lazy.
    fn take_gradient(&self, _grads: &mut Gradients) -> Option<PlainTensor> {
        None
    }

    /// Puts its gradient among those that burn's optimizers take.
    ///
    /// # Errors
    /// [`Error::Graph`] if it is of another rank.
    fn put_gradient(&self, _gradient: PlainTensor, _grads: &mut GradientsParams) -> Result<(), Error> {
        Ok(())
    }
}

/// What all kinds of parameters have in common.
macro_rules! common {
    () => {
        fn id(&self) -> ParamId {
            self.id
        }

        fn is_lazy(&self) -> bool {
            !Param::is_initialized(self)
        }

        fn dims(&self) -> Vec<usize> {
            self.lazy_shape().to_vec()
        }

        fn device(&self) -> Device {
            if Param::is_initialized(self) { Param::base(self).device() } else { self.lazy_device() }
        }

        fn value(&self) -> DispatchTensor {
            self.val().into_dispatch()
        }

        fn base(&self) -> DispatchTensor {
            Param::base(self).into_dispatch()
        }

        fn kept(&self) -> Box<dyn AnyParam> {
            Box::new(self.clone())
        }
    };
}

impl<const D: usize> AnyParam for Param<Tensor<D>> {
    common!();

    fn is_float(&self) -> bool {
        true
    }

    fn dtype(&self) -> DType {
        match Param::is_initialized(self) {
            true => Param::base(self).dtype(),
            false => LazyParam::of(self).placeholder.base().dtype(),
        }
    }

    fn is_trained(&self) -> bool {
        if Param::is_initialized(self) { Param::base(self).is_require_grad() } else { LazyParam::of(self).trained }
    }

    fn trains(&self) -> bool {
        match Param::is_initialized(self) {
            true if Param::base(self).is_autodiff() => Param::base(self).is_require_grad(),
            true => self.clone().train().is_require_grad(),
            false => LazyParam::of(self).trained,
        }
    }

    fn checkpointing(&self) -> Option<GradientCheckpointingStrategy> {
        let one = if Param::is_initialized(self) { Param::base(self) } else { LazyParam::of(self).placeholder.base() };
        one.gradient_checkpointing_strategy()
    }

    fn take_gradient(&self, grads: &mut Gradients) -> Option<PlainTensor> {
        Param::base(self).grad_remove(grads).map(PlainTensor::from)
    }

    fn put_gradient(&self, gradient: PlainTensor, grads: &mut GradientsParams) -> Result<(), Error> {
        grads.register(self.id, gradient.float::<D>()?);
        Ok(())
    }
}

impl<const D: usize> AnyParam for Param<Tensor<D, Int>> {
    common!();

    fn dtype(&self) -> DType {
        match Param::is_initialized(self) {
            true => Param::base(self).dtype(),
            false => self.lazy_device().settings().int_dtype.into(),
        }
    }
}

impl<const D: usize> AnyParam for Param<Tensor<D, Bool>> {
    common!();

    fn dtype(&self) -> DType {
        match Param::is_initialized(self) {
            true => Param::base(self).dtype(),
            false => self.lazy_device().settings().bool_dtype.into(),
        }
    }
}
