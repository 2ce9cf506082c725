//! Modules with dims and no memory: what a capture looks at.

use std::any::Any;
use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::Tensor;

use super::leaf::{Kind, Lazy, leaf};

/// The dims that a float parameter shall have, by its id and the dims that it has; `None` to leave it as it is.
pub(crate) type NewDims<'a> = dyn Fn(ParamId, &[usize]) -> Option<Vec<usize>> + 'a;

/// The module with other dims for some parameters, and no memory behind those.
///
/// So a module whose parameters are parts is captured with the dims of the whole ones, and a module of which only some
/// layers are held here is one without the rest. Lazy parameters are not made. Nothing of `module` is changed, nor are the
/// running statistics that its clones share.
pub(crate) fn outline<M: Module>(module: &M, dims: &NewDims) -> M {
    let unforced = module.clone().map(&mut StandIns);
    // A module's clones share its running statistics; after `train` this one has its own.
    unforced.train().map(&mut Outline { dims, seen: HashMap::new() })
}

/// A tensor of these dims in which one element stands for all.
fn hollow<const D: usize>(one: Tensor<D>, dims: &[usize], kind: Kind) -> Option<Tensor<D>> {
    let dims = <[usize; D]>::try_from(dims).ok()?;
    let one = one.inner();
    let whole = match dims.contains(&0) {
        true => Tensor::zeros(dims, (&one.device(), one.dtype())),
        // Stride 0.
        false => one.expand(dims),
    };
    Some(leaf(whole, kind))
}

/// Lazy parameters become hollow ones, before `train` would make their values.
struct StandIns;

impl ModuleMapper for StandIns {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if param.is_initialized() {
            return param;
        }
        let dims = param.lazy_shape().to_vec();
        let Lazy { stand_in, device, trained } = Lazy::of(&param);
        let (id, one, mapper) = stand_in.consume();
        match hollow(one, &dims, Kind::on(&device, trained)) {
            Some(value) => Param::from_mapped_value(id, value, mapper),
            None => param,
        }
    }
}

struct Outline<'a> {
    dims: &'a NewDims<'a>,
    /// Leaves already made, so that a parameter held in two places stays one.
    seen: HashMap<ParamId, Box<dyn Any>>,
}

impl ModuleMapper for Outline<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(dims) = (self.dims)(param.id, &param.lazy_shape().to_vec()) else { return param };
        let id = param.id;
        if let Some(leaf) = self.seen.get(&id).and_then(|leaf| leaf.downcast_ref::<Tensor<D>>()) {
            return Param::initialized(id, leaf.clone());
        }
        let value = param.val();
        let kind = Kind::of(&value);
        let value = value.inner();
        let one = Tensor::zeros([1; D], (&value.device(), value.dtype()));
        let Some(whole) = hollow(one, &dims, kind) else { return param };
        self.seen.insert(id, Box::new(whole.clone()));
        Param::initialized(id, whole)
    }
}
