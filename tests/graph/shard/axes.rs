//! Several mesh axes at once.

use burn_parallel::partition::CollectiveKind;
use burn_parallel::prelude::*;

use super::harness::{Axis, Case};
use super::vocabulary::{TOKENS, megatron_with_vocabulary};
use crate::common::models::Lm;

#[test]
fn batch_by_tensor_axes() {
    let references = TOKENS.alone(3);
    let gradients = references[0].gradients.len();
    for (dp, tp) in [(2, 2), (3, 2), (2, 3), (1, 2), (2, 1)] {
        for batch_first in [false, true] {
            let mut axes = vec![Axis::new("tp", tp, Plan::megatron()), Axis::batch(dp)];
            if batch_first {
                axes.reverse();
            }
            let reports = TOKENS.compare(&axes, &references).unwrap();
            for report in &reports {
                assert!(report.fallbacks.is_empty(), "{report}");
                let degree = if report.axis == "tp" { tp } else { dp };
                let expected = match report.axis.as_str() {
                    _ if degree == 1 => [0, 0],
                    "tp" => [4, 4],
                    _ => [1, gradients],
                };
                assert_eq!(report.count(CollectiveKind::AllReduce), expected, "{report}");
                assert_eq!(report.collectives.len(), expected[0] + expected[1], "{report}");
            }
        }
    }
}

#[test]
fn one_dim_split_by_both_axes() {
    let references = TOKENS.alone(2);
    let rows = || Plan::new().shard("*.weight", 0);
    let columns = || Plan::new().shard("*.weight", 1);
    for [outer, inner] in [[rows(), rows()], [columns(), columns()], [columns(), rows()], [rows(), columns()]] {
        let axes = [Axis::new("outer", 2, outer), Axis::new("inner", 2, inner)];
        TOKENS.compare(&axes, &references).unwrap();
    }
}

#[test]
fn fingerprints_tell_the_axes_apart() {
    let axes = |tp| [Axis::new("tp", 2, tp), Axis::batch(2)];
    let ranks: Vec<_> =
        [[0, 0], [0, 1], [1, 0], [1, 1]].map(|place| TOKENS.split(&axes(Plan::megatron()), &place).0).into();
    let other = TOKENS.split(&axes(megatron_with_vocabulary()), &[0, 0]).0;
    for rank in &ranks {
        assert_eq!(rank.axis_fingerprint("tp"), ranks[0].axis_fingerprint("tp"));
        assert_eq!(rank.axis_fingerprint("dp"), ranks[0].axis_fingerprint("dp"));
    }
    assert_ne!(ranks[0].axis_fingerprint("tp"), ranks[0].axis_fingerprint("dp"));
    assert_ne!(ranks[0].axis_fingerprint("tp"), other.axis_fingerprint("tp"));
}

#[test]
fn an_axis_is_partitioned_once() {
    use burn_parallel::partition::{PartitionOptions, partition};
    let case: &Case<Lm, _> = &TOKENS;
    let (graph, _) = case.split(&[Axis::batch(2)], &[0]);
    let layouts = vec![Layout::Replicated; graph.params.len()];
    let again = partition(&graph, &layouts, &[Layout::Replicated; 2], &PartitionOptions::new("dp", 2, 0));
    assert!(again.unwrap_err().to_string().contains("axis `dp` already"));
}
