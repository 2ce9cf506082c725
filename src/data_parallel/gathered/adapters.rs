//! LoRA adapters, which burn keeps where the rows of a parameter are to be.
//!
//! A parameter takes one reparameterization, and nobody but the layer that has the parameter can see it. Visitors see
//! its factors, though, and mappers change them; its scale is found out by an adapter of ones.

use std::collections::HashMap;

use burn::module::{
    LoraAdapter, Module, ModuleMapper, ModuleVisitor, Param, ParamId, Reparameterization, Reparameterizer,
};
use burn::tensor::Tensor;

use crate::tensor::PlainTensor;

/// Adapters by the parameters that have them.
pub(super) type Adapters = HashMap<ParamId, LoraAdapter>;

/// The factors of an adapter.
type Factors = Vec<Param<Tensor<2>>>;

/// Takes the adapters off a module, whose parameters stay as they are.
pub(super) fn take_adapters<M: Module>(module: M) -> (M, Adapters) {
    let mut found = FindFactors { last: None, inside: None, factors: HashMap::new(), bases: HashMap::new() };
    module.visit(&mut found);
    let FindFactors { factors, bases, .. } = found;
    if factors.is_empty() {
        return (module, Adapters::new());
    }
    // In place of each parameter with an adapter a zero, and of its factors ones: what burn merges is the scale.
    let small = module.clone().map(&mut ShrinkAdapters { factors: &factors }).materialize();
    let mut scales = Scales { wanted: &factors, found: HashMap::new() };
    small.visit(&mut scales);
    let scales = scales.found;
    let bare = module.map(&mut ShrinkAdapters { factors: &factors }).materialize().map(&mut PutBases(bases));
    let adapter = |(id, factors): (ParamId, Factors)| {
        let [a, b] = <[_; 2]>::try_from(factors).ok()?;
        Some((id, LoraAdapter { a, b, scale: *scales.get(&id)? }))
    };
    (bare, factors.into_iter().filter_map(adapter).collect())
}

/// Puts adapters on the parameters of a module that has none.
pub(super) fn put_adapters<M: Module>(module: M, adapters: Adapters) -> M {
    match adapters.is_empty() {
        true => module,
        false => module.apply_reparameterization(PutAdapters(adapters)),
    }
}

struct PutAdapters(Adapters);

impl Reparameterizer for PutAdapters {
    type Reparam = LoraAdapter;

    fn reparameterize<const D: usize>(
        &mut self,
        _: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<LoraAdapter>) {
        let adapter = self.0.remove(&param.id);
        (param, adapter)
    }
}

/// Finds parameters that have adapters, with the factors of these.
struct FindFactors {
    last: Option<(ParamId, Box<dyn std::any::Any>)>,
    inside: Option<ParamId>,
    factors: HashMap<ParamId, Factors>,
    /// The parameters themselves, of whatever rank.
    bases: HashMap<ParamId, Box<dyn std::any::Any>>,
}

impl ModuleVisitor for FindFactors {
    fn enter_module(&mut self, name: &str, container: &str) {
        if container == "Reparameterization"
            && name == LoraAdapter::NAME
            && let Some((id, base)) = self.last.take()
        {
            self.inside = Some(id);
            self.bases.insert(id, base);
        }
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        if container == "Reparameterization" {
            self.inside = None;
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let any: Box<dyn std::any::Any> = Box::new(param.clone());
        match self.inside {
            Some(id) => {
                if let Ok(factor) = any.downcast() {
                    self.factors.entry(id).or_default().push(*factor);
                }
            }
            None => self.last = Some((param.id, any)),
        }
    }
}

/// Makes parameters with adapters and the factors of these as small as can be.
struct ShrinkAdapters<'a> {
    factors: &'a HashMap<ParamId, Factors>,
}

impl ModuleMapper for ShrinkAdapters<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, device) = (param.id, param.lazy_device());
        let factor = self.factors.values().flatten().any(|factor| factor.id == id);
        match (self.factors.contains_key(&id), factor) {
            (true, _) => Param::initialized(id, Tensor::zeros([1; D], &device)),
            (_, true) => Param::initialized(id, Tensor::ones([1; D], &device)),
            _ => param,
        }
    }
}

struct Scales<'a> {
    wanted: &'a HashMap<ParamId, Factors>,
    found: HashMap<ParamId, f64>,
}

impl ModuleVisitor for Scales<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.wanted.contains_key(&param.id)
            && let Ok(data) = PlainTensor::from(param.base()).into_data()
        {
            self.found.extend(data.iter::<f64>().next().map(|scale| (param.id, scale)));
        }
    }
}

/// Puts parameters back.
struct PutBases(HashMap<ParamId, Box<dyn std::any::Any>>);

impl ModuleMapper for PutBases {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let known = self.0.get(&param.id).and_then(|known| known.downcast_ref::<Param<Tensor<D>>>());
        known.cloned().unwrap_or(param)
    }
}
