//! Meta modules: dims without memory, for a capture.

use burn::module::{Module, Param, ParamId};
use burn::tensor::Tensor;

use super::leaf::{LazyParam, LeafKind, leaf};
use super::map::{MapParams, MappedParam, map_params};
use super::walk::ModulePath;

/// The dims that a float parameter shall have, by its id and the dims that it has; `None` to leave it as it is.
pub(crate) type NewDims<'a> = dyn Fn(ParamId, &[usize]) -> Option<Vec<usize>> + 'a;

/// The module with other dims for some parameters, and no memory behind those.
///
/// So a module whose parameters are parts is captured with the dims of the whole ones, and a module of which only some
/// layers are held here is one without the rest. Lazy parameters are not made. Nothing of `module` is changed, nor are
/// the running statistics that its clones share.
pub(crate) fn meta_module<M: Module>(module: &M, dims: &NewDims) -> M {
    let unforced = map_params(module.clone(), &mut LazyToMeta);
    // A module's clones share its running statistics; after `train` this one has its own.
    map_params(unforced.train(), &mut ToMeta { dims })
}

/// A tensor of these dims in which one element stands for all.
fn meta_tensor<const D: usize>(one: Tensor<D>, dims: &[usize], kind: LeafKind) -> Option<Tensor<D>> {
    let dims = <[usize; D]>::try_from(dims).ok()?;
    let one = one.inner();
    let whole = match dims.contains(&0) {
        true => Tensor::zeros(dims, (&one.device(), one.dtype())),
        // Stride 0.
        false => one.expand(dims),
    };
    Some(leaf(whole, kind))
}

/// Lazy parameters become meta tensors, before `train` would make their values.
struct LazyToMeta;

impl MapParams for LazyToMeta {
    fn float<const D: usize>(&mut self, param: Param<Tensor<D>>, _: &ModulePath) -> MappedParam<D> {
        if param.is_initialized() {
            return MappedParam::Same(param);
        }
        let dims = param.lazy_shape().to_vec();
        let LazyParam { placeholder, device, trained } = LazyParam::of(&param);
        let (id, one, mapper) = placeholder.consume();
        match meta_tensor(one, &dims, LeafKind::on(&device, trained)) {
            Some(value) => MappedParam::New(Param::from_mapped_value(id, value, mapper)),
            None => MappedParam::Same(param),
        }
    }
}

struct ToMeta<'a> {
    dims: &'a NewDims<'a>,
}

impl MapParams for ToMeta<'_> {
    fn float<const D: usize>(&mut self, param: Param<Tensor<D>>, _: &ModulePath) -> MappedParam<D> {
        let Some(dims) = (self.dims)(param.id, &param.lazy_shape().to_vec()) else { return MappedParam::Same(param) };
        let value = param.val();
        let kind = LeafKind::of(&value);
        let value = value.inner();
        let one = Tensor::zeros([1; D], (&value.device(), value.dtype()));
        match meta_tensor(one, &dims, kind) {
            Some(whole) => MappedParam::New(Param::initialized(param.id, whole)),
            None => MappedParam::Same(param),
        }
    }
}
