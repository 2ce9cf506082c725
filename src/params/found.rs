//! What one walk has found of the parameters of a module: a step looks at this, and does not go over the module again.

use std::ops::Deref;

use burn::module::{Flag, Module, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Device;

use super::any_param::AnyParam;
use super::device::one_device;
use super::walk::{ModulePath, ParamRef, path_at, visit_params_and_flags};
use crate::Error;
use crate::tensor::PlainTensor;

/// The parameters of a module, running statistics included, and its training flags, in the order in which a visitor
/// meets them. What stands for a parameter of which the module holds rows is none.
///
/// Within a step a module does not change: values are those that it has, and what is lazy in one is made for both. But
/// running statistics move, and have here the values that they had. An optimizer updates in place what nobody else
/// holds, so it comes after this is dropped.
pub struct FoundParams {
    params: Vec<FoundParam>,
    /// Whether each flag is on in training mode.
    flags: Vec<(ParamId, bool)>,
    statistics_moved: bool,
}

/// A parameter that was found.
pub(crate) struct FoundParam {
    param: Box<dyn AnyParam>,
    /// How many a visitor meets before it.
    place: usize,
}

impl FoundParams {
    pub(crate) fn of<M: Module>(module: &M) -> Self {
        Self::looking(module, &mut |_| {})
    }

    /// As [`of`](Self::of), with a look at each parameter where it is.
    pub(crate) fn looking<M: Module>(module: &M, look: &mut dyn FnMut(ParamRef<'_>)) -> Self {
        let (mut params, mut flags, mut place) = (Vec::new(), Vec::new(), 0);
        let mut param = |param: ParamRef<'_>| {
            if param.is_shard() {
                params.pop();
            }
            params.push(FoundParam { param: param.kept(), place });
            place += 1;
            look(param);
        };
        let mut flag = |flag: &Param<Flag>, _: &ModulePath| flags.push((flag.id, flag.clone().train().is_enabled()));
        visit_params_and_flags(module, &mut param, &mut flag);
        Self { params, flags, statistics_moved: false }
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &FoundParam> {
        self.params.iter()
    }

    pub(crate) fn floats(&self) -> impl Iterator<Item = &FoundParam> {
        self.params.iter().filter(|param| param.is_float())
    }

    /// The flags, and whether each is on in training mode.
    pub(crate) fn flags(&self) -> &[(ParamId, bool)] {
        &self.flags
    }

    /// Notes that a step has given the running statistics of the module new values.
    pub(crate) fn statistics_move(&mut self) {
        self.statistics_moved = true;
    }

    /// Whether running statistics have other values by now.
    pub(crate) fn statistics_moved(&self) -> bool {
        self.statistics_moved
    }

    /// As [`one_device`] of the module that this was found in.
    ///
    /// # Errors
    /// Those of [`one_device`].
    pub(crate) fn one_device<M: Module>(&self, module: &M, operation: &'static str) -> Result<Option<Device>, Error> {
        let mut devices = self.params.iter().map(|param| param.device().inner());
        let first = devices.next();
        match devices.all(|device| Some(&device) == first.as_ref()) {
            true => Ok(first),
            // Which says where.
            false => one_device(module, operation),
        }
    }

    /// The gradients that `gradient` has of the float parameters, as burn's optimizers take them. Nothing is copied.
    /// [`Error::Graph`] comes beside them if a gradient has another rank than its parameter, and is left out.
    pub(crate) fn put_gradients(
        &self,
        gradient: &mut dyn FnMut(&FoundParam) -> Option<PlainTensor>,
    ) -> (GradientsParams, Result<(), Error>) {
        let (mut grads, mut outcome) = (GradientsParams::new(), Ok(()));
        for param in self.floats() {
            if let Some(gradient) = gradient(param)
                && let Err(error) = param.put_gradient(gradient, &mut grads)
            {
                outcome = Err(error);
            }
        }
        (grads, outcome)
    }
}

impl FoundParam {
    /// Its path in the module that it was found in, which is gone over once more: for errors.
    pub(crate) fn path_in<M: Module>(&self, module: &M) -> String {
        path_at(module, self.place)
    }
}

impl Deref for FoundParam {
    type Target = dyn AnyParam;

    fn deref(&self) -> &Self::Target {
        &*self.param
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};

    use super::*;

    #[test]
    fn what_is_lazy_is_made_for_both() {
        let device = Device::flex().autodiff();
        let model: Linear = LinearConfig::new(2, 3).init(&device);
        let found = FoundParams::of(&model);
        assert_eq!(found.one_device(&model, "a test").unwrap(), Some(device.inner()));
        let [weight, bias] = [0, 1].map(|place| &found.params[place]);
        assert!(weight.is_lazy() && bias.is_lazy() && weight.is_trained());
        drop(weight.value());
        assert!(model.weight.is_initialized() && !weight.is_lazy());
        drop(model.bias.as_ref().unwrap().val());
        assert!(!bias.is_lazy());
    }

    #[test]
    fn a_gradient_of_another_rank_is_left_out() {
        let model: Linear = LinearConfig::new(2, 3).init(&Device::flex().autodiff());
        let found = FoundParams::of(&model);
        let gradient = || PlainTensor::zeros(vec![2, 3], burn::tensor::DType::F32, &Device::flex());
        let (grads, outcome) = found.put_gradients(&mut |_| Some(gradient()));
        assert!(outcome.is_err());
        assert_eq!(grads.len(), 1);
        assert_eq!(grads.get::<2>(model.weight.id).unwrap().dims(), [2, 3]);
    }
}
