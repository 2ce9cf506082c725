//! A rank's shards as a module: what an optimizer is given.

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor};
use burn::tensor::{DType, Device};

use super::{RankedParam, Rows};

/// A rank's shard of a parameter.
#[derive(Debug, Clone)]
pub struct ShardParam {
    /// The path of the parameter in the model.
    pub(crate) path: String,
    /// Which rows it is of how many.
    pub(crate) rows: Rows,
    /// The rank that updates the parameter, if its update depends on the whole of it.
    pub(crate) owner: usize,
    /// The shard, under the id of the parameter.
    pub(crate) param: RankedParam,
}

impl ShardParam {
    pub(crate) fn dtype(&self) -> DType {
        self.param.value().dtype()
    }
}

/// A rank's shards as a burn module, under the paths of the model: burn's optimizers, with their groups, take it in
/// place of the model.
#[derive(Debug, Clone, Default)]
pub struct ShardParams(pub(crate) Vec<ShardParam>);

/// What an optimizer has made of a rank's shards.
#[derive(Debug, Default)]
pub struct UpdatedShards {
    pub(crate) updated: ShardParams,
    /// Those that had no gradient, as they were.
    pub(crate) unchanged: ShardParams,
}

impl ShardParams {
    fn renew(self, renew: impl Fn(RankedParam) -> RankedParam) -> Self {
        Self(self.0.into_iter().map(|shard| ShardParam { param: renew(shard.param), ..shard }).collect())
    }
}

impl Module for ShardParams {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.0.iter().fold(devices, |devices, shard| shard.param.collect_devices(devices))
    }

    fn fork(self, device: &Device) -> Self {
        self.renew(|param| param.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.renew(|param| param.to_device(device))
    }

    fn train(self) -> Self {
        self.renew(Module::train)
    }

    fn valid(&self) -> Self {
        self.clone().renew(|param| param.valid())
    }

    fn materialize(self) -> Self {
        self.renew(Module::materialize)
    }

    fn visit<Visitor: ModuleVisitor>(&self, visitor: &mut Visitor) {
        for ShardParam { path, param, .. } in &self.0 {
            path.split('.').for_each(|name| visitor.enter_module(name, CONTAINER));
            param.visit(visitor);
            path.rsplit('.').for_each(|name| visitor.exit_module(name, CONTAINER));
        }
    }

    fn map<Mapper: ModuleMapper>(self, mapper: &mut Mapper) -> Self {
        let map = |ShardParam { path, rows, owner, param }| {
            path.split('.').for_each(|name| mapper.enter_module(name, CONTAINER));
            let param = param.map(mapper);
            path.rsplit('.').for_each(|name| mapper.exit_module(name, CONTAINER));
            ShardParam { path, rows, owner, param }
        };
        Self(self.0.into_iter().map(map).collect())
    }
}

const CONTAINER: &str = "ShardParams";
