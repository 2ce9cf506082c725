//! Replicas that use different parameters in the same micro-batch, as where the data decide which layers are used.

use burn::nn::{Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::checkpointing::own_by;
use crate::common::models::{Numbers, device};
use crate::common::reference::{Wholes, all_same, filled, optimizer, own, values};

const STEPS: usize = 4;

/// Large enough that each layer is a group of its own; no number of ranks divides its rows.
pub const WIDTH: usize = 131;

pub fn layers() -> Vec<Linear> {
    filled((0..5).map(|_| LinearConfig::new(WIDTH, WIDTH).init(&device())).collect())
}

/// Rows, and which layers they go through.
pub type Batch = (Tensor<2>, Vec<bool>);

pub fn loss(layers: &[Linear], (x, used): Batch) -> Tensor<1> {
    let used = layers.iter().zip(used).filter(|(_, used)| *used);
    used.fold(x, |x, (layer, _)| layer.forward(x).tanh()).powi_scalar(2).mean()
}

/// What a replica trains on in a step: in the first all layers, in the others some, or nothing.
pub fn share(step: usize, replica: usize) -> Vec<Batch> {
    let batch = |salt: usize, rows: usize, used: [usize; 5]| {
        let seed = (step * 97 + replica * 13 + salt) as u64;
        (Numbers(seed).tensor::<2>([rows, WIDTH], &device()), used.map(|used| used == 1).to_vec())
    };
    match (step, replica) {
        (0, _) => vec![batch(0, 2, [1, 1, 1, 1, 1])],
        (1, 0) => vec![batch(0, 3, [1, 0, 1, 0, 1])],
        (1, 1) => vec![batch(0, 2, [0, 1, 1, 1, 0]), batch(1, 2, [0, 0, 0, 0, 1])],
        (1, 2) => vec![],
        // Layer 3 is used by nobody.
        (2, 0) => vec![batch(0, 2, [1, 0, 0, 0, 0])],
        (2, _) => vec![batch(0, 2, [0, 1, 1, 0, 1])],
        (3, 1) => vec![],
        (3, 2) => vec![batch(0, 2, [0, 0, 1, 1, 1])],
        _ => vec![batch(0, 2, [1, 1, 1, 0, 0])],
    }
}

/// Losses, norms and parameters of one replica that has the batches of all.
fn alone(replicas: usize) -> (Vec<(f64, f64)>, Wholes) {
    let ran = launch::threads(1).run(|world| {
        let mut model = own(&layers()).data_parallel(&world, DataParallelConfig::new())?;
        let mut optim = optimizer();
        let mut told = Vec::new();
        for step in 0..STEPS {
            let batches = (0..replicas).flat_map(|replica| share(step, replica));
            let step =
                model.step_micro_batches(batches, |layers, batch| loss(layers, batch))?.clip_grad_norm(&model, 1.0)?;
            told.push((step.loss.item(), step.grad_norm.unwrap_or_default()));
            model = model.optimize(&mut optim, 0.05, step)?;
        }
        Ok((told, values(&model.assemble()?)))
    });
    ran.unwrap().remove(0)
}

pub fn trains_like_one(ranks: usize, replicas: usize, strategy: &Strategy, what: &str) {
    let (told, expected) = alone(replicas);
    let threads = launch::threads(ranks).timeout(std::time::Duration::from_secs(30));
    let ran = threads.run(|world| {
        let mut model = own_by(&layers(), strategy).parallelize(&world, strategy)?;
        let replica = model.mesh().coordinate("dp")?;
        let mut optim = optimizer();
        for (step, (loss_of_all, norm_of_all)) in told.iter().enumerate() {
            let step = model
                .step_micro_batches(share(step, replica), |layers, batch| loss(layers, batch))?
                .clip_grad_norm(&model, 1.0)?;
            let (loss, norm) = (step.loss.item(), step.grad_norm.unwrap_or_default());
            assert!((loss - loss_of_all).abs() < 2e-5 * loss_of_all, "{what}: loss {loss}, not {loss_of_all}");
            assert!((norm - norm_of_all).abs() < 1e-4 * norm_of_all, "{what}: norm {norm}, not {norm_of_all}");
            model = model.optimize(&mut optim, 0.05, step)?;
        }
        Ok(values(&model.assemble()?))
    });
    ran.unwrap().iter().for_each(|found| all_same(what, &expected, found, 3e-4));
}

fn captured(data: DataParallelConfig) -> Strategy {
    Strategy::new().with_data(data.with_sharding(Sharding::Parameters)).with_engine(Engine::Captured)
}

#[test]
fn replicas_that_use_different_layers_train_like_one() {
    for (replicas, keep) in [(2, Keep::Pass), (3, Keep::Pass), (3, Keep::MicroBatch), (3, Keep::Step)] {
        let strategy = captured(DataParallelConfig::new().with_keep(keep));
        trains_like_one(replicas, replicas, &strategy, &format!("dp {replicas}, {keep:?}"));
    }
    let hybrid = captured(DataParallelConfig::new().with_sharding_ranks(2));
    trains_like_one(4, 4, &hybrid, "dp 4, rows among 2");
    let plan = Plan::new().shard_padded("*.weight", 1).shard_padded("*.bias", 0);
    let split = captured(DataParallelConfig::new()).with_tp(2, plan);
    trains_like_one(4, 2, &split, "dp 2, tp 2");
}

/// Replicas of a pipeline meet action by action of its schedule.
#[test]
fn replicas_of_pipelines_that_use_different_layers_train_like_one() {
    for (schedule, keep) in [
        (Schedule::OneForwardOneBackward, Keep::Pass),
        (Schedule::ZeroBubbleH1, Keep::Pass),
        (Schedule::Interleaved { stages_per_rank: 2 }, Keep::Step),
    ] {
        let what = format!("{schedule:?}, {keep:?}");
        let pipeline = PipelineConfig::new(2).with_schedule(schedule);
        let strategy = captured(DataParallelConfig::new().with_keep(keep)).with_pp(2, pipeline);
        trains_like_one(4, 2, &strategy, &what);
    }
}

/// Replicas evaluate with other layers and other numbers of rows, before the next step as behind it.
#[test]
fn replicas_that_use_different_layers_evaluate_each_its_own() {
    let plan = Plan::new().shard_padded("*.weight", 1).shard_padded("*.bias", 0);
    let keeping = |keep| captured(DataParallelConfig::new().with_keep(keep));
    let pipeline = |schedule| PipelineConfig::new(2).with_schedule(schedule);
    for (ranks, strategy) in [
        (3, keeping(Keep::Pass)),
        (3, keeping(Keep::Step)),
        (4, keeping(Keep::Pass).with_tp(2, plan)),
        (4, keeping(Keep::Pass).with_pp(2, pipeline(Schedule::OneForwardOneBackward))),
        (4, keeping(Keep::Pass).with_pp(2, pipeline(Schedule::Interleaved { stages_per_rank: 2 }))),
    ] {
        let threads = launch::threads(ranks).timeout(std::time::Duration::from_secs(30));
        let ran = threads.run(|world| {
            let mut model = own(&layers()).parallelize(&world, &strategy)?;
            let replica = model.mesh().coordinate("dp")?;
            for turn in 0..2 {
                // In a pipeline the first step decides on the cut.
                model.step_micro_batches(share(turn, replica), |layers, batch| loss(layers, batch))?;
                let used = [[1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 1]][(replica + turn) % 3];
                let rows = [3, 1, 2][replica];
                let batch =
                    (Numbers(turn as u64).tensor::<2>([rows, WIDTH], &device()), used.map(|used| used == 1).to_vec());
                let forward = |layers: &Vec<Linear>, (x, used): Batch| {
                    let used = layers.iter().zip(used).filter(|(_, used)| *used);
                    used.fold(x, |x, (layer, _)| layer.forward(x).tanh())
                };
                let found = model.forward_with(batch.clone(), forward)?.into_data();
                let expected = forward(&layers(), batch).into_data();
                for (found, expected) in found.iter::<f32>().zip(expected.iter::<f32>()) {
                    assert!((found - expected).abs() < 1e-5, "{found} for {expected} with {strategy}");
                }
            }
            Ok(())
        });
        ran.unwrap();
    }
}

/// What only some replicas exchange costs bytes; what all do, none more.
#[test]
fn nothing_more_is_exchanged_where_all_use_the_same() {
    let counted = launch::threads(2).run(|world| {
        let mut model = own(&layers()).parallelize(&world, &captured(DataParallelConfig::new()))?;
        let batch = |used: [bool; 5]| (Tensor::<2>::ones([2, WIDTH], &device()), used.to_vec());
        let mut calls = |used| {
            let counters = model.step(batch(used), |layers, batch| loss(layers, batch))?.counters;
            Ok::<_, Error>((counters.parameters.total().calls, counters.gradients.total().calls))
        };
        let same = calls([true, true, false, false, false])?;
        let other =
            if world.rank() == 0 { [true, true, false, false, false] } else { [true, false, true, false, false] };
        Ok((same, calls(other)?))
    });
    for (same, other) in counted.unwrap() {
        // Forward both layers, backward the second one's weight; with the other's, that is twice as many of these.
        assert_eq!((same, other), ((3, 2), (5, 3)));
    }
}
