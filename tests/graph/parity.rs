//! The executed graph trains exactly like eager burn.

use burn::module::{Lora, Module};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::graph::{CustomOps, Executor, TensorTree, capture_step};

use crate::common::models::*;
use crate::common::reference::{difference, gradient_values, values};

/// Trains two copies for some AdamW steps, one eagerly, and compares everything after each step: with burn's operations
/// one by one, and fused, where sums are added in another order.
fn parity<M: Module, I: TensorTree + Clone>(model: M, batch: impl Fn(u64) -> I, loss: impl Fn(&M, I) -> Tensor<1>) {
    for (ops, bound) in [(CustomOps::new().with_fusion(false), 1e-6), (CustomOps::new(), 6e-6)] {
        parity_of(model.clone(), &batch, &loss, ops, bound);
    }
}

fn parity_of<M: Module, I: TensorTree + Clone>(
    model: M,
    batch: impl Fn(u64) -> I,
    loss: impl Fn(&M, I) -> Tensor<1>,
    ops: CustomOps,
    bound: f32,
) {
    // `train` gives running statistics of its own to each copy.
    let (mut eager_model, mut graph_model) = (model.clone().train(), model.train().fork(&device()));
    let [mut eager_optim, mut graph_optim]: [ModuleOptimizer; 2] =
        std::array::from_fn(|_| AdamWConfig::new().with_weight_decay(0.01).init());
    let graph = capture_step(&graph_model, batch(0), &loss).unwrap();
    let mut executor = Executor::new(graph, ops).unwrap();
    let mut apart = 0.0;

    for step in 1..=4 {
        let (eager_loss, eager_grads) = eager(&eager_model, |m| loss(m, batch(step)));
        let result = executor.step(&graph_model, batch(step)).unwrap();
        assert!((eager_loss - scalar(result.loss)).abs() <= 1e-6 * eager_loss.abs(), "loss of step {step}");
        let worst =
            difference(&gradient_values(&eager_model, &eager_grads), &gradient_values(&graph_model, &result.gradients));
        // Gradients of parameters that are apart are apart too.
        assert!(worst <= bound + 2.0 * apart, "gradients of step {step} differ by {worst}, parameters by {apart}");
        eager_model = eager_optim.step(0.01, eager_model, eager_grads);
        graph_model = graph_optim.step(0.01, graph_model, result.gradients);
        apart = difference(&values(&eager_model), &values(&graph_model));
        // A gradient that is 0 but for rounding, as that of the bias of keys, moves its parameter all the same.
        assert!(apart <= 10.0 * bound, "parameters or running statistics after step {step} differ by {apart}");
    }
}

fn rows(seed: u64) -> (Tensor<2>, Tensor<1, Int>) {
    let mut numbers = Numbers(seed);
    (numbers.tensor([5, 6], &device()), numbers.classes([5], 4, &device()))
}

fn tokens(seed: u64) -> (Tensor<2, Int>, Tensor<2, Int>) {
    let mut numbers = Numbers(seed);
    (numbers.classes([3, 5], 11, &device()), numbers.classes([3, 5], 11, &device()))
}

#[test]
fn mlp() {
    parity(Mlp::new(0.0, &device()), rows, |m, (x, t)| m.loss(x, t));
}

#[test]
fn mlp_made_on_a_plain_device() {
    parity(Mlp::new(0.0, &Device::flex()), rows, |m, (x, t)| m.loss(x, t));
}

#[test]
fn transformer() {
    parity(Lm::new(11, 8, 2, &device()), tokens, |m, (x, t)| m.loss(x, t));
}

#[test]
fn transformer_with_gradient_checkpointing() {
    let device = device().gradient_checkpointing();
    let model = Lm::new(11, 8, 1, &device);
    let batch = |seed| {
        let mut numbers = Numbers(seed);
        (numbers.classes([3, 5], 11, &device), numbers.classes([3, 5], 11, &device))
    };
    // `fork` in `parity` would drop the strategy, so this compares one step only.
    let graph = capture_step(&model, batch(0), |m, (x, t)| m.loss(x, t)).unwrap();
    let result = Executor::new(graph, CustomOps::new()).unwrap().step(&model, batch(1)).unwrap();
    let (_, gradients) = eager(&model, |m| m.loss(batch(1).0, batch(1).1));
    assert!(difference(&gradient_values(&model, &gradients), &gradient_values(&model, &result.gradients)) <= 1e-6);
}

#[test]
fn cnn_with_batch_norm() {
    parity(Cnn::new(&device()), |seed| images(4, seed, &device()), |m, (x, t)| m.loss(x, t));
}

#[test]
fn cnn_with_one_frozen_batch_norm() {
    let mut model = Cnn::new(&device());
    model.norm = model.norm.freeze();
    parity(model, |seed| images(4, seed, &device()), |m, (x, t)| m.loss(x, t));
}

#[test]
fn lstm() {
    parity(Rnn::new(&device()), tokens, |m, (x, t)| m.loss(x, t));
}

#[test]
fn one_parameter_used_twice() {
    parity(Tied::new(&device()), tokens, |m, (x, t)| m.loss(x, t));
}

#[test]
fn frozen_parameters() {
    let mut model = Mlp::new(0.0, &device());
    model.first = model.first.freeze();
    parity(model, rows, |m, (x, t)| m.loss(x, t));
}

#[test]
fn low_rank_adapters() {
    let model = seeded(Mlp::new(0.0, &device()).apply_lora(Lora::new(2, 4.0)));
    parity(model, rows, |m, (x, t)| m.loss(x, t));
}

#[test]
fn two_parameters_with_one_id() {
    let device = device();
    let mut model = Mlp::new(0.0, &device);
    model.second = nn::LinearConfig::new(6, 16).init(&device);
    model.second.weight = model.first.weight.clone();
    let loss = |m: &Mlp, x: Tensor<2>| (m.first.forward(x.clone()) * m.second.forward(x)).powi_scalar(2).mean();
    let x = || Numbers(3).tensor([5, 6], &device);
    let graph = capture_step(&model, x(), loss).unwrap();
    let mut executor = Executor::new(graph, CustomOps::new()).unwrap();
    let result = executor.step(&model, x()).unwrap();
    let (_, gradients) = eager(&model, |m| loss(m, x()));
    assert!(difference(&gradient_values(&model, &gradients), &gradient_values(&model, &result.gradients)) <= 1e-6);

    // burn's optimizer updates one of the two: from then on they are not tied, which must not pass unseen.
    let mut optim: ModuleOptimizer = AdamWConfig::new().init();
    let model = optim.step(0.1, model, result.gradients);
    let problem = executor.step(&model, x()).unwrap_err().to_string();
    assert!(problem.contains("`second.weight` shares its id"), "{problem}");
}
