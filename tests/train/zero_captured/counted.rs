//! Collectives and their bytes, as exact numbers.

use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::sharding::{Keep, Sharding};
use burn_parallel::train::Engine;

use crate::common::models::{Numbers, device};
use crate::common::reference::filled;

/// Layers without a bias, each a group, of which no number of ranks divides the rows.
fn layers() -> Vec<Linear> {
    let layer = |[from, to]: [usize; 2]| LinearConfig::new(from, to).with_bias(false).init(&device());
    filled(WIDTHS.into_iter().map(layer).collect())
}

/// Each more than the 64 KiB that make a group of their own.
const WIDTHS: [[usize; 2]; 3] = [[151, 113], [113, 157], [157, 131]];

fn forward(layers: &[Linear], x: Tensor<2>) -> Tensor<2> {
    layers.iter().fold(x, |x, layer| layer.forward(x).tanh())
}

/// Bytes of a gather of all rows, with padding: `(n - 1) / n` of them.
fn gathered(layers: &[[usize; 2]], replicas: usize) -> u64 {
    let bytes = |[rows, columns]: &[usize; 2]| rows.next_multiple_of(replicas) * columns * 4;
    let whole: usize = layers.iter().map(bytes).sum();
    (whole / replicas * (replicas - 1)) as u64
}

fn steps(replicas: usize, keep: Keep, micro_batches: usize) -> Vec<[(u64, u64); 2]> {
    launch::threads(replicas)
        .run(|world| {
            let data = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(keep);
            let strategy = Strategy::new().with_data(data).with_engine(Engine::Captured);
            let mut model = layers().parallelize(&world, &strategy)?;
            let batch = |seed: usize| Numbers(seed as u64 * 5 + 1).tensor::<2>([3, WIDTHS[0][0]], &device());
            let mut last = Vec::new();
            for _ in 0..2 {
                let batches: Vec<_> = (0..micro_batches).map(|place| batch(place * 8 + world.rank())).collect();
                let step = model.step_micro_batches(batches, |model, x| forward(model, x).powi_scalar(2).mean())?;
                let gathers = step.counters.parameters.of("all_gather");
                let scatters = step.counters.gradients.of("reduce_scatter");
                let both = [(gathers.calls, gathers.bytes), (scatters.calls, scatters.bytes)];
                // Nothing else goes over these groups.
                assert_eq!(step.counters.parameters.total().calls, gathers.calls);
                assert_eq!(step.counters.gradients.total().calls, scatters.calls);
                last.push(both);
            }
            assert_eq!(last[0], last[1], "every step exchanges the same");
            Ok(last[0])
        })
        .unwrap()
}

#[test]
fn bytes_are_those_of_the_formula() {
    for replicas in [2, 3, 4] {
        for micro_batches in [1, 3] {
            let m = micro_batches as u64;
            let (all, behind_the_first) = (gathered(&WIDTHS, replicas), gathered(&WIDTHS[1..], replicas));
            for (keep, calls, bytes) in [
                // The gradient of the inputs is not asked for, so that the first layer is not read in the backward pass.
                (Keep::Pass, 5 * m, m * (all + behind_the_first)),
                (Keep::MicroBatch, 3 * m, m * all),
                (Keep::Step, 3, all),
            ] {
                for found in steps(replicas, keep, micro_batches) {
                    assert_eq!(found, [(calls, bytes), (3 * m, m * all)], "{keep:?}, {replicas} x {micro_batches}");
                }
            }
        }
    }
}
