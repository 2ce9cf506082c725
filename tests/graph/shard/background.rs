//! Fused products over a transport that works beside the ranks' threads: chunks travel while others are multiplied.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::graph::{CustomOps, Executor, capture_step};
use burn_parallel::partition::{bucket_reductions, fuse_products, overlap, register_collectives};
use burn_parallel::prelude::*;

use super::harness::{Axis, Case, cut, split};
use crate::common::forwarding::Forwarding;
use crate::common::models::{Numbers, device, scalar};
use crate::common::reference::{Whole, filled, gradient_values, optimizer, same, values};

#[derive(Module, Debug)]
struct Block {
    entry: Linear,
    up: Linear,
    down: Linear,
}

type Batch = (Tensor<3>, Tensor<3>);

const WIDTH: usize = 512;

/// Large enough to be cut into chunks.
const BLOCK: Case<Block, Batch> = Case {
    make: |d| Block {
        entry: LinearConfig::new(WIDTH, WIDTH).init(d),
        up: LinearConfig::new(WIDTH, 516).init(d),
        down: LinearConfig::new(516, WIDTH).init(d),
    },
    batch: |seed| {
        let mut numbers = Numbers(seed);
        let mut draw = || numbers.tensor([2, 512, WIDTH], &device());
        (draw(), draw())
    },
    loss: |block, (x, y)| {
        let x = block.entry.forward(x);
        let z = block.down.forward(activation::gelu(block.up.forward(x.clone()))) + x;
        (z - y).powi_scalar(2).mean()
    },
};

#[test]
fn chunks_travel_beside_the_products() {
    let references = BLOCK.alone(2);
    let plan = || Plan::new().shard("up.weight", 1).shard("up.bias", 0).shard("down.weight", 0);
    for axis in [Axis::new("tp", 2, plan()), Axis::new("tp", 3, plan()), Axis::new("tp", 2, plan()).sequence(1)] {
        let (axes, sequence) = ([axis.clone()], axis.sequence.is_some());
        let calls = launch::threads(axis.degree)
            .threads_per_rank(1)
            .run(|rank| {
                let comm = Forwarding::over(rank.split(0, rank.rank() as i64)?, |_| ());
                let (whole, place) = (filled((BLOCK.make)(&device())), [rank.rank()]);
                let graph = capture_step(&whole, (BLOCK.batch)(0), BLOCK.loss)?;
                let (mut graph, _) = split(graph, &axes, &place);
                assert_eq!(fuse_products(&mut graph).len(), if sequence { 4 } else { 2 });
                bucket_reductions(&mut graph, 1 << 20);
                overlap(&mut graph);
                let mut ops = CustomOps::new();
                register_collectives(&mut ops, "tp", &comm);
                let mut executor = Executor::new(graph, ops)?;
                let (mut model, mut optim) = (cut(whole, &axes, &place), optimizer());
                for (step, reference) in references.iter().enumerate() {
                    let result = executor.step(&model, (BLOCK.batch)(step as u64))?;
                    let found = scalar(result.loss);
                    assert!((found - reference.loss).abs() < 1e-4 * reference.loss, "{found} {}", reference.loss);
                    let part = |path: &str, whole: &Whole| whole.part(axis.plan.layout(path), axis.degree, place[0]);
                    for (path, found) in &gradient_values(&model, &result.gradients) {
                        same(path, &part(path, &reference.gradients[path]), found, 3e-4);
                    }
                    model = optim.step(0.05, model, result.gradients);
                    for (path, found) in &values(&model) {
                        same(path, &part(path, &reference.after[path]), found, 3e-4);
                    }
                }
                let counters = comm.counters();
                Ok(["all_reduce", "reduce_scatter", "all_gather"].map(|name| counters.of(name).calls))
            })
            .unwrap();
        // One product in each direction, two steps; of two chunks each, or of one where a third of it is too little to
        // cut.
        let [sums, scatters, gathers] = calls[0];
        match (sequence, axis.degree) {
            (false, 2) => assert_eq!(sums, 8, "{calls:?}"),
            (false, _) => assert_eq!(sums, 4, "{calls:?}"),
            (true, _) => assert_eq!((scatters, gathers), (8, 8), "{calls:?}"),
        }
    }
}
