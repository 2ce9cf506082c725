//! Replicas train like one device on the whole batch: losses and every parameter, over several optimizer steps.

use burn::module::Module;
use burn::optim::{AdamWConfig, ModuleOptimizer, SgdConfig};
use burn_parallel::comm::part;
use burn_parallel::prelude::*;

use crate::common::cases::{self, Case, wrap};
use crate::common::fill::filled_from;
use crate::common::reference::{all_same, values};

const WORLDS: [usize; 5] = [1, 2, 3, 4, 8];
const STEPS: usize = 4;
const ROWS: usize = 11;

fn optimizer(name: &str) -> ModuleOptimizer {
    match name {
        "adamw" => AdamWConfig::new().init(),
        _ => SgdConfig::new().init(),
    }
}

fn parity<M: Module + Sync>(case: Case<M>) {
    for optim in ["adamw", "sgd"] {
        let (losses, expected) = case.alone(optimizer(optim), 1e-2, &[ROWS; STEPS]);
        for size in WORLDS {
            let ranks = launch::threads(size)
                .run(|rank| {
                    let mut model = wrap(&rank, &case.model, DataParallelConfig::new().with_bucket_bytes(3000))?;
                    let mut optim = optimizer(optim);
                    let mut seen = Vec::new();
                    for step in 0..STEPS {
                        let rows = part(ROWS, size, rank.rank());
                        let batch = (!rows.is_empty()).then(|| (case.input)(step, rows.clone()));
                        let done = model.step_micro_batches(batch, |model, input| {
                            Loss::mean((case.loss)(model, input), rows.len() as f64)
                        })?;
                        assert_eq!(done.weight, ROWS as f64);
                        seen.push(done.loss.item());
                        model = optim.step(1e-2, model, done.grads);
                    }
                    Ok((seen, values(&model)))
                })
                .unwrap();
            for (seen, found) in &ranks {
                for (a, b) in losses.iter().zip(seen) {
                    assert!((a - b).abs() <= 1e-5 * a.abs().max(1e-3), "{size} ranks, {optim}: loss {a} against {b}");
                }
                all_same(&format!("{size} ranks, {optim}"), &expected, found, 2e-5);
                assert_eq!(found, &ranks[0].1, "replicas are bit-identical");
            }
        }
    }
}

#[test]
fn mlp() {
    parity(cases::mlp());
}

#[test]
fn transformer_encoder() {
    parity(cases::transformer());
}

#[test]
fn lstm() {
    parity(cases::lstm());
}

#[test]
fn convolutions() {
    parity(cases::cnn());
}

#[test]
fn tied_weights() {
    parity(cases::tied());
}

#[test]
fn frozen_parameters() {
    let mut case = cases::mlp();
    case.model = case.model.freeze_group(burn::module::ParamGroup::from_paths(vec!["between.0.weight", "first.bias"]));
    parity(case);
}

#[test]
fn lora_adapters() {
    let mut case = cases::transformer();
    case.model = filled_from(7, case.model.apply_lora(burn::module::Lora::new(2, 4.0)));
    parity(case);
}

/// Batch norm over all ranks is batch norm over the whole batch, running statistics included.
#[test]
fn synchronised_batch_norm() {
    let case = cases::cnn_with_batch_norm();
    for optim in ["adamw", "sgd"] {
        let (losses, expected) = case.alone(optimizer(optim), 1e-2, &[ROWS; STEPS]);
        for size in WORLDS {
            let ranks = launch::threads(size)
                .run(|rank| {
                    let mut model = wrap(&rank, &case.model, DataParallelConfig::new().with_bucket_bytes(500))?;
                    let mut optim = optimizer(optim);
                    let mut seen = Vec::new();
                    for step in 0..STEPS {
                        let rows = part(ROWS, size, rank.rank());
                        let input = (case.input)(step, rows.clone());
                        let batch = vec![((input.features, input.targets), rows.len() as f64)];
                        let done = model.step_sync_batch_norm(batch, |model, (features, targets)| {
                            let tokens = burn::tensor::Tensor::zeros([1, 1], &features.device());
                            (case.loss)(model, cases::Batch { features, tokens, targets })
                        })?;
                        seen.push(done.loss.item());
                        model = optim.step(1e-2, model, done.grads);
                    }
                    // Two collectives forward and two backward for the one batch norm, and one a step to agree.
                    assert_eq!(model.counters().statistics.of("all_reduce").calls, 4 * STEPS as u64);
                    Ok((seen, values(&model)))
                })
                .unwrap();
            for (seen, found) in &ranks {
                for (a, b) in losses.iter().zip(seen) {
                    assert!((a - b).abs() <= 1e-5 * a.abs().max(1e-3), "{size} ranks, {optim}: loss {a} against {b}");
                }
                all_same(&format!("{size} ranks, {optim}"), &expected, found, 1e-4);
                assert_eq!(found, &ranks[0].1, "replicas are bit-identical");
            }
        }
    }
}
