//! Collectives and their bytes, as exact numbers.

use std::time::Duration;

use burn::nn::{Linear, LinearConfig};
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn::tensor::FloatDType;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::checkpointing::own_by;
use crate::common::models::{Numbers, device};
use crate::common::reference::{Whole, filled, values};

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
                // The gradient of the inputs is not asked for, so that the first layer is not read in the backward
                // pass.
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

/// Gradients travel in 16 bits: half of the bytes, and sums that differ by the rounding of that.
#[test]
fn gradients_may_travel_in_another_dtype() {
    let run = |dtype: Option<FloatDType>| {
        launch::threads(3)
            .run(|world| {
                let mut data = DataParallelConfig::new().with_sharding(Sharding::Parameters);
                data.reduce_dtype = dtype;
                let mut model = layers().parallelize(&world, &captured(data))?;
                let x = Numbers(world.rank() as u64).tensor::<2>([3, WIDTHS[0][0]], &device());
                let step = model.step(x, |model, x| forward(model, x).powi_scalar(2).mean())?;
                let bytes = step.counters.gradients.total().bytes;
                let mut optim: ModuleOptimizer = SgdConfig::new().init();
                let before = values(&model.assemble()?);
                model = model.optimize(&mut optim, 1.0, step)?;
                let after = values(&model.assemble()?);
                let moved = |(path, whole): (&String, &Whole)| {
                    whole.values.iter().zip(&before[path].values).map(|(a, b)| a - b).collect::<Vec<_>>()
                };
                Ok((bytes, after.iter().flat_map(moved).collect::<Vec<f32>>()))
            })
            .unwrap()
            .remove(0)
    };
    let ((bytes, expected), (fewer, found)) = (run(None), run(Some(FloatDType::BF16)));
    assert_eq!(bytes, 2 * fewer);
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    let worst = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst > 0.0 && worst < 1e-2 * largest, "{worst} of {largest}");
}

/// A rank that waits for the rows of another counts how long: here for one that is late between two layers.
#[test]
fn waiting_is_counted() {
    // So long that the other is there in the meantime, whatever else the machine does.
    const LATE: Duration = Duration::from_millis(200);
    for engine in [Engine::Eager, Engine::Captured] {
        for keep in [Keep::Pass, Keep::Step] {
            launch::threads(2)
                .run(|world| {
                    let data = DataParallelConfig::new().with_sharding(Sharding::Parameters).with_keep(keep);
                    let strategy = captured(data).with_engine(engine);
                    let mut model = own_by(&layers(), &strategy).parallelize(&world, &strategy)?;
                    let x = Numbers(3).tensor::<2>([3, WIDTHS[0][0]], &device());
                    let late = world.rank() == 0 && engine == Engine::Eager;
                    let step = model.step(x, |model, x| {
                        let x = model[0].forward(x);
                        if late {
                            std::thread::sleep(LATE);
                        }
                        forward(&model[1..], x).powi_scalar(2).mean()
                    })?;
                    let least = if engine == Engine::Eager && !late { LATE / 4 } else { Duration::ZERO };
                    let waited = step.counters.waited;
                    assert!(waited > least, "{engine:?}, {keep:?}: {waited:?}");
                    Ok(())
                })
                .unwrap();
        }
    }
}

fn captured(data: DataParallelConfig) -> Strategy {
    Strategy::new().with_data(data).with_engine(Engine::Captured)
}
