//! What one device does in a few steps of training, and what a model holds, to compare with.

use std::collections::BTreeMap;

use burn::backend::Flex;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::prelude::*;

use crate::models::{self, Numbers};

pub type Values = BTreeMap<String, Vec<f32>>;

#[derive(Default)]
struct Floats<'a> {
    gradients: Option<&'a GradientsParams>,
    path: Vec<String>,
    values: Values,
}

impl ModuleVisitor for Floats<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = match self.gradients {
            None => Some(param.val().inner()),
            Some(gradients) => gradients.get::<D>(param.id),
        };
        if let Some(value) = value {
            self.values.insert(self.path.join("."), value.into_data().try_to_vec().unwrap());
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

pub fn values<M: Module>(model: &M) -> Values {
    let mut floats = Floats::default();
    model.valid().visit(&mut floats);
    floats.values
}

pub fn gradients<M: Module>(model: &M, gradients: &GradientsParams) -> Values {
    let mut floats = Floats { gradients: Some(gradients), ..Floats::default() };
    model.visit(&mut floats);
    floats.values
}

/// The bytes of the buffers behind all initialized parameters.
#[derive(Default)]
pub struct Bytes {
    pub bytes: BTreeMap<String, usize>,
    pub lazy: usize,
}

impl ModuleVisitor for Bytes {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.is_initialized() {
            self.lazy += 1;
            return;
        }
        let buffer = param.val().inner().try_into_primitive::<Flex>().unwrap();
        self.bytes.insert(param.id.to_string(), buffer.bytes().len());
    }
}

pub fn bytes<M: Module>(model: &M) -> Bytes {
    let mut bytes = Bytes::default();
    model.visit(&mut bytes);
    bytes
}

/// The same numbers in every model of the same structure.
struct Fill(Numbers);

impl ModuleMapper for Fill {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        if !value.is_require_grad() {
            return Param::from_mapped_value(id, value, mapper);
        }
        let dims = value.dims();
        let scale = if D > 1 { 1.0 / (dims[0] as f32).sqrt() } else { 0.5 };
        let new = self.0.tensor::<D>(dims, &value.device()) * scale + if D == 1 { 0.3 } else { 0.0 };
        Param::from_mapped_value(id, new.detach().require_grad(), mapper)
    }
}

pub fn filled<M: Module>(model: M) -> M {
    model.train().map(&mut Fill(Numbers(7)))
}

#[track_caller]
pub fn same(what: &str, expected: &Values, found: &Values, tolerance: f32) {
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{what}");
    for (path, expected) in expected {
        let found = &found[path];
        assert_eq!(expected.len(), found.len(), "{what}: `{path}`");
        let scale = expected.iter().fold(1e-2f32, |most, x| most.max(x.abs()));
        let worst = expected.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / scale;
        assert!(worst <= tolerance, "{what}: `{path}` differs by {worst}");
    }
}

pub fn optimizer() -> ModuleOptimizer {
    // Gradients that are 0 but for rounding, as that of a key's bias, must not be blown up.
    AdamWConfig::new().with_weight_decay(0.01).with_epsilon(1e-2).init()
}

pub struct Reference {
    pub loss: f32,
    pub gradients: Values,
    pub after: Values,
}

/// What one device does on the whole batch.
pub fn reference<M: Module, I>(
    make: impl Fn() -> M,
    batch: fn(u64) -> I,
    loss: fn(&M, I) -> Tensor<1>,
    steps: u64,
) -> Vec<Reference> {
    let mut model = filled(make());
    let mut optim = optimizer();
    let mut done = Vec::new();
    for step in 0..steps {
        let (loss, grads) = models::eager(&model, |m| loss(m, batch(step)));
        let gradients = gradients(&model, &grads);
        model = optim.step(0.05, model, grads);
        done.push(Reference { loss, gradients, after: values(&model) });
    }
    done
}
