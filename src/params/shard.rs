//! How shards lie in a module: behind the placeholder of their parameter, as its reparameterization.

use std::collections::HashSet;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;

/// The name under which a module has this rank's rows of a parameter, in the place of a layer's parameter.
pub(crate) const SHARD: &str = "rows";

/// Whether a visitor that enters this comes to the rows of the parameter that it has visited last, or leaves them.
pub(crate) fn is_shard(name: &str, container: &str) -> bool {
    name == SHARD && container == "Reparameterization"
}

/// The ids of what a module has in the place of parameters of which it holds rows.
#[derive(Debug, Default)]
pub(crate) struct ShardedIds {
    /// What stands for the parameters.
    pub(crate) stand_ins: HashSet<ParamId>,
    /// The rows: the ids of the parameters.
    pub(crate) shards: HashSet<ParamId>,
}

impl ShardedIds {
    pub(crate) fn of<M: Module>(module: &M) -> Self {
        let mut find = FindShards::default();
        module.visit(&mut find);
        find.found
    }

    /// Whether this is either.
    pub(crate) fn contains(&self, id: ParamId) -> bool {
        self.stand_ins.contains(&id) || self.shards.contains(&id)
    }
}

#[derive(Default)]
struct FindShards {
    last: Option<ParamId>,
    /// Whether the rows of the last one come next.
    entered: bool,
    found: ShardedIds,
}

impl ModuleVisitor for FindShards {
    fn enter_module(&mut self, name: &str, container: &str) {
        if is_shard(name, container) {
            self.found.stand_ins.extend(self.last.take());
            self.entered = true;
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if std::mem::take(&mut self.entered) {
            self.found.shards.insert(param.id);
        }
        self.last = Some(param.id);
    }
}
