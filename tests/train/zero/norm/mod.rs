//! The norm of sharded replicas, which comes with what they tell each other at the end of a step.

mod changed;

use burn::nn::{Linear, LinearConfig};
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn::tensor::DType;
use burn_parallel::comm::part;
use burn_parallel::data_parallel::{Eager, Replica};
use burn_parallel::prelude::*;
use burn_parallel::train::{Engine, NonFinite, Parallel};

use super::{LEVELS, config, optimizer};
use crate::common::cases;
use crate::common::checkpointing::own_by;
use crate::common::failing::LONG;
use crate::common::models::device;
use crate::common::reference::{filled, own};
use crate::grad_norm::lm::{Kind, Lm, ROWS, batch, loss};
use crate::zero_captured::parity::strategy;

const STEPS: usize = 5;

/// Stages share a parameter, which one of them counts.
const KIND: Kind = Kind { tied: true, frozen: true, dtype: DType::F32 };

/// The ranks, and how they are sharded: rows are divided among all, or among some.
fn ways() -> Vec<(usize, Strategy)> {
    let mut ways = Vec::new();
    for engine in [Engine::Eager, Engine::Captured] {
        for (ranks, among) in [(2, 2), (3, 3), (4, 2)] {
            for level in LEVELS {
                let data = config(level).with_sharding_ranks(among);
                ways.push((ranks, Strategy::new().with_dp(ranks).with_data(data).with_engine(engine)));
            }
        }
    }
    ways
}

/// What is done with a step, given its number.
trait Act: Fn(&Parallel<Lm>, Step, usize) -> Result<Step, Error> + Sync {}

impl<F: Fn(&Parallel<Lm>, Step, usize) -> Result<Step, Error> + Sync> Act for F {}

/// The norm of each step, if it was asked for, and how many collectives it took up to there. Nothing learns.
fn run(ranks: usize, strategy: &Strategy, act: impl Act) -> Result<Vec<(Option<f64>, u64)>, Error> {
    run_in((ranks, 1), strategy, act)
}

/// The same with so many micro-batches on each of the ranks.
fn run_in(
    (ranks, micro_batches): (usize, usize),
    strategy: &Strategy,
    act: impl Act,
) -> Result<Vec<(Option<f64>, u64)>, Error> {
    let whole = KIND.init(&device());
    let mut ran = launch::threads(ranks).timeout(LONG).run(|rank| {
        let mut model = own_by(&whole, strategy).parallelize(&rank, strategy)?;
        let (mut optim, mut found) = (optimizer("sgd"), Vec::new());
        let (replica, replicas) = model.replica();
        let rows = part(ROWS, replicas, replica);
        for number in 0..STEPS {
            let before = model.counters();
            let (tokens, targets) = batch(number, &device());
            let batches = (0..micro_batches).map(|place| {
                let of = part(rows.len(), micro_batches, place);
                let rows = rows.start + of.start..rows.start + of.end;
                (tokens.clone().slice([rows.clone()]), targets.clone().slice([rows]))
            });
            let step = model.step_micro_batches(batches, loss)?;
            let step = act(&model, step, number)?;
            found.push((step.grad_norm, (model.counters() - before).total().total().calls));
            model = model.optimize(&mut optim, 0.0, step)?;
        }
        Ok(found)
    })?;
    for (one, other) in ran.iter().flat_map(|other| ran[0].iter().zip(other)) {
        assert_eq!(one.0.map(f64::to_bits), other.0.map(f64::to_bits), "{strategy}");
    }
    Ok(ran.swap_remove(0))
}

/// Asked for with the gradients alone, of which nobody knows from which step they are.
pub fn by_hand<P: ParallelModule>(model: &P, mut step: Step, _: usize) -> Result<Step, Error> {
    let grads = std::mem::replace(&mut step.grads, GradientsParams::new());
    let clipped = model.clip_grad_norm(grads, Clip::never())?;
    (step.grads, step.grad_norm) = (clipped.grads, Some(clipped.norm));
    Ok(step)
}

#[track_caller]
fn same(what: &str, found: Option<f64>, expected: Option<f64>) {
    let (Some(a), Some(b)) = (found, expected) else { panic!("{what}: {found:?} {expected:?}") };
    assert!((a - b).abs() <= 1e-6 * b.abs(), "{what}: {a}, not {b}");
}

/// What a strategy takes for the norm: collectives in the first two steps, and in those behind them.
#[track_caller]
fn takes(given: (usize, usize), strategy: &Strategy, [first, later]: [u64; 2]) {
    let found = run_in(given, strategy, |model: &_, step: Step, _| step.clip_grad_norm(model, Clip::never())).unwrap();
    let expected = run_in(given, strategy, by_hand).unwrap();
    let without = run_in(given, strategy, |_: &_, step, _| Ok(step)).unwrap();
    for (number, (without, calls)) in without.into_iter().enumerate() {
        let what = format!("{strategy}, {given:?}, step {number}");
        same(&what, found[number].0, expected[number].0);
        assert_eq!(without, None);
        assert_eq!(found[number].1, calls + if number < 2 { first } else { later }, "{what}");
        assert_eq!(expected[number].1, calls + first, "{what}");
    }
}

/// From the third step on it takes no collective of its own, and is what it is if it does.
#[test]
fn it_goes_with_the_step() {
    for (ranks, strategy) in ways() {
        takes((ranks, 1), &strategy, [1, 0]);
    }
}

/// Of several micro-batches as well, where their gradients are exchanged once; where each exchanges its own, none has
/// those of the step, and the norm takes a collective in every step.
#[test]
fn it_goes_with_several_micro_batches() {
    for (ranks, strategy) in ways() {
        let each = match strategy.data.sharding {
            Sharding::Optimizer => false,
            Sharding::Parameters => strategy.engine == Engine::Eager,
            _ => true,
        };
        takes((ranks, 2), &strategy, [1, u64::from(each)]);
    }
}

/// With parts and stages it takes one along each of their axes, and none along that of the replicas.
#[test]
fn it_goes_with_the_step_of_parts_and_stages() {
    for level in LEVELS {
        for axes in [[2, 1, 2], [2, 2, 1]] {
            takes((4, 1), &strategy(axes, KIND, level, Keep::Pass), [2, 1]);
        }
    }
}

/// A gradient that arrives when its bucket is gone already is no part of what was measured: a weight used before and
/// after another backward, which makes the first use forgotten.
#[test]
fn gradients_that_come_late_count() {
    let layer = filled(LinearConfig::new(3, 3).init(&device()));
    type Clipped = fn(&Replica<Eager<Linear>>, Step, usize) -> Result<Step, Error>;
    let run = |act: Clipped| {
        let ran = launch::threads(2).run(|rank| {
            let mut model = own(&layer).data_parallel(&rank, config(Sharding::Optimizer).with_bucket_bytes(16))?;
            let (mut optim, mut norms) = (optimizer("sgd"), Vec::new());
            for number in 0..STEPS {
                let mut half = None;
                let batches = [1.0, 2.0].map(|seed| Tensor::<2>::ones([2, 3], &device()) * (seed + rank.rank() as f64));
                let step = model.step_micro_batches(batches, |model, x| {
                    let x = match half.take() {
                        Some(half) => half,
                        None => {
                            half = Some(model.forward(x.clone() * 2.0).tanh());
                            model.forward(x).tanh()
                        }
                    };
                    model.forward(x).powi_scalar(2).mean()
                })?;
                // Weight and bias, and what came late of both.
                assert_eq!(step.counters.gradients.total().calls, 3);
                let step = act(&model, step, number)?;
                norms.push(step.grad_norm);
                model = model.optimize(&mut optim, 0.0, step)?;
            }
            Ok(norms)
        });
        ran.unwrap().swap_remove(0)
    };
    let expected = run(by_hand);
    for (number, found) in run(|model, step, _| step.clip_grad_norm(model, Clip::never())).into_iter().enumerate() {
        same(&format!("step {number}"), found, expected[number]);
    }
}

/// A NaN in a step whose norm comes along is found, with its rank, as in one whose norm does not.
#[test]
fn what_is_not_finite_is_named() {
    let case = cases::mlp();
    for engine in [Engine::Eager, Engine::Captured] {
        for level in LEVELS {
            let strategy = Strategy::new().with_dp(3).with_data(config(level)).with_engine(engine);
            let ran = launch::threads(3).run(|rank| {
                let mut model = own_by(&case.model, &strategy).parallelize(&rank, &strategy)?;
                let mut optim = optimizer("adamw");
                for number in 0..4 {
                    let mut batch = (case.input)(number, 0..2);
                    if (number, rank.rank()) == (2, 1) {
                        batch.targets = batch.targets * f32::NAN;
                    }
                    let step = model.step(batch, |model, batch| (case.loss)(model, batch))?;
                    let step = step.clip_grad_norm(&model, Clip::at(1.0).with_non_finite(NonFinite::Skip))?;
                    assert_eq!(step.skipped, number == 2, "{strategy}");
                    if let Some(what) = &step.not_finite {
                        assert_eq!((what.rank, what.path.as_str()), (1, "first.weight"), "{strategy}");
                    }
                    model = model.optimize(&mut optim, 1e-2, step)?;
                }
                Ok(())
            });
            ran.unwrap();
        }
    }
}
