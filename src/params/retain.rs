//! Modules of which a rank holds some parameters only.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, Param, ParamId, ParamMapper};
use burn::tensor::Tensor;

use super::leaf::{LazyParam, LeafKind, leaf};
use super::map::{MapParams, MappedParam, map_params};
use super::walk::{ModulePath, visit_floats};
use crate::tensor::PlainTensor;

/// The module without the float parameters that `keep` does not name: they become tensors of no elements, trained or
/// not as before. Those that stay are left as they are, lazy ones lazy, and no lazy parameter is made.
pub(crate) fn retain<M: Module>(module: M, keep: &dyn Fn(ParamId) -> bool) -> M {
    map_params(module, &mut Retain { keep })
}

struct Retain<'a> {
    keep: &'a dyn Fn(ParamId) -> bool,
}

impl MapParams for Retain<'_> {
    fn float<const D: usize>(&mut self, param: Param<Tensor<D>>, _: &ModulePath) -> MappedParam<D> {
        if (self.keep)(param.id) {
            return MappedParam::Same(param);
        }
        let DiscardedParam { one, kind, id, mapper } = DiscardedParam::of(param);
        let nothing = Tensor::zeros([0; D], (&one.device(), one.dtype()));
        MappedParam::New(Param::from_mapped_value(id, leaf(nothing, kind), mapper))
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
    let mut lazy = HashSet::new();
    visit_floats(module, &mut |param| {
        if param.is_lazy() {
            lazy.insert(param.id());
        }
    });
    lazy
}

/// The module with these values for some of its float parameters, of any dims. A lazy parameter that gets one is not
/// made.
pub(crate) fn replace_values<M: Module>(module: M, values: HashMap<ParamId, PlainTensor>) -> M {
    if values.is_empty() {
        return module;
    }
    map_params(module, &mut ReplaceValues { values })
}

struct ReplaceValues {
    values: HashMap<ParamId, PlainTensor>,
}

impl MapParams for ReplaceValues {
    fn float<const D: usize>(&mut self, param: Param<Tensor<D>>, _: &ModulePath) -> MappedParam<D> {
        let Some(value) = self.values.remove(&param.id).and_then(|value| value.float::<D>().ok()) else {
            return MappedParam::Same(param);
        };
        let DiscardedParam { kind, id, mapper, .. } = DiscardedParam::of(param);
        MappedParam::New(Param::from_mapped_value(id, leaf(value, kind), mapper))
    }
}
