//! Losses that are sums and come with their number of items.

use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::graph::{CustomOps, Executor, capture_step, gradients_params};
use burn_parallel::step::Loss;

use crate::common::models::*;
use crate::common::reference::{Wholes, difference, gradient_values};

fn sums(model: &Mlp, x: Tensor<2>, targets: Tensor<1, Int>, real: Tensor<1>) -> (Tensor<1>, Tensor<1>) {
    let n = targets.dims()[0];
    let chosen = activation::log_softmax(model.forward(x), 1).gather(1, targets.reshape([n, 1])).squeeze_dim::<1>(1);
    ((chosen * real.clone()).sum().neg(), real.sum())
}

fn batch(rows: usize, seed: u64) -> (Tensor<2>, Tensor<1, Int>, Tensor<1>) {
    let mut numbers = Numbers(seed);
    let real = (0..rows).map(|row| if row % 3 == 1 { 0.0 } else { 1.0 }).collect::<Vec<f32>>();
    let x = numbers.tensor([rows, 6], &device());
    (x, numbers.classes([rows], 4, &device()), Tensor::from_floats(real.as_slice(), &device()))
}

#[test]
fn the_mean_over_the_items_that_the_step_counts() {
    let model = Mlp::new(0.0, &device());
    let given = batch(7, 3);
    let graph = capture_step(&model, given.clone(), |m, (x, t, real)| {
        let (sum, count) = sums(m, x, t, real.clone());
        (Loss::sum(sum, count), real)
    })
    .unwrap();
    assert!(graph.weight.is_some());
    let mut executor = Executor::new(graph, CustomOps::new()).unwrap();
    let step = executor.step(&model, given.clone()).unwrap();
    assert_eq!((step.weight, step.outputs.len()), (5.0, 1));

    let (x, t, real) = given.clone();
    let (loss, gradients) = eager(&model, |m| {
        let (sum, count) = sums(m, x, t, real);
        sum / count
    });
    assert!((scalar(step.loss) - loss).abs() < 1e-6);
    assert!(difference(&gradient_values(&model, &gradients), &gradient_values(&model, &step.gradients)) < 1e-6);

    // The count is that of each execution, not of the capture.
    let (x, t, _) = batch(7, 4);
    let none = Tensor::<1>::zeros([7], &device());
    let raw = executor.step_with(&model, (x.clone(), t.clone(), none), |_, _| Ok(())).unwrap();
    assert_eq!((raw.weight, scalar(raw.loss)), (0.0, 0.0));
    let half = Tensor::<1>::zeros([7], &device()) - 0.5;
    let error = executor.step(&model, (x, t, half)).unwrap_err();
    assert!(error.to_string().contains("is -3.5"), "{error}");
}

#[test]
fn gradients_of_the_sum_add_up_to_the_mean_over_everything() {
    let model = Mlp::new(0.0, &device());
    let parts = [batch(2, 1), batch(5, 2)];
    let mut total: Vec<(f64, f64, Wholes)> = Vec::new();
    for part in &parts {
        let count = part.0.dims()[0];
        let graph =
            capture_step(&model, part.clone(), |m, (x, t, real)| Loss::sum(sums(m, x, t, real.ones_like()).0, count));
        let mut gradients = std::collections::HashMap::new();
        let mut executor = Executor::new(graph.unwrap(), CustomOps::new()).unwrap();
        let raw = executor
            .step_with(&model, part.clone(), |id, gradient| {
                gradients.insert(id, gradient);
                Ok(())
            })
            .unwrap();
        let gradients = gradient_values(&model, &gradients_params(&model, gradients));
        total.push((scalar(raw.loss).into(), raw.weight, gradients));
    }
    let weight: f64 = total.iter().map(|(_, weight, _)| weight).sum();
    assert_eq!(weight, 7.0);
    let whole = parts.iter().fold(None, |whole: Option<(Tensor<2>, Tensor<1, Int>)>, (x, t, _)| match whole {
        None => Some((x.clone(), t.clone())),
        Some((a, b)) => Some((Tensor::cat(vec![a, x.clone()], 0), Tensor::cat(vec![b, t.clone()], 0))),
    });
    let (x, t) = whole.unwrap();
    let (loss, gradients) = eager(&model, |m| m.loss(x, t));
    let mean = total.iter().map(|(loss, ..)| loss).sum::<f64>() / weight;
    assert!((mean - f64::from(loss)).abs() < 1e-6);
    for (path, expected) in gradient_values(&model, &gradients) {
        for (place, expected) in expected.values.into_iter().enumerate() {
            let found: f32 = total.iter().map(|(_, _, gradients)| gradients[&path].values[place]).sum();
            assert!((found / weight as f32 - expected).abs() < 1e-6);
        }
    }
}

#[test]
fn a_number_of_items_that_is_not_one_number() {
    let model = Mlp::new(0.0, &device());
    let error = capture_step(&model, batch(3, 1), |m, (x, t, real)| {
        let (sum, _) = sums(m, x, t, real.clone());
        Loss::sum(sum, real)
    })
    .unwrap_err();
    assert!(error.to_string().contains("it has 3: reduce it"), "{error}");
    let outside = Tensor::<1>::ones([1], &device());
    let error =
        capture_step(&model, batch(3, 1), |m, (x, t, real)| Loss::sum(sums(m, x, t, real).0, outside)).unwrap_err();
    assert!(error.to_string().contains("the number of items of the loss was not computed"), "{error}");
}
