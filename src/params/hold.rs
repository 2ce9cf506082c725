//! Modules of which a rank holds some parameters only.

use std::any::Any;
use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::Tensor;

use super::leaf::{Kind, Lazy, leaf};
use crate::tensor::PlainTensor;

/// The module without the float parameters that `keep` does not name: they become tensors of no elements, trained or not as
/// before. Those that stay are left as they are, lazy ones lazy, and no lazy parameter is made.
pub(crate) fn hold<M: Module>(module: M, keep: &dyn Fn(ParamId) -> bool) -> M {
    module.map(&mut Hold { keep })
}

struct Hold<'a> {
    keep: &'a dyn Fn(ParamId) -> bool,
}

impl ModuleMapper for Hold<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if (self.keep)(param.id) {
            return param;
        }
        let (one, kind, id, mapper) = match param.is_initialized() {
            true => {
                let (id, value, mapper) = param.consume();
                let kind = Kind::of(&value);
                (value.inner(), kind, id, mapper)
            }
            false => {
                let Lazy { stand_in, device, trained } = Lazy::of(&param);
                let (id, one, mapper) = stand_in.consume();
                (one.inner(), Kind::on(&device, trained), id, mapper)
            }
        };
        let nothing = Tensor::zeros([0; D], (&one.device(), one.dtype()));
        Param::from_mapped_value(id, leaf(nothing, kind), mapper)
    }
}

/// The module with these values for some of its float parameters, of any dims.
pub(crate) fn put<M: Module>(module: M, values: HashMap<ParamId, PlainTensor>) -> M {
    if values.is_empty() {
        return module;
    }
    module.map(&mut Put { values, seen: HashMap::new() })
}

struct Put {
    values: HashMap<ParamId, PlainTensor>,
    /// Leaves already made, so that a parameter held in two places stays one.
    seen: HashMap<ParamId, Box<dyn Any>>,
}

impl ModuleMapper for Put {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let id = param.id;
        if let Some(leaf) = self.seen.get(&id).and_then(|leaf| leaf.downcast_ref::<Tensor<D>>()).cloned() {
            let (id, _, mapper) = param.consume();
            return Param::from_mapped_value(id, leaf, mapper);
        }
        let Some(value) = self.values.remove(&id).and_then(|value| value.float::<D>().ok()) else {
            return param;
        };
        let (id, old, mapper) = param.consume();
        let new = leaf(value, Kind::of(&old));
        self.seen.insert(id, Box::new(new.clone()));
        Param::from_mapped_value(id, new, mapper)
    }
}
