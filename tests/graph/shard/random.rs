//! Random numbers are those of one device, whatever the split.

use burn::prelude::*;
use burn::tensor::Distribution;
use burn_parallel::graph::{
    CustomOps, Executor, RandomSource, capture_step, counter_based_rng, register_counter_based_rng,
};
use burn_parallel::prelude::*;

use super::harness::{Axis, Case};
use super::vocabulary::{Tokens, VOCABULARY, megatron_with_vocabulary, tokens};
use crate::common::models::{Lm, device};

const DROPOUT: Case<Lm, Tokens> =
    Case { make: |d| Lm::wide(VOCABULARY, 0.3, true, 2, d), batch: tokens, loss: |m, (x, y)| m.loss(x, y) };

#[test]
fn dropout_at_any_split_drops_the_same() {
    let references = DROPOUT.alone(3);
    let without = Case { make: |d| Lm::wide(VOCABULARY, 0.0, true, 2, d), ..DROPOUT }.alone(1);
    assert!((references[0].loss - without[0].loss).abs() > 1e-3, "nothing was dropped");
    for degree in [1, 2, 3, 4] {
        DROPOUT.compare(&[Axis::new("tp", degree, Plan::megatron())], &references).unwrap();
        let split = Axis::new("tp", degree, megatron_with_vocabulary()).sequence(1);
        DROPOUT.compare(&[split], &references).unwrap();
    }
    for degree in [2, 3] {
        DROPOUT.compare(&[Axis::batch(degree)], &references).unwrap();
    }
    DROPOUT.compare(&[Axis::new("tp", 2, Plan::megatron()).sequence(1), Axis::batch(2)], &references).unwrap();
    DROPOUT.compare(&[Axis::batch(3), Axis::new("tp", 2, megatron_with_vocabulary())], &references).unwrap();
}

fn drawn(source: &RandomSource, steps: usize) -> Vec<[Vec<f64>; 5]> {
    let model = Lm::wide(VOCABULARY, 0.0, true, 1, &device());
    let mut graph = capture_step(&model, tokens(0), |model, batch| {
        let device = device();
        let of = |distribution| Tensor::<2>::random([100, 400], distribution, &batch.0.device());
        let outputs = (
            of(Distribution::Default),
            of(Distribution::Uniform(-2.0, 6.0)),
            of(Distribution::Normal(1.0, 3.0)),
            of(Distribution::Bernoulli(0.3)),
            Tensor::<2, Int>::random([100, 400], Distribution::Uniform(-3.0, 7.0), &batch.0.device()),
        );
        drop(device);
        (model.loss(batch.0, batch.1), outputs)
    })
    .unwrap();
    assert_eq!(counter_based_rng(&mut graph), 5);
    let mut ops = CustomOps::new();
    register_counter_based_rng(&mut ops, source);
    let mut executor = Executor::new(graph, ops).unwrap();
    (0..steps)
        .map(|_| {
            let outputs = executor.step(&model, tokens(0)).unwrap().outputs;
            source.advance();
            let numbers: Vec<Vec<f64>> = outputs
                .into_iter()
                .map(|output| match output.dtype().is_int() {
                    true => output.int::<2>().unwrap().into_data().convert::<f64>().try_to_vec().unwrap(),
                    false => output.float::<2>().unwrap().into_data().convert::<f64>().try_to_vec().unwrap(),
                })
                .collect();
            <[Vec<f64>; 5]>::try_from(numbers).unwrap()
        })
        .collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let (x, y) = (mean(a), mean(b));
    let product: f64 = a.iter().zip(b).map(|(a, b)| (a - x) * (b - y)).sum();
    product / a.len() as f64 / (deviation(a) * deviation(b))
}

/// 40,000 numbers: means err by 0.005 deviations.
#[test]
fn distributions() {
    let [first, second] = drawn(&RandomSource::new(11), 2).try_into().unwrap();
    let [unit, uniform, normal, bernoulli, int] = &first;
    assert!(unit.iter().all(|x| (0.0..1.0).contains(x)) && uniform.iter().all(|x| (-2.0..6.0).contains(x)));
    assert!(bernoulli.iter().all(|x| *x == 0.0 || *x == 1.0));
    assert!((-3..7).all(|n| int.contains(&f64::from(n))) && int.iter().all(|x| (-3.0..7.0).contains(x)));
    let expected = [(0.5, 12f64.sqrt().recip()), (2.0, 8.0 / 12f64.sqrt()), (1.0, 3.0), (0.3, 0.21f64.sqrt())];
    for (values, (expected_mean, expected_deviation)) in first.iter().zip(expected) {
        assert!((mean(values) - expected_mean).abs() < 0.02 * expected_deviation, "{}", mean(values));
        assert!((deviation(values) / expected_deviation - 1.0).abs() < 0.02, "{}", deviation(values));
    }
    assert!((mean(int) - 1.5).abs() < 0.06, "{}", mean(int));
    let far = normal.iter().filter(|x| (**x - 1.0).abs() > 6.0).count() as f64 / normal.len() as f64;
    assert!((far - 0.0455).abs() < 0.005, "{far}");
    // Neighbours, operations and steps know nothing of each other.
    for values in &first {
        assert!(correlation(&values[1..], &values[..values.len() - 1]).abs() < 0.025);
    }
    assert!(correlation(unit, uniform).abs() < 0.025 && correlation(normal, &second[2]).abs() < 0.025);
    assert_ne!(first, second);
}

#[test]
fn seed_and_step_tell_the_numbers() {
    let of = |seed, step| {
        let source = RandomSource::new(seed);
        source.set_step(step);
        drawn(&source, 1)
    };
    assert_eq!(of(3, 8), of(3, 8));
    assert_ne!(of(3, 8), of(4, 8));
    let source = RandomSource::new(3);
    source.set_step(7);
    assert_eq!(drawn(&source, 2)[1], of(3, 8)[0]);
    assert_eq!(source.step(), 9);
}
