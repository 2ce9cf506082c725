//! Collectives in buckets, and overlapped: the same numbers, and work between start and wait.

use burn_parallel::graph::StepGraph;
use burn_parallel::partition::{bucket_reductions, overlap};
use burn_parallel::prelude::*;

use super::harness::Axis;
use super::vocabulary::{TOKENS, megatron_with_vocabulary};

/// The operations of a graph by name, in order.
fn names(graph: &StepGraph) -> Vec<String> {
    let line = |line: &str| line.split(" = ").nth(1).map(|op| op.split(" %").next().unwrap_or_default().to_string());
    graph.to_string().lines().filter_map(line).collect()
}

fn count(graph: &StepGraph, what: &str) -> usize {
    names(graph).iter().filter(|name| name.contains(what)).count()
}

#[test]
fn gradients_are_reduced_in_buckets() {
    let (graph, _) = TOKENS.split(&[Axis::batch(2)], &[0]);
    let gradients = graph.params.len();
    let bytes: usize = graph.params.iter().map(|p| 4 * p.tensor.shape.num_elements()).sum();
    assert_eq!(count(&graph, "all_reduce"), gradients + 1);

    let mut one = graph.clone();
    assert_eq!(bucket_reductions(&mut one, usize::MAX), (1, gradients));
    assert_eq!(count(&one, "all_reduce"), 2);
    let mut each = graph.clone();
    assert_eq!(bucket_reductions(&mut each, 0), (gradients, gradients));
    let mut some = graph.clone();
    let (left, _) = bucket_reductions(&mut some, bytes / 4);
    assert!((3..=4).contains(&left), "{left}");
}

#[test]
fn what_sequence_parallelism_leaves_partial_is_one_collective() {
    let axes = [Axis::new("tp", 2, megatron_with_vocabulary()).sequence(1)];
    let (mut graph, report) = TOKENS.split(&axes, &[0]);
    let small = report[0].collectives.iter().filter(|c| c.reader == "result" && !c.forward).count();
    // Norms, and the biases of the layers that are split by rows.
    assert_eq!(small, 2 * (4 + 2) + 2, "{}", report[0]);
    assert_eq!(bucket_reductions(&mut graph, 1 << 20), (1, small));
}

fn folded_and_overlapped(graph: &mut StepGraph) {
    bucket_reductions(graph, 4096);
    let before = graph.operations.len();
    let apart = overlap(graph);
    assert_eq!(graph.operations.len(), before + apart);
}

#[test]
fn parity() {
    let references = TOKENS.alone(3);
    let plan = megatron_with_vocabulary;
    for axes in [
        vec![Axis::batch(2)],
        vec![Axis::new("tp", 2, plan())],
        vec![Axis::new("tp", 3, plan()).sequence(1)],
        vec![Axis::new("tp", 2, plan()).sequence(1), Axis::batch(2)],
        vec![Axis::batch(2), Axis::new("tp", 2, Plan::megatron())],
    ] {
        TOKENS.compare_rewritten(&axes, &references, folded_and_overlapped).unwrap();
    }
}

#[test]
fn work_stands_between_start_and_wait() {
    let (mut graph, _) = TOKENS.split(&[Axis::new("tp", 2, Plan::megatron())], &[0]);
    let apart = overlap(&mut graph);
    // Forward the residual waits for its bias; backward the gradient of what enters a split block is reduced while
    // those of the block's weights are computed.
    assert_eq!(apart, 8, "{graph}");
    let names = names(&graph);
    let starts = names.iter().enumerate().filter(|(_, name)| name.contains("start_"));
    for (start, _) in starts {
        let wait = names[start..].iter().position(|name| name.contains("wait")).unwrap() + start;
        let beside = if start < graph.forward_len { "Add" } else { "Matmul" };
        assert!(names[start..wait].iter().any(|name| name.contains(beside)), "{graph}");
    }
    assert_eq!(count(&graph, "all_reduce"), 8);
}

#[test]
fn every_rank_starts_in_the_same_order() {
    let axes = [Axis::new("tp", 2, megatron_with_vocabulary()).sequence(1), Axis::batch(2)];
    let of = |place: [usize; 2]| {
        let (mut graph, _) = TOKENS.split(&axes, &place);
        folded_and_overlapped(&mut graph);
        graph
    };
    let first = of([0, 0]);
    for place in [[0, 1], [1, 0], [1, 1]] {
        let graph = of(place);
        assert_eq!(names(&graph), names(&first));
        assert_eq!(graph.collective_fingerprint(), first.collective_fingerprint());
    }
}

#[test]
fn one_rank_has_nothing_to_overlap() {
    let (mut graph, _) = TOKENS.split(&[Axis::new("tp", 1, Plan::megatron())], &[0]);
    let before = graph.to_string();
    assert_eq!((overlap(&mut graph), bucket_reductions(&mut graph, 1 << 20)), (0, (0, 0)));
    assert_eq!(graph.to_string(), before);
}

/// A rank that fails between start and wait ends the step of all.
#[test]
fn nobody_waits_for_a_rank_that_failed() {
    use burn_parallel::graph::{CustomOps, Executor, capture_step};
    use burn_parallel::partition::register_collectives;

    use super::harness::split;
    let failed = launch::threads(2).run(|rank| {
        let model = (TOKENS.make)(&crate::common::models::device());
        let graph = capture_step(&model, (TOKENS.batch)(0), TOKENS.loss)?;
        let (mut graph, _) = split(graph, &[Axis::batch(2)], &[rank.rank()]);
        overlap(&mut graph);
        let mut ops = CustomOps::new();
        register_collectives(&mut ops, "dp", &rank);
        let mut executor = Executor::new(graph, ops)?;
        let mut given = 0;
        executor.step_with(&model, (TOKENS.batch)(0), |_, _| {
            given += 1;
            if rank.rank() == 1 && given == 3 { Err(Error::user("the third gradient is one too many")) } else { Ok(()) }
        })?;
        rank.barrier()
    });
    let said = failed.unwrap_err().to_string();
    assert!(said.contains("rank 1") && said.contains("one too many"), "{said}");
}
