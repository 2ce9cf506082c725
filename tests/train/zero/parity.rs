//! Sharded replicas train like one device: losses and every parameter, over several steps.

use burn::module::{Lora, Module, ParamGroup};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, FloatDType, Tensor};
use burn_parallel::prelude::*;

use super::{LEVELS, config, optimizer, train};
use crate::common::cases::{self, Batch, Case};
use crate::common::fill::filled_from;
use crate::common::reference::all_same;

const STEPS: usize = 4;
const ROWS: usize = 11;

/// On every number of ranks and every level, with the tolerances of each optimizer.
fn parity<M: Module + Sync>(case: &Case<M>, optimizers: &[&str], worlds: &[usize], rows: usize, micro_batches: usize) {
    for optim in optimizers {
        let (losses, expected) = case.alone(optimizer(optim), 1e-2, &[rows; STEPS]);
        for &size in worlds {
            for level in LEVELS {
                let what = format!("{size} ranks, {optim}, {level}");
                let ranks = launch::threads(size)
                    .run(|rank| train(&rank, case, config(level), optimizer(optim), &[rows; STEPS], micro_batches))
                    .unwrap();
                for (seen, found) in &ranks {
                    for (a, b) in losses.iter().zip(seen) {
                        assert!((a - b).abs() <= 2e-5 * a.abs().max(1e-3), "{what}: loss {a} against {b}");
                    }
                    all_same(&what, &expected, found, if *optim == "muon" { 2e-4 } else { 3e-5 });
                    assert_eq!(found, &ranks[0].1, "{what}: replicas are bit-identical");
                }
            }
        }
    }
}

const ALL: [&str; 3] = ["sgd", "adamw", "muon"];

#[test]
fn mlp() {
    parity(&cases::mlp(), &ALL, &[1, 2, 3, 4, 8], ROWS, 1);
}

#[test]
fn transformer_encoder() {
    parity(&cases::transformer(), &ALL, &[2, 3, 8], ROWS, 1);
}

#[test]
fn micro_batches() {
    parity(&cases::mlp(), &ALL, &[1, 2, 3], ROWS, 3);
}

/// Some ranks have fewer micro-batches than others, and some have none.
#[test]
fn ranks_without_data() {
    parity(&cases::transformer(), &["adamw"], &[2, 4, 8], 5, 2);
}

#[test]
fn convolutions() {
    parity(&cases::cnn(), &["sgd", "adamw"], &[3, 4], ROWS, 1);
}

#[test]
fn tied_weights() {
    parity(&cases::tied(), &ALL, &[3, 4], ROWS, 1);
}

#[test]
fn frozen_parameters() {
    let mut case = cases::mlp();
    case.model = case.model.freeze_group(ParamGroup::from_paths(vec!["between.0.weight", "first.bias"]));
    parity(&case, &["adamw"], &[2, 4], ROWS, 2);
}

#[test]
fn lora_adapters() {
    let mut case = cases::transformer();
    case.model = filled_from(7, case.model.apply_lora(Lora::new(2, 4.0)));
    parity(&case, &["adamw"], &[2, 3], ROWS, 1);
}

#[derive(Module, Debug)]
struct Mixed {
    first: Linear,
    half: Linear,
    last: Linear,
}

impl Mixed {
    fn loss(&self, batch: Batch) -> Tensor<1> {
        let x = self.first.forward(batch.features.mean_dim(1).squeeze_dim::<2>(1)).tanh();
        let x = self.half.forward(x.cast(FloatDType::BF16)).cast(FloatDType::F32).tanh();
        (self.last.forward(x) - batch.targets).powi_scalar(2).mean()
    }
}

/// A layer of another dtype, of which the bias is not trained: groups that agree in nothing.
#[test]
fn mixed_dtypes() {
    let device = Device::flex().autodiff();
    let layer = |from, to| filled_from(from as u64, LinearConfig::new(from, to).init(&device));
    let half = layer(9, 7);
    let cast = |tensor: Tensor<2>| tensor.cast(FloatDType::BF16).detach().require_grad();
    let half = Linear {
        weight: half.weight.map(cast),
        bias: half.bias.map(|bias| bias.map(|bias| bias.cast(FloatDType::BF16).detach()).set_require_grad(false)),
    };
    let model = Mixed { first: layer(8, 9), half, last: layer(7, 4) };
    let case = Case { model, loss: Mixed::loss, input: cases::batch };
    let (_, expected) = case.alone(optimizer("sgd"), 1e-2, &[ROWS; STEPS]);
    for level in LEVELS {
        let runs = launch::threads(3)
            .run(|rank| train(&rank, &case, config(level), optimizer("sgd"), &[ROWS; STEPS], 2))
            .unwrap();
        all_same(&format!("{level}"), &expected, &runs[0].1, 2e-2);
    }
}

/// Rows divided among neighbours, and replicated over the others.
#[test]
fn some_of_the_replicas() {
    let case = cases::transformer();
    let (losses, expected) = case.alone(optimizer("muon"), 1e-2, &[ROWS; STEPS]);
    for (size, ranks) in [(4, 2), (4, 1), (6, 3), (4, 4)] {
        for level in LEVELS {
            let config = config(level).with_sharding_ranks(ranks);
            let runs = launch::threads(size)
                .run(|rank| train(&rank, &case, config.clone(), optimizer("muon"), &[ROWS; STEPS], 2))
                .unwrap();
            for (seen, found) in &runs {
                let what = format!("{ranks} of {size} ranks, {level}");
                for (a, b) in losses.iter().zip(seen) {
                    assert!((a - b).abs() <= 2e-5 * a.abs().max(1e-3), "{what}: loss {a} against {b}");
                }
                all_same(&what, &expected, found, 2e-4);
                assert_eq!(found, &runs[0].1, "{what}: replicas are bit-identical");
            }
        }
    }
}
