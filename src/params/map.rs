//! One way to change the parameters of any module: a parameter that the module holds in several places stays one.

use std::any::Any;
use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Bool, Int, Tensor};

use super::shard::is_shard;
use super::walk::ModulePath;

/// What becomes of a float parameter.
pub(crate) enum MappedParam<const D: usize> {
    /// It stays as it is.
    Same(Param<Tensor<D>>),
    /// Another one takes its place, wherever the module holds it.
    New(Param<Tensor<D>>),
}

impl<const D: usize> MappedParam<D> {
    /// The parameter with this value, a leaf.
    pub(crate) fn with_value(param: Param<Tensor<D>>, value: Tensor<D>) -> Self {
        let (id, _, mapper) = param.consume();
        Self::New(Param::from_mapped_value(id, value, mapper))
    }
}

/// What becomes of each parameter.
pub(crate) trait MapParams {
    /// A float parameter, at the first of its places: a new one goes to the others as well.
    fn float<const D: usize>(&mut self, param: Param<Tensor<D>>, path: &ModulePath) -> MappedParam<D>;

    fn int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>, _path: &ModulePath) -> Param<Tensor<D, Int>> {
        param
    }

    fn bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>, _path: &ModulePath) -> Param<Tensor<D, Bool>> {
        param
    }
}

/// The module with its parameters changed. Lazy ones stay lazy unless `map` makes them.
pub(crate) fn map_params<M: Module>(module: M, map: &mut impl MapParams) -> M {
    module.map(&mut TiePreserving { map, path: ModulePath::default(), made: HashMap::new() })
}

struct TiePreserving<'a, P> {
    map: &'a mut P,
    path: ModulePath,
    made: HashMap<ParamId, Box<dyn Any>>,
}

impl<P: MapParams> ModuleMapper for TiePreserving<'_, P> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let id = param.id;
        if let Some(made) = self.made.get(&id).and_then(|made| made.downcast_ref::<Param<Tensor<D>>>()) {
            return made.clone();
        }
        match self.map.float(param, &self.path) {
            MappedParam::Same(param) => param,
            MappedParam::New(made) => {
                self.made.insert(id, Box::new(made.clone()));
                made
            }
        }
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        self.map.int(param, &self.path)
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        self.map.bool(param, &self.path)
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.path.enter(name, container);
        }
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        if !is_shard(name, container) {
            self.path.exit();
        }
    }
}
