//! How fast, for people: `cargo test --release --test graph -- --ignored --nocapture`.

use std::time::Instant;

use burn::module::Module;
use burn::prelude::*;
use burn_parallel::graph::{CustomOps, Executor, GraphInputs, MemoryEstimate, capture_step};

use super::models::*;

fn compare<M: Module, I: GraphInputs + Clone>(name: &str, model: M, batch: I, loss: impl Fn(&M, I) -> Tensor<1>) {
    let start = Instant::now();
    let graph = capture_step(&model, batch.clone(), &loss).unwrap();
    let capture = start.elapsed();
    let (operations, recorded) = (graph.operations.len(), MemoryEstimate::of_operations(&graph.operations));
    let start = Instant::now();
    let mut executor = Executor::new(graph, CustomOps::new()).unwrap();
    let prepare = start.elapsed();
    let memory = executor.memory();
    let time = |step: &mut dyn FnMut()| {
        let start = Instant::now();
        step();
        step();
        start.elapsed().as_secs_f64() * 500.0
    };
    // In turns, so that both meet the same disturbances; the first turn is not counted.
    let (mut eager_ms, mut graph_ms) = (f64::MAX, f64::MAX);
    for turn in 0..16 {
        let a = time(&mut || drop(eager(&model, |m| loss(m, batch.clone()))));
        let b = time(&mut || drop(executor.step(&model, batch.clone()).unwrap()));
        if turn > 0 {
            (eager_ms, graph_ms) = (eager_ms.min(a), graph_ms.min(b));
        }
    }
    println!(
        "{name}: {operations} operations, capture {capture:.1?}, prepare {prepare:.1?}; step eager {eager_ms:.2} ms, graph \
         {graph_ms:.2} ms; memory as recorded {recorded:?}, as executed {memory:?}"
    );
}

#[test]
#[ignore = "prints timings"]
fn eager_against_graph() {
    let device = device();
    compare("cnn, batch 16", Cnn::new(&device), images(16, 1, &device), |m, (x, t)| m.loss(x, t));
    let tokens = |n: u64, s| Numbers(n).classes([8, s], 100, &device);
    compare("transformer d64 l2, 8 x 16", Lm::new(100, 64, 2, &device), (tokens(1, 16), tokens(2, 16)), |m, (x, t)| {
        m.loss(x, t)
    });
    compare(
        "transformer d128 l4, 8 x 32",
        Lm::new(100, 128, 4, &device),
        (tokens(1, 32), tokens(2, 32)),
        |m, (x, t)| m.loss(x, t),
    );
}
