//! Whole models of models of rows.

use std::collections::HashMap;

use burn::module::{LoraAdapter, Module, ModuleMapper, ModuleVisitor, Param, ParamId, Reparameterization};
use burn::tensor::Tensor;

use super::adapters::{Adapters, put_adapters};
use super::gatherer::Gatherer;
use super::row_shard::bare;
use crate::Error;
use crate::params::{FoundParams, LeafKind, is_shard, leaf, visit_params};
use crate::tensor::PlainTensor;

/// This rank's rows of all parameters.
pub(in crate::data_parallel) fn shards_of(params: &FoundParams, gatherer: &Gatherer) -> HashMap<ParamId, PlainTensor> {
    let mut shards = HashMap::new();
    for param in params.floats().filter(|param| gatherer.rows(param.id()).is_some()) {
        // What is quantized is not divided.
        if let Ok(rows) = PlainTensor::of(param.base(), "") {
            shards.entry(param.id()).or_insert(rows);
        }
    }
    shards
}

/// The module with whole parameters, as it was before it was sharded but for their values. Collective.
///
/// # Errors
/// Those of [`Gatherer::all`].
pub(in crate::data_parallel) fn assemble<M: Module>(module: &M, gatherer: &Gatherer) -> Result<M, Error> {
    let mut wholes = HashMap::new();
    gatherer.all(|id, whole| {
        wholes.insert(id, whole);
    })?;
    Ok(with_wholes(module, gatherer, wholes))
}

/// The whole module with one element in the place of all those of each parameter that ranks hold rows of: nothing is
/// gathered.
pub(in crate::data_parallel) fn meta_whole<M: Module>(module: &M, gatherer: &Gatherer) -> M {
    let mut wholes = HashMap::new();
    visit_params(module, &mut |param| {
        if let Some(rows) = gatherer.rows(param.id()) {
            let one = PlainTensor::zeros(vec![1; rows.dims().len()], param.dtype(), &param.device().inner());
            wholes.insert(param.id(), one.expand(rows.dims().to_vec()));
        }
    });
    with_wholes(module, gatherer, wholes)
}

/// The module with these values in the place of what ranks hold rows of.
fn with_wholes<M: Module>(module: &M, gatherer: &Gatherer, wholes: HashMap<ParamId, PlainTensor>) -> M {
    let mut found = FindPlaceholders::default();
    module.visit(&mut found);
    let module = module.clone().map(&mut PutWholes { ids: found.ids, wholes });
    let adapter = |(id, factors): (ParamId, Vec<Param<Tensor<2>>>)| {
        let [a, b] = <[_; 2]>::try_from(factors).ok()?;
        Some((id, LoraAdapter { a, b, scale: gatherer.scale(id)? }))
    };
    let adapters: Adapters = found.factors.into_iter().filter_map(adapter).collect();
    // Also takes away hooks.
    put_adapters(bare(|| module.materialize()), adapters)
}

/// Finds for each placeholder the parameter that it stands for, whether that is trained, and the factors of its
/// adapter.
#[derive(Default)]
struct FindPlaceholders {
    last: Option<ParamId>,
    /// The placeholder whose shard comes next, and then the shard.
    placeholder: Option<ParamId>,
    shard: Option<ParamId>,
    in_adapter: bool,
    ids: HashMap<ParamId, (ParamId, bool)>,
    factors: HashMap<ParamId, Vec<Param<Tensor<2>>>>,
}

impl ModuleVisitor for FindPlaceholders {
    fn enter_module(&mut self, name: &str, container: &str) {
        if is_shard(name, container) {
            self.placeholder = self.last.take();
        }
        self.in_adapter |= container == "Reparameterization" && name == LoraAdapter::NAME && self.shard.is_some();
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        if is_shard(name, container) {
            self.shard = None;
        }
        if name == LoraAdapter::NAME && container == "Reparameterization" {
            self.in_adapter = false;
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(placeholder) = self.placeholder.take() {
            self.ids.insert(placeholder, (param.id, param.is_require_grad()));
            self.shard = Some(param.id);
        } else if let Some(shard) = self.shard.filter(|_| self.in_adapter) {
            let factor: Box<dyn std::any::Any> = Box::new(param.clone());
            if let Ok(factor) = factor.downcast() {
                self.factors.entry(shard).or_default().push(*factor);
            }
        } else {
            self.last = Some(param.id);
        }
    }
}

/// Puts wholes in the place of placeholders.
struct PutWholes {
    ids: HashMap<ParamId, (ParamId, bool)>,
    wholes: HashMap<ParamId, PlainTensor>,
}

impl ModuleMapper for PutWholes {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(&(id, trained)) = self.ids.get(&param.id) else { return param };
        let Some(whole) = self.wholes.get(&id).and_then(|whole| whole.clone().float::<D>().ok()) else {
            return param;
        };
        let (_, old, mapper) = param.consume();
        let kind = LeafKind { trained, ..LeafKind::of(&old) };
        Param::from_mapped_value(id, leaf(whole, kind), mapper).set_require_grad(trained)
    }
}
