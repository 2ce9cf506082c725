//! Dims that the degree does not divide, padded.

use burn::module::Module;
use burn::nn::conv::{Conv1d, Conv1dConfig};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::partition::CollectiveKind::{AllGather, AllReduce, AllReduceMax};
use burn_parallel::partition::{PartitionOptions, partition};
use burn_parallel::prelude::*;

use super::harness::{Axis, Case};
use super::vocabulary::{SEQUENCE, TOKENS, Tokens, megatron_with_vocabulary};
use crate::common::models::{Numbers, Tied, cross_entropy, device};

/// 24 words over ranks that do not divide them, and by the same collectives as where they do.
#[test]
fn a_vocabulary_that_the_degree_does_not_divide_is_padded() {
    let references = TOKENS.alone(3);
    let vocabulary = || Plan::new().shard("embedding.weight", 0).shard("head.weight", 1).shard("head.bias", 0);
    let expected = TOKENS.compare(&[Axis::new("tp", 4, vocabulary())], &references).unwrap();
    for degree in [5, 7] {
        let reports = TOKENS.compare(&[Axis::new("tp", degree, vocabulary())], &references).unwrap();
        let report = &reports[0];
        assert!(report.fallbacks.is_empty(), "{report}");
        for kind in [AllGather, AllReduce, AllReduceMax] {
            assert_eq!(report.count(kind), expected[0].count(kind), "{report}");
        }
        let padded = 24usize.next_multiple_of(degree);
        let whole = |c: &burn_parallel::partition::Collective| c.dims.contains(&padded) && c.dims.len() > 1;
        assert!(!report.collectives.iter().any(whole), "{report}");
    }
    TOKENS.compare(&[Axis::new("tp", 5, vocabulary()), Axis::batch(2)], &references).unwrap();
    // Each axis pads what the one before has left.
    TOKENS.compare(&[Axis::batch(2), Axis::new("tp", 5, vocabulary())], &references).unwrap();
    // Only one end, or a bias that is not split.
    for plan in [
        Plan::new().shard("embedding.weight", 0),
        Plan::new().shard("head.weight", 1),
        Plan::new().shard("head.bias", 0),
    ] {
        TOKENS.compare(&[Axis::new("tp", 5, plan)], &references).unwrap();
    }
    // The heads are not cut through: 12 over 5 ranks.
    let reports = TOKENS.compare(&[Axis::new("tp", 5, megatron_with_vocabulary())], &references).unwrap();
    assert!(reports[0].fallbacks.iter().any(|fallback| fallback.operation.contains("Slice")), "{}", reports[0]);
    const _: () = assert!(SEQUENCE == 12);
}

#[test]
fn a_tied_vocabulary_is_padded() {
    let case: Case<Tied, Tokens> = Case {
        make: Tied::new,
        batch: |seed| (Numbers(seed).classes([4, 5], 11, &device()), Numbers(seed + 1).classes([4, 5], 11, &device())),
        loss: |m, (x, t)| m.loss(x, t),
    };
    let references = case.alone(3);
    for degree in [2, 3, 4, 8] {
        let axes = [Axis::new("tp", degree, Plan::new().shard("embedding.weight", 0))];
        let report = &case.compare(&axes, &references).unwrap()[0];
        assert!(report.fallbacks.is_empty(), "{report}");
        assert_eq!(report.count(AllGather), [0, 0], "{report}");
    }
}

/// 7 wide inside and 5 wide at the end.
#[derive(Module, Debug)]
struct Odd {
    first: Linear,
    second: Linear,
    third: Linear,
}

type RowBatch = (Tensor<2>, Tensor<2>);

fn odd(device: &Device) -> Odd {
    Odd {
        first: LinearConfig::new(6, 7).init(device),
        second: LinearConfig::new(7, 9).init(device),
        third: LinearConfig::new(9, 5).init(device),
    }
}

fn rows(seed: u64) -> RowBatch {
    (Numbers(seed).tensor([6, 6], &device()), Numbers(seed + 9).tensor([6, 5], &device()))
}

#[test]
fn layers_of_odd_widths_are_padded() {
    let plan = || {
        Plan::new()
            .shard("first.weight", 1)
            .shard("first.bias", 0)
            .shard("second.weight", 0)
            .shard("third.weight", 1)
            .shard("third.bias", 0)
    };
    // What is 0 stays 0, or becomes something else, or not even a number.
    let gelu: Case<Odd, RowBatch> = Case {
        make: odd,
        batch: rows,
        loss: |m, (x, y)| {
            let x = activation::relu(m.second.forward(activation::gelu(m.first.forward(x))));
            (m.third.forward(x) - y).powi_scalar(2).mean()
        },
    };
    let sigmoid: Case<Odd, RowBatch> = Case {
        loss: |m, (x, y)| {
            let x = activation::sigmoid(m.second.forward(activation::sigmoid(m.first.forward(x))));
            (m.third.forward(x) - y).abs().sum_dim(1).mean()
        },
        ..gelu
    };
    let reciprocal: Case<Odd, RowBatch> = Case {
        loss: |m, (x, y)| {
            let x = m.first.forward(x);
            let x = x.clone() / (x.abs() + 0.0).log().abs().add_scalar(0.5).log().add_scalar(3.0);
            let y = m.third.forward(m.second.forward(x)) * y;
            y.clone().max_dim(1).mean() + activation::softmax(y, 1).powi_scalar(2).mean_dim(1).sum()
        },
        ..gelu
    };
    for case in [gelu, sigmoid, reciprocal] {
        let references = case.alone(3);
        for degree in [2, 3, 4] {
            case.compare(&[Axis::new("tp", degree, plan())], &references).unwrap();
            let rows = Plan::new().shard("third.weight", 0).shard("first.weight", 0).shard("second.*", 0);
            case.compare(&[Axis::new("tp", degree, rows)], &references).unwrap();
        }
    }
}

#[derive(Module, Debug)]
struct Convolved {
    table: Embedding,
    conv: Conv1d,
}

#[test]
fn what_cannot_be_padded_is_an_error() {
    let case: Case<Convolved, Tokens> = Case {
        make: |d| Convolved { table: EmbeddingConfig::new(11, 6).init(d), conv: Conv1dConfig::new(6, 7, 1).init(d) },
        batch: |seed| (Numbers(seed).classes([4, 5], 11, &device()), Numbers(seed).classes([4, 5], 7, &device())),
        loss: |m, (x, t)| {
            let x = m.conv.forward(m.table.forward(x).swap_dims(1, 2)).swap_dims(1, 2);
            cross_entropy(x.reshape([20, 7]), t.reshape([20]))
        },
    };
    let graph = case.capture();
    let plan = Plan::new().shard("conv.weight", 0);
    let params: Vec<Layout> = graph.params.iter().map(|param| plan.layout(&param.path)).collect();
    let error = partition(&graph, &params, &[Layout::Replicated; 2], &PartitionOptions::new("tp", 2, 0)).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("`conv.weight` of dims [7, 6, 1]") && said.contains("does not divide"), "{said}");
    assert!(said.contains("Conv1d"), "{said}");
    // An input is not padded.
    let layouts = vec![Layout::Replicated; graph.params.len()];
    let inputs = [Layout::Sharded(1), Layout::Replicated];
    let said = partition(&graph, &layouts, &inputs, &PartitionOptions::new("tp", 2, 0)).unwrap_err().to_string();
    assert!(said.contains("input `0` of dims [4, 5]") && said.contains("does not divide"), "{said}");
}

/// Trains with layers of odd widths that are padded, each along the dim that `plan` says.
#[track_caller]
fn padded(plan: fn() -> Plan, loss: fn(&Odd, RowBatch) -> Tensor<1>) {
    let case: Case<Odd, RowBatch> = Case { make: odd, batch: rows, loss };
    let references = case.alone(3);
    for degree in [2, 4] {
        case.compare(&[Axis::new("tp", degree, plan())], &references).unwrap();
    }
}

/// What is made from nothing is made larger, and then is not zeros behind.
#[test]
fn what_is_made_larger_beside_padding_is_not_taken_for_zeros() {
    let plan = || Plan::new().shard("first.weight", 1).shard("first.bias", 0);
    padded(plan, |m, (x, y)| {
        let h = m.first.forward(x);
        let ones = Tensor::ones(h.dims(), &h.device());
        let both = Tensor::cat(vec![h, ones * 2.0], 0);
        both.sum_dim(1).powi_scalar(2).mean() + y.sum() * 0.0
    });
    // The gradient of a sum is ones.
    let case: Case<Embedding, Tokens> = Case {
        make: |d| EmbeddingConfig::new(11, 5).init(d),
        batch: |seed| (Numbers(seed).classes([4, 5], 11, &device()), Numbers(seed).classes([4, 5], 7, &device())),
        loss: |m, (x, _)| m.forward(x).sum(),
    };
    let references = case.alone(3);
    case.compare(&[Axis::new("tp", 2, Plan::new().shard("weight", 1))], &references).unwrap();
}

/// One feature, padded, that is spread over others.
#[test]
fn a_padded_dim_of_one_is_spread() {
    let case: Case<[Linear; 2], RowBatch> = Case {
        make: |d| [LinearConfig::new(6, 1).init(d), LinearConfig::new(6, 5).init(d)],
        batch: rows,
        loss: |[gate, layer], (x, y)| {
            let gate = activation::sigmoid(gate.forward(x.clone()));
            (gate * layer.forward(x) - y).powi_scalar(2).mean()
        },
    };
    let references = case.alone(3);
    for plan in [
        Plan::new().shard("0.weight", 1).shard("0.bias", 0),
        Plan::new().shard("0.weight", 1).shard("1.weight", 1).shard("1.bias", 0),
    ] {
        case.compare(&[Axis::new("tp", 2, plan)], &references).unwrap();
    }
}

/// What is made of tensors that are padded along another dim is not made again from them.
#[test]
fn dims_padded_on_either_side() {
    let plan = || Plan::new().shard("first.bias", 0).shard("second.weight", 1).shard("second.bias", 0);
    padded(plan, |m, (x, y)| {
        let [first, second] = [&m.first, &m.second].map(|layer| layer.bias.as_ref().unwrap().val());
        let products = (first * 2.0).reshape([7, 1]) * (second * 3.0).reshape([1, 9]);
        (products * m.second.weight.val()).sum_dim(1).powi_scalar(2).mean() + (x.sum() + y.sum()) * 0.0
    });
}

/// Places in a padded dim are also places in another, which is not padded.
#[test]
fn the_same_places_in_a_padded_tensor_and_another() {
    let plan = || Plan::new().shard("first.weight", 1).shard("first.bias", 0);
    padded(plan, |m, (x, y)| {
        let places = Tensor::<2, Int>::from_data([[0], [6], [3], [1], [5], [2]], &x.device());
        let first = m.first.forward(x.clone());
        let second = m.second.forward(activation::relu(m.first.forward(x)));
        (first.gather(1, places.clone()) * second.gather(1, places)).powi_scalar(2).mean() + y.sum() * 0.0
    });
}
