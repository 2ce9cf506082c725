//! Modules of which a rank holds some parameters only.

use std::any::Any;
use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId, ParamMapper};
use burn::tensor::Tensor;

use super::leaf::{LazyParam, LeafKind, leaf};
use crate::tensor::PlainTensor;

/// The module without the float parameters that `keep` does not name: they become tensors of no elements, trained or not as
/// before. Those that stay are left as they are, lazy ones lazy, and no lazy parameter is made.
pub(crate) fn retain<M: Module>(module: M, keep: &dyn Fn(ParamId) -> bool) -> M {
    module.map(&mut Retain { keep })
}

struct Retain<'a> {
    keep: &'a dyn Fn(ParamId) -> bool,
}

impl ModuleMapper for Retain<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if (self.keep)(param.id) {
            return param;
        }
        let DiscardedParam { one, kind, id, mapper } = DiscardedParam::of(param);
        let nothing = Tensor::zeros([0; D], (&one.device(), one.dtype()));
        Param::from_mapped_value(id, leaf(nothing, kind), mapper)
    }
}

/// A parameter whose value is not wanted any more, and was not made if it was lazy.
struct DiscardedParam<const D: usize> {
    /// A tensor of its device and dtype.
    one: Tensor<D>,
    kind: LeafKind,
    id: ParamId,
    mapper: ParamMapper<Tensor<D>>,
}

impl<const D: usize> DiscardedParam<D> {
    fn of(param: Param<Tensor<D>>) -> Self {
        match param.is_initialized() {
            true => {
                let (id, value, mapper) = param.consume();
                let kind = LeafKind::of(&value);
                Self { one: value.inner(), kind, id, mapper }
            }
            false => {
                let LazyParam { placeholder, device, trained } = LazyParam::of(&param);
                let (id, one, mapper) = placeholder.consume();
                Self { one: one.inner(), kind: LeafKind::on(&device, trained), id, mapper }
            }
        }
    }
}

/// The float parameters that are lazy.
pub(crate) fn lazy_params<M: Module>(module: &M) -> HashSet<ParamId> {
    let mut found = Lazies::default();
    module.visit(&mut found);
    found.0
}

#[derive(Default)]
struct Lazies(HashSet<ParamId>);

impl ModuleVisitor for Lazies {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_initialized() {
            self.0.insert(param.id);
        }
    }
}

/// The module with these values for some of its float parameters, of any dims. A lazy parameter that gets one is not made.
pub(crate) fn replace_values<M: Module>(module: M, values: HashMap<ParamId, PlainTensor>) -> M {
    if values.is_empty() {
        return module;
    }
    module.map(&mut ReplaceValues { values, seen: HashMap::new() })
}

struct ReplaceValues {
    values: HashMap<ParamId, PlainTensor>,
    /// Leaves already made, so that a parameter held in two places stays one.
    seen: HashMap<ParamId, Box<dyn Any>>,
}

impl ModuleMapper for ReplaceValues {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let id = param.id;
        if let Some(leaf) = self.seen.get(&id).and_then(|leaf| leaf.downcast_ref::<Tensor<D>>()).cloned() {
            let DiscardedParam { id, mapper, .. } = DiscardedParam::of(param);
            return Param::from_mapped_value(id, leaf, mapper);
        }
        let Some(value) = self.values.remove(&id).and_then(|value| value.float::<D>().ok()) else {
            return param;
        };
        let DiscardedParam { kind, id, mapper, .. } = DiscardedParam::of(param);
        let new = leaf(value, kind);
        self.seen.insert(id, Box::new(new.clone()));
        Param::from_mapped_value(id, new, mapper)
    }
}
