//! What one device does in a few steps of training, and what a model holds, to compare with.

use std::collections::BTreeMap;

use burn::backend::Flex;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::prelude::*;
use burn::tensor::Transaction;

pub use super::fill::filled;
use crate::common::models::eager;

/// A whole tensor, as one device has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Whole {
    pub dims: Vec<usize>,
    pub values: Vec<f32>,
}

/// Tensors by the paths of their parameters.
pub type Wholes = BTreeMap<String, Whole>;

/// The floats of a module, read from their device all at once.
#[derive(Default)]
struct Floats<'a> {
    gradients: Option<&'a GradientsParams>,
    path: Vec<String>,
    /// Path and dims of each, in their order.
    found: Vec<(String, Vec<usize>)>,
    reads: Transaction,
}

impl ModuleVisitor for Floats<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = match self.gradients {
            None => Some(param.val().inner()),
            Some(gradients) => gradients.get::<D>(param.id),
        };
        if let Some(value) = value {
            let (path, visits) = (self.path.join("."), self.found.len());
            // An adapter has the path of what it adapts.
            let seen = self.found.iter().any(|(other, _)| *other == path);
            let path = if seen { format!("{path} {visits}") } else { path };
            self.found.push((path, value.dims().to_vec()));
            self.reads = std::mem::take(&mut self.reads).register(value);
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

impl Floats<'_> {
    fn read(self) -> Wholes {
        let values = self.reads.execute().into_iter().map(|data| data.convert::<f32>().try_into_vec().unwrap());
        let wholes = self.found.into_iter().zip(values);
        wholes.map(|((path, dims), values)| (path, Whole { dims, values })).collect()
    }
}

pub fn values<M: Module>(model: &M) -> Wholes {
    let mut floats = Floats::default();
    model.valid().visit(&mut floats);
    floats.read()
}

pub fn gradient_values<M: Module>(model: &M, gradients: &GradientsParams) -> Wholes {
    let mut floats = Floats { gradients: Some(gradients), ..Floats::default() };
    model.visit(&mut floats);
    floats.read()
}

/// The paths of all float parameters and buffers, in their order, as a module shows them.
pub fn paths<M: Module>(model: &M) -> Vec<String> {
    #[derive(Default)]
    struct Paths {
        path: Vec<String>,
        found: Vec<String>,
    }
    impl ModuleVisitor for Paths {
        fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
            self.found.push(self.path.join("."));
        }

        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    let mut paths = Paths::default();
    model.visit(&mut paths);
    paths.found
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

/// Demands the same dims, and values that differ by no more than a fraction of the largest.
#[track_caller]
pub fn same(what: &str, expected: &Whole, found: &Whole, tolerance: f32) {
    assert_eq!(expected.dims, found.dims, "{what}");
    let scale = expected.values.iter().fold(1e-2f32, |most, x| most.max(x.abs()));
    let differences = expected.values.iter().zip(&found.values).map(|(a, b)| (a - b).abs());
    let worst = differences.fold(0.0, |most: f32, x| if x.is_nan() { f32::INFINITY } else { most.max(x) }) / scale;
    assert!(worst <= tolerance, "{what} differs by {worst}");
}

/// [`same`] of all tensors of a model.
#[track_caller]
pub fn all_same(what: &str, expected: &Wholes, found: &Wholes, tolerance: f32) {
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>(), "{what}");
    for (path, expected) in expected {
        same(&format!("{what}: `{path}`"), expected, &found[path], tolerance);
    }
}

/// Largest difference, relative to the largest value of the same tensor (or 1e-3).
#[track_caller]
pub fn difference(a: &Wholes, b: &Wholes) -> f32 {
    assert!(a.keys().eq(b.keys()), "not the same parameters: {:?}, {:?}", a.keys(), b.keys());
    let mut worst = 0.0f32;
    for (a, b) in a.values().zip(b.values()) {
        assert_eq!(a.dims, b.dims);
        let scale = a.values.iter().fold(1e-3f32, |most, x| most.max(x.abs()));
        for (x, y) in a.values.iter().zip(&b.values) {
            assert!(x.is_finite() && y.is_finite());
            worst = worst.max((x - y).abs() / scale);
        }
    }
    worst
}

/// Demands two losses that differ by rounding.
#[track_caller]
pub fn close(what: &str, a: f32, b: f32) {
    assert!((a - b).abs() <= 2e-5 * a.abs().max(1.0), "{what}: {a} {b}");
}

/// The learning rate of [`alone`] and [`reference`].
const LR: f64 = 0.05;

pub fn optimizer() -> ModuleOptimizer {
    // Gradients that are 0 but for rounding, as that of a key's bias, must not be blown up.
    AdamWConfig::new().with_weight_decay(0.01).with_epsilon(1e-2).init()
}

/// A copy of a model on a device, with leaves and running statistics of its own.
pub fn own_on<M: Module>(model: &M, device: Device) -> M {
    model.clone().fork(&device.autodiff()).train()
}

/// A copy on the CPU.
pub fn own<M: Module>(model: &M) -> M {
    own_on(model, Device::flex())
}

/// What one device does in a step.
pub struct Reference {
    pub loss: f32,
    pub gradients: Wholes,
    /// All parameters and buffers, after the step.
    pub after: Wholes,
}

/// Trains a copy of a model on one device, the CPU, on these batches.
pub fn train<M: Module, I>(
    model: &M,
    mut optim: ModuleOptimizer,
    lr: f64,
    batches: impl IntoIterator<Item = I>,
    loss: impl Fn(&M, I) -> Tensor<1>,
) -> Vec<Reference> {
    let mut model = own(model);
    let mut steps = Vec::new();
    for batch in batches {
        let (loss, grads) = eager(&model, |model| loss(model, batch));
        let gradients = gradient_values(&model, &grads);
        model = optim.step(lr, model, grads);
        steps.push(Reference { loss, gradients, after: values(&model) });
    }
    steps
}

/// [`train`], so many steps with [`optimizer`].
pub fn alone<M: Module, I>(
    model: &M,
    steps: usize,
    batch: impl Fn(usize) -> I,
    loss: impl Fn(&M, I) -> Tensor<1>,
) -> Vec<Reference> {
    train(model, optimizer(), LR, (0..steps).map(batch), loss)
}

/// [`alone`], of a [`filled`] model.
pub fn reference<M: Module, I>(
    make: impl Fn() -> M,
    batch: fn(u64) -> I,
    loss: fn(&M, I) -> Tensor<1>,
    steps: u64,
) -> Vec<Reference> {
    train(&filled(make()), optimizer(), LR, (0..steps).map(batch), loss)
}
