//! Embeddings, output layers and losses split along the vocabulary.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::partition::CollectiveKind::{self, AllGather, AllReduce, AllReduceMax};
use burn_parallel::prelude::*;

use super::harness::{Axis, Case};
pub use crate::common::models::Tokens;
use crate::common::models::{Lm, Numbers, device};

pub const VOCABULARY: usize = 24;
pub const SEQUENCE: usize = 12;

pub fn tokens(seed: u64) -> Tokens {
    let mut numbers = Numbers(seed + 50);
    let mut draw = || numbers.classes([6, SEQUENCE], VOCABULARY, &device());
    (draw(), draw())
}

pub const TOKENS: Case<Lm, Tokens> =
    Case { make: |d| Lm::wide(VOCABULARY, 0.0, true, 2, d), batch: tokens, loss: |m, (x, y)| m.loss(x, y) };
pub const POST: Case<Lm, Tokens> =
    Case { make: |d| Lm::wide(VOCABULARY, 0.0, false, 2, d), batch: tokens, loss: |m, (x, y)| m.loss(x, y) };

/// Megatron-LM's plan with the vocabulary split too.
pub fn megatron_with_vocabulary() -> Plan {
    Plan::megatron().shard("embedding.weight", 0).shard("head.weight", 1).shard("head.bias", 0)
}

#[test]
fn the_full_logits_are_never_gathered() {
    let references = TOKENS.alone(3);
    for degree in [2, 3, 4] {
        let axes = [Axis::new("tp", degree, megatron_with_vocabulary())];
        let reports = TOKENS.compare(&axes, &references).unwrap();
        let report = &reports[0];
        assert!(report.fallbacks.is_empty(), "{report}");
        assert_eq!(report.count(AllGather), [0, 0], "{report}");
        assert_eq!(report.count(AllReduceMax), [1, 0], "{report}");
        // The embedding, two a layer, the sum of exponentials, and the target's log-probability, which is the loss.
        assert_eq!(report.count(AllReduce), [1 + 4 + 2, 4 + 1 + 1], "{report}");
        let rows = 6 * SEQUENCE;
        for collective in &report.collectives {
            assert!(!collective.dims.contains(&VOCABULARY) || collective.dims == [6, SEQUENCE, 24], "{report}");
        }
        let small = report.collectives.iter().filter(|c| c.dims == [rows, 1]).count();
        assert_eq!(small, 3, "{report}");
    }
}

#[test]
fn vocabulary_over_two_axes() {
    let references = TOKENS.alone(2);
    let axes = [Axis::new("tp", 2, megatron_with_vocabulary()), Axis::batch(2)];
    for report in TOKENS.compare(&axes, &references).unwrap() {
        assert!(report.fallbacks.is_empty(), "{report}");
        assert_eq!(report.count(AllGather), [0, 0], "{report}");
    }
    let vocabulary = || Plan::new().shard("embedding.weight", 0).shard("head.weight", 1).shard("head.bias", 0);
    let axes = [Axis::new("outer", 2, vocabulary()), Axis::new("inner", 3, vocabulary())];
    TOKENS.compare(&axes, &references).unwrap();
}

/// Reads and writes by index and reductions of all kinds, along a dim that may be split.
#[derive(Module, Debug)]
pub struct Reductions {
    pub table: Embedding,
    pub other: Linear,
}

impl Reductions {
    fn new(device: &Device) -> Self {
        Self { table: EmbeddingConfig::new(12, 12).init(device), other: LinearConfig::new(12, 12).init(device) }
    }

    fn loss(&self, (x, indices): (Tensor<2>, Tensor<1, Int>)) -> Tensor<1> {
        let table = self.table.weight.val();
        let h = self.other.forward(x).tanh();
        let rows = table.clone().select(0, indices.clone());
        let columns = table.clone().select(1, indices.clone());
        let picked = h.clone().gather(1, indices.clone().unsqueeze_dim::<2>(0).expand([12, 12]));
        let spread = h.clone().scatter(
            1,
            indices.clone().unsqueeze_dim::<2>(1).expand([12, 12]),
            rows.clone(),
            burn::tensor::IndexingUpdateOp::Add,
        );
        let fixed = h.clone().detach();
        let largest = fixed.clone().max_dim(1) + fixed.clone().min_dim(1) * 0.5 + fixed.clone().max_abs_dim(1);
        let positive = fixed.clone().greater_elem(0.0);
        let truths = positive.clone().any_dim(1).float() + positive.all_dim(1).float();
        let largest = largest + truths + fixed.clone().add_scalar(1.5).prod_dim(1) * 0.01;
        let scaled = h.clone() / (fixed.clone().max() - fixed.min()).unsqueeze::<2>();
        let softmax =
            burn::tensor::activation::softmax(columns.clone(), 0) + burn::tensor::activation::log_softmax(h, 1);
        ((rows * picked + columns + spread) * largest + scaled * softmax).powi_scalar(2).mean()
            + table.mean_dim(0).abs().sum()
    }
}

const REDUCTIONS: Case<Reductions, (Tensor<2>, Tensor<1, Int>)> = Case {
    make: Reductions::new,
    batch: |seed| {
        let mut numbers = Numbers(seed + 3);
        (numbers.tensor([12, 12], &device()), numbers.classes([12], 12, &device()))
    },
    loss: Reductions::loss,
};

#[test]
fn reads_writes_and_reductions_along_split_dims() {
    let references = REDUCTIONS.alone(2);
    for degree in [2, 3, 4] {
        for (table, other) in [(0, 1), (1, 1), (0, 0), (1, 0)] {
            let plan = Plan::new().shard("table.weight", table).shard("other.weight", other);
            let plan = if other == 1 { plan.shard("other.bias", 0) } else { plan };
            REDUCTIONS.compare(&[Axis::new("tp", degree, plan)], &references).unwrap();
        }
        REDUCTIONS.compare(&[Axis::batch(degree)], &references).unwrap();
    }
    let plan = Plan::new().shard("table.weight", 0).shard("other.weight", 1).shard("other.bias", 0);
    REDUCTIONS.compare(&[Axis::new("tp", 2, plan), Axis::batch(2)], &references).unwrap();
}

#[test]
fn the_largest_of_a_split_dim_is_reduced_and_not_gathered() {
    let plan = Plan::new().shard("other.weight", 1).shard("other.bias", 0);
    let (_, reports) = REDUCTIONS.split(&[Axis::new("tp", 2, plan)], &[0]);
    let count = |kind: CollectiveKind| reports[0].count(kind)[0];
    let counts = [AllReduceMax, CollectiveKind::AllReduceMin, CollectiveKind::AllReduceProduct].map(count);
    assert_eq!(counts, [5, 3, 1], "{}", reports[0]);
}
