//! Running statistics over the micro-batches of a step.

use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::models::{Numbers, device, seeded};
use crate::common::reference::{Wholes, all_same, own, values};

#[derive(Module, Debug)]
struct Normed {
    layer: Linear,
    norm: BatchNorm,
}

impl Normed {
    fn new() -> Self {
        let norm = BatchNormConfig::new(6).with_momentum(0.4).init(&device());
        seeded(Self { layer: LinearConfig::new(6, 6).init(&device()), norm })
    }

    fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        self.norm.forward(self.layer.forward(x)).powi_scalar(3).mean()
    }
}

/// The strategies whose steps are captured, and their ranks: each rank is given all rows.
fn captured() -> [(usize, Strategy); 3] {
    let strategy = || Strategy::new().with_engine(Engine::Captured);
    [
        (1, strategy()),
        (2, strategy().with_tp(2, Plan::new().shard("layer.weight", 1).shard("layer.bias", 0))),
        (2, strategy().with_pp(2, PipelineConfig::new(1).with_cut(Cut::before(["norm.*"])))),
    ]
}

fn rows(count: usize, seed: u64) -> Tensor<2> {
    Numbers(seed).tensor([count, 6], &device()) + 1.0
}

/// Each micro-batch takes the statistics on from where the one before has left them.
#[test]
fn micro_batches_take_statistics_on() {
    let model = Normed::new();
    let train = |ranks, strategy: Strategy| -> Vec<Wholes> {
        let run = launch::threads(ranks).run(|world| {
            let mut model = own(&model).parallelize(&world, &strategy)?;
            let mut after = Vec::new();
            for step in 0..3 {
                let micro_batches = (0..3).map(|number| rows(4, 10 * step + number + 1));
                model.step_micro_batches(micro_batches, |model, x| model.loss(x))?;
                after.push(values(&model.assemble()?));
            }
            Ok(after)
        });
        run.unwrap().swap_remove(0)
    };
    let expected = train(1, Strategy::new().with_engine(Engine::Eager));
    assert_ne!(expected[0]["norm.running_mean"], expected[1]["norm.running_mean"]);
    for (ranks, strategy) in captured() {
        let found = train(ranks, strategy.clone());
        for (expected, found) in expected.iter().zip(&found) {
            all_same(&format!("{strategy:?}"), expected, found, 1e-5);
        }
    }
}

/// Batches of two rows are normalised by what is known.
fn loss_by_known_mean(model: &Normed, x: Tensor<2>) -> Tensor<1> {
    match x.dims()[0] {
        2 => (model.layer.forward(x) - model.norm.running_mean.value().unsqueeze()).powi_scalar(2).mean(),
        _ => model.loss(x),
    }
}

/// A micro-batch that reads statistics and does not move them reads what one before it in the step has left.
#[test]
fn micro_batches_read_statistics_that_others_have_moved() {
    let model = Normed::new();
    let batches = || [rows(2, 1), rows(4, 2), rows(2, 3), rows(4, 4), rows(2, 5)];
    for (ranks, strategy) in captured() {
        let run = launch::threads(ranks).run(|world| {
            let mut one_by_one = own(&model).parallelize(&world, &strategy)?;
            let (mut sum, mut items) = (0.0, 0.0);
            for batch in batches() {
                let step = one_by_one.step(batch, loss_by_known_mean)?;
                sum += step.loss.item() * step.weight;
                items += step.weight;
            }
            let mut together = own(&model).parallelize(&world, &strategy)?;
            let step = together.step_micro_batches(batches(), loss_by_known_mean)?;
            let (found, expected) = (step.loss.item(), sum / items);
            assert!((found - expected).abs() < 1e-6 * expected.abs(), "{found} {expected} under {strategy:?}");
            Ok(())
        });
        run.unwrap();
    }
}

/// A capture brings the statistics up to date, and its step reads them so.
#[test]
fn an_eager_forward_before_a_capture_counts() {
    let model = Normed::new();
    let loss = |moved: bool, (ranks, strategy): (usize, Strategy)| {
        let run = launch::threads(ranks).run(|world| {
            let wrapped = own(&model);
            if moved {
                drop(wrapped.norm.forward(rows(4, 7)));
            }
            drop(wrapped.valid());
            let mut wrapped = wrapped.parallelize(&world, &strategy)?;
            if !moved {
                drop(wrapped.local().norm.forward(rows(4, 7)));
            }
            Ok(wrapped.step(rows(2, 1), loss_by_known_mean)?.loss.item())
        });
        run.unwrap()[0]
    };
    let [alone, split, _] = captured();
    for strategy in [alone, split] {
        let (expected, found) = (loss(true, strategy.clone()), loss(false, strategy));
        assert!((found - expected).abs() < 1e-6 * expected.abs(), "{found} {expected}");
    }
}

/// An eager forward between two captured steps counts for the second, which takes the statistics on from there.
#[test]
fn an_eager_forward_between_two_steps_counts() {
    let model = Normed::new();
    // One closure: another would be captured anew, which brings the statistics up to date.
    let loss = |model: &Normed, x: Tensor<2>| model.loss(x);
    let after = |(ranks, strategy): (usize, Strategy)| -> Wholes {
        let run = launch::threads(ranks).run(|world| {
            let mut model = own(&model).parallelize(&world, &strategy)?;
            model.step(rows(4, 1), loss)?;
            drop(model.local().norm.forward(rows(4, 7)));
            model.step(rows(4, 2), loss)?;
            Ok(values(&model.assemble()?))
        });
        run.unwrap().swap_remove(0)
    };
    let expected = after((1, Strategy::new().with_engine(Engine::Eager)));
    let [alone, split, _] = captured();
    for strategy in [alone, split] {
        all_same(&format!("{strategy:?}"), &expected, &after(strategy.clone()), 1e-5);
    }
}
