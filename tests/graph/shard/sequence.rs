//! Sequence parallelism.

use burn_parallel::partition::CollectiveKind::{AllGather, AllReduce, AllToAll, ReduceScatter};
use burn_parallel::prelude::*;

use super::harness::Axis;
use super::vocabulary::{POST, SEQUENCE, TOKENS, megatron_with_vocabulary};

#[test]
fn all_reduces_become_reduce_scatters_and_gathers() {
    for (case, layers) in [(TOKENS, 2), (POST, 2)] {
        let references = case.alone(3);
        for degree in [2, 3, 4] {
            let axes = [Axis::new("tp", degree, megatron_with_vocabulary()).sequence(1)];
            let reports = case.compare(&axes, &references).unwrap();
            let report = &reports[0];
            assert!(report.fallbacks.iter().all(|f| f.operation.contains("Reshape")), "{report}");
            assert_eq!(report.count(AllToAll), [0, 0], "{report}");
            // Two pairs a layer; the embedding scatters and the head gathers, and the other way round on the way back.
            assert_eq!(report.count(ReduceScatter), [2 * layers + 1, 2 * layers + 1], "{report}");
            assert_eq!(report.count(AllGather), [2 * layers + 1, 2 * layers + 1], "{report}");
            let whole = report.collectives.iter().filter(|c| c.kind == AllReduce);
            assert!(whole.clone().all(|c| c.dims != [6, SEQUENCE, 24]), "{report}");
        }
    }
}

/// Without a split vocabulary the logits are split along the sequence, and go over to the loss split along the batch.
#[test]
fn a_head_that_is_not_split() {
    let references = TOKENS.alone(2);
    for degree in [2, 3] {
        let reports = TOKENS.compare(&[Axis::new("tp", degree, Plan::megatron()).sequence(1)], &references).unwrap();
        let report = &reports[0];
        assert!(report.fallbacks.iter().all(|f| f.operation.contains("Reshape")), "{report}");
        assert_eq!(report.count(ReduceScatter), [4, 4], "{report}");
        assert_eq!(report.count(AllGather), [4, 4], "{report}");
        assert_eq!(report.count(AllToAll), [1, 1], "{report}");
        let results = report.collectives.iter().filter(|c| c.kind == AllReduce);
        assert!(results.clone().all(|c| c.reader == "result"), "{report}");
    }
}

#[test]
fn with_a_batch_axis() {
    let references = TOKENS.alone(2);
    for plan in [Plan::megatron(), megatron_with_vocabulary()] {
        let axes = [Axis::new("tp", 2, plan).sequence(1), Axis::batch(2)];
        TOKENS.compare(&axes, &references).unwrap();
    }
}

#[test]
fn along_the_batch_or_without_a_plan() {
    let references = TOKENS.alone(2);
    for dim in [0, 1] {
        for plan in [Plan::new(), Plan::megatron()] {
            TOKENS.compare(&[Axis::new("tp", 2, plan).sequence(dim)], &references).unwrap();
        }
    }
    // What the degree does not divide stays whole.
    TOKENS.compare(&[Axis::new("tp", 4, Plan::megatron()).sequence(0)], &references).unwrap();
}
