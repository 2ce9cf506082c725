//! The norm of sharded replicas, which comes with what they tell each other at the end of a step.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn_parallel::prelude::*;
use burn_parallel::train::{Engine, NonFinite, Norm, Parallel};

use super::{LEVELS, config, optimizer};
use crate::common::cases;
use crate::common::checkpointing::own_by;
use crate::common::failing::{LONG, says};
use crate::common::models::Lm;

const STEPS: usize = 5;

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
type Act = fn(&Parallel<Lm>, Step, usize) -> Result<Step, Error>;

/// The norm of each step, if it was asked for, and how many collectives it took up to there. Nothing learns.
fn run(ranks: usize, strategy: &Strategy, act: Act) -> Result<Vec<(Option<f64>, u64)>, Error> {
    let case = cases::transformer();
    let mut ran = launch::threads(ranks).timeout(LONG).run(|rank| {
        let mut model = own_by(&case.model, strategy).parallelize(&rank, strategy)?;
        let (mut optim, mut found) = (optimizer("sgd"), Vec::new());
        for number in 0..STEPS {
            let before = model.counters();
            let rows = 2 * rank.rank()..2 * rank.rank() + 2;
            let step = model.step((case.input)(number, rows), |model, batch| (case.loss)(model, batch))?;
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
fn by_hand(model: &Parallel<Lm>, mut step: Step, _: usize) -> Result<Step, Error> {
    let grads = std::mem::replace(&mut step.grads, GradientsParams::new());
    let clipped = model.clip_grad_norm(grads, Clip::never())?;
    (step.grads, step.grad_norm) = (clipped.grads, Some(clipped.norm));
    Ok(step)
}

/// Halves all gradients of this rank.
fn halve(model: &Parallel<Lm>, step: &mut Step) {
    struct Halve<'a>(&'a mut GradientsParams);
    impl ModuleVisitor for Halve<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<burn::tensor::Tensor<D>>) {
            if let Some(gradient) = self.0.remove::<D>(param.id) {
                self.0.register(param.id, gradient * 0.5);
            }
        }
    }
    model.visit(&mut Halve(&mut step.grads));
}

#[track_caller]
fn same(what: &str, found: Option<f64>, expected: Option<f64>) {
    let (Some(a), Some(b)) = (found, expected) else { panic!("{what}: {found:?} {expected:?}") };
    assert!((a - b).abs() <= 1e-6 * b.abs(), "{what}: {a}, not {b}");
}

/// From the third step on it takes no collective of its own, and is what it is if it does.
#[test]
fn it_goes_with_the_step() {
    for (ranks, strategy) in ways() {
        let found = run(ranks, &strategy, |model, step, _| step.clip_grad_norm(model, Clip::never())).unwrap();
        let (expected, without) =
            (run(ranks, &strategy, by_hand).unwrap(), run(ranks, &strategy, |_, step, _| Ok(step)));
        for (number, (without, calls)) in without.unwrap().into_iter().enumerate() {
            same(&format!("{strategy}, step {number}"), found[number].0, expected[number].0);
            assert_eq!(without, None);
            assert_eq!(found[number].1, calls + u64::from(number < 2), "{strategy}, step {number}");
            assert_eq!(expected[number].1, calls + 1, "{strategy}, step {number}");
        }
    }
}

/// Whatever comes between a step and its norm, it is that of the gradients as they are then.
#[test]
fn it_is_that_of_the_gradients_that_there_are() {
    let acts: [(&str, f64, Act); 4] = [
        ("halved", 0.5, |model, mut step, _| {
            halve(model, &mut step);
            step.clip_grad_norm(model, Clip::never())
        }),
        ("halved in one step", 1.0, |model, mut step, number| {
            if number == 2 {
                halve(model, &mut step);
            }
            step.clip_grad_norm(model, Clip::never())
        }),
        ("another largest norm in each step", 1.0, |model, step, number| {
            step.clip_grad_norm(model, 1.0 + number as f64)
        }),
        ("another norm between", 1.0, |model, step, number| {
            let norm = if number == 2 { Norm::Infinity } else { Norm::L2 };
            step.clip_grad_norm(model, Clip::never().with_norm(norm))
        }),
    ];
    for (ranks, strategy) in ways() {
        let expected = run(ranks, &strategy, by_hand).unwrap();
        for (what, by, act) in acts {
            let found = run(ranks, &strategy, act).unwrap();
            for number in (0..STEPS).filter(|number| *number != 2 || by < 1.0) {
                let expected = expected[number].0.map(|norm| by * norm);
                same(&format!("{what}: {strategy}, step {number}"), found[number].0, expected);
            }
            if what == "halved in one step" {
                same(&format!("{what}: {strategy}"), found[2].0, expected[2].0.map(|norm| 0.5 * norm));
            }
        }
        // It is measured ahead only where it was asked for in both steps before.
        let some = |model: &Parallel<Lm>, step: Step, number: usize| match number % 2 {
            0 => step.clip_grad_norm(model, Clip::never()),
            _ => Ok(step),
        };
        let found = run(ranks, &strategy, some).unwrap();
        for number in [0, 2, 4] {
            same(&format!("{strategy}, step {number}"), found[number].0, expected[number].0);
        }
    }
}

/// What one rank does alone is an error on all at once, which says what.
#[test]
fn a_rank_that_does_otherwise_ends_all() {
    const AGAIN: [&str; 2] = ["another norm than the one of the step", "`model.clip_grad_norm(step.grads, ..)`"];
    let acts: [(&str, &[&str], Act); 4] = [
        ("changes", &AGAIN, |model, mut step, number| {
            if (number, model.replica().0) == (3, 1) {
                halve(model, &mut step);
            }
            step.clip_grad_norm(model, Clip::never())
        }),
        ("clips", &AGAIN, |model, step, number| {
            let largest = if (number, model.replica().0) == (3, 1) { 2.0 } else { 1.0 };
            step.clip_grad_norm(model, largest)
        }),
        ("leaves it out", &["update number 4", "by no norm", "not at all on rank 1", "`clip_grad_norm` alike"], {
            |model, step, number| match (number, model.replica().0) {
                (3, 1) => Ok(step),
                _ => step.clip_grad_norm(model, Clip::never()),
            }
        }),
        ("clips earlier", &["clip alike on all ranks"], |model, step, number| {
            step.clip_grad_norm(model, if (number, model.replica().0) == (1, 1) { 2.0 } else { 1.0 })
        }),
    ];
    for engine in [Engine::Eager, Engine::Captured] {
        for level in LEVELS {
            let strategy = Strategy::new().with_dp(2).with_data(config(level)).with_engine(engine);
            for (what, words, act) in acts {
                let error = run(2, &strategy, act).expect_err(what);
                assert!(!matches!(error, Error::Timeout { .. }), "{what}, {strategy}: {error}");
                says(&error, words);
            }
        }
    }
}

/// Ranks that change their gradients each as it likes clip by the gradients alone.
#[test]
fn a_rank_may_change_its_gradients_where_the_norm_is_of_these() {
    for engine in [Engine::Eager, Engine::Captured] {
        let strategy = Strategy::new().with_dp(2).with_data(config(Sharding::Optimizer)).with_engine(engine);
        let expected = run(2, &strategy, by_hand).unwrap();
        let found = run(2, &strategy, |model, mut step, number| {
            if (number, model.replica().0) == (3, 1) {
                halve(model, &mut step);
            }
            by_hand(model, step, number)
        });
        let found = found.unwrap();
        (0..STEPS)
            .filter(|number| *number != 3)
            .for_each(|number| same("by hand", found[number].0, expected[number].0));
        assert!(found[3].0 < expected[3].0);
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
