//! Gradients out of burn's [`GradientsParams`], which are asked for by the rank of each parameter.

use std::collections::HashSet;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::walk::ModulePath;
use crate::tensor::PlainTensor;

/// Takes the gradients of the float parameters of a module out, in its order. A parameter that is in several places
/// counts once, at the first.
pub(crate) fn take_gradients<M: Module>(
    module: &M,
    grads: &mut GradientsParams,
    take: &mut dyn FnMut(TakenGradient<'_>),
) {
    module.visit(&mut Take { grads, take, seen: HashSet::new(), path: ModulePath::default() });
}

/// A parameter, and its gradient if there is one.
pub(crate) struct TakenGradient<'a> {
    /// How many parameters come before this one.
    pub(crate) index: usize,
    pub(crate) id: ParamId,
    pub(crate) path: &'a ModulePath,
    pub(crate) gradient: Option<PlainTensor>,
}

struct Take<'a> {
    grads: &'a mut GradientsParams,
    take: &'a mut dyn FnMut(TakenGradient<'_>),
    seen: HashSet<ParamId>,
    path: ModulePath,
}

impl ModuleVisitor for Take<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.seen.insert(param.id) {
            let gradient = self.grads.remove::<D>(param.id).map(PlainTensor::from);
            (self.take)(TakenGradient { index: self.seen.len() - 1, id: param.id, path: &self.path, gradient });
        }
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
}

/// The gradients of the float parameters of a module, times a number.
pub(crate) fn scale_gradients<M: Module>(module: &M, grads: GradientsParams, factor: f64) -> GradientsParams {
    let mut scale = ScaleGradients { from: grads, to: GradientsParams::new(), factor };
    module.visit(&mut scale);
    scale.to
}

struct ScaleGradients {
    from: GradientsParams,
    to: GradientsParams,
    factor: f64,
}

impl ModuleVisitor for ScaleGradients {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.from.remove::<D>(param.id) {
            self.to.register(param.id, gradient.mul_scalar(self.factor));
        }
    }
}
