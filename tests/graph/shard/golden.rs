//! The operations of a transformer layer, as text. `BLESS=1 cargo test golden` writes the files anew.

use std::path::Path;

use burn_parallel::graph::StepGraph;
use burn_parallel::partition::fuse_products;
use burn_parallel::prelude::*;

use super::harness::{Axis, Case};
use super::vocabulary::{Tokens, VOCABULARY, tokens};
use crate::common::models::Lm;

const LAYER: Case<Lm, Tokens> =
    Case { make: |d| Lm::wide(VOCABULARY, 0.1, true, 1, d), batch: tokens, loss: |m, (x, y)| m.loss(x, y) };

fn check(name: &str, graph: &StepGraph) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/graph/shard/golden").join(name);
    let found = graph.to_string();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &found).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    for (number, (expected, found)) in expected.lines().zip(found.lines()).enumerate() {
        assert_eq!(expected, found, "line {} of {}", number + 1, path.display());
    }
    assert_eq!(expected.lines().count(), found.lines().count(), "{}", path.display());
}

#[test]
fn golden_layer() {
    check("whole.txt", &LAYER.capture());
    let axis = || Axis::new("tp", 2, Plan::megatron());
    check("tensor.txt", &LAYER.split(&[axis()], &[1]).0);
    check("sequence.txt", &LAYER.split(&[axis().sequence(1)], &[1]).0);
    let fused = |axis: Axis| {
        let mut graph = LAYER.split(&[axis], &[1]).0;
        fuse_products(&mut graph);
        graph
    };
    check("tensor_fused.txt", &fused(axis()));
    check("sequence_fused.txt", &fused(axis().sequence(1)));
}

#[test]
fn the_same_step_gives_the_same_graph() {
    let text = |graph: &StepGraph| format!("{:?}", graph.operations);
    assert_eq!(text(&LAYER.capture()), text(&LAYER.capture()));
    let axes = [Axis::new("tp", 2, Plan::megatron()).sequence(1), Axis::batch(3)];
    let split = || LAYER.split(&axes, &[1, 2]);
    let ((first, reports), (second, again)) = (split(), split());
    assert_eq!(text(&first), text(&second));
    assert_eq!(reports, again);
}

/// Every layer gets the same, however many there are.
#[test]
fn the_work_is_linear_in_the_layers() {
    use burn_parallel::partition::CollectiveKind::AllReduce;
    fn of<const LAYERS: usize>(axis: Axis) -> (usize, [usize; 2], usize) {
        let case: Case<Lm, Tokens> = Case {
            make: |d| Lm::wide(VOCABULARY, 0.1, true, LAYERS, d),
            batch: tokens,
            loss: |m, (x, y)| m.loss(x, y),
        };
        let (graph, reports) = case.split(&[axis], &[0]);
        (graph.operations.len(), reports[0].count(AllReduce), reports[0].collectives.len())
    }
    let plain = || Axis::new("tp", 2, Plan::megatron());
    let ([two, three, many], layers) = ([of::<2>(plain()), of::<3>(plain()), of::<24>(plain())], 24);
    assert_eq!(many.0, two.0 + (layers - 2) * (three.0 - two.0));
    assert_eq!((many.1, many.2), ([2 * layers; 2], 4 * layers));
    let sequence = || plain().sequence(1);
    let [two, three, many] = [of::<2>(sequence()), of::<3>(sequence()), of::<24>(sequence())];
    assert_eq!(many.0, two.0 + (layers - 2) * (three.0 - two.0));
    assert_eq!(many.2, two.2 + (layers - 2) * (three.2 - two.2));
}
