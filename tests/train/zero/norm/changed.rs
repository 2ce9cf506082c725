//! Steps of sharded replicas of which somebody changes the gradients, or asks for another norm than before.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::{Engine, Norm, Parallel};

use super::super::{LEVELS, config};
use super::{by_hand, run, same, ways};
use crate::common::failing::says;
use crate::grad_norm::lm::Lm;

/// What a loop of one's own does to the gradients of a step, given its number.
type Change = fn(&Parallel<Lm>, &mut Step, usize);

/// Halves all gradients of this rank.
fn halve(model: &Parallel<Lm>, step: &mut Step) {
    struct Halve<'a>(&'a mut GradientsParams);
    impl ModuleVisitor for Halve<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.remove::<D>(param.id) {
                self.0.register(param.id, gradient * 0.5);
            }
        }
    }
    model.visit(&mut Halve(&mut step.grads));
}

/// Throws away the gradients of all vectors.
fn without_vectors(model: &Parallel<Lm>, step: &mut Step) {
    struct Drop<'a>(&'a mut GradientsParams);
    impl ModuleVisitor for Drop<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if D == 1 {
                self.0.remove::<D>(param.id);
            }
        }
    }
    model.visit(&mut Drop(&mut step.grads));
}

/// Whatever comes between a step and its norm, it is that of the gradients as they are then.
#[test]
fn it_is_that_of_the_gradients_that_there_are() {
    let changes: [(&str, Change); 3] = [
        ("halved", |model, step, _| halve(model, step)),
        ("halved in one step", |model, step, number| {
            if number == 2 {
                halve(model, step);
            }
        }),
        ("some thrown away", |model, step, _| without_vectors(model, step)),
    ];
    for (ranks, strategy) in ways() {
        for (what, change) in changes {
            let found = run(ranks, &strategy, |model: &_, mut step: Step, number| {
                change(model, &mut step, number);
                step.clip_grad_norm(model, Clip::never())
            });
            let expected = run(ranks, &strategy, |model: &_, mut step, number| {
                change(model, &mut step, number);
                by_hand(model, step, number)
            });
            for (number, (found, expected)) in found.unwrap().into_iter().zip(expected.unwrap()).enumerate() {
                same(&format!("{what}: {strategy}, step {number}"), found.0, expected.0);
            }
        }
    }
}

/// The largest norm and its type that a step is clipped by, given its number, if it is.
type Asked = fn(usize) -> Option<(f64, Norm)>;

/// However the step before was asked for its norm, if it was.
#[test]
fn it_is_the_norm_that_is_asked_for() {
    const NEVER: f64 = f64::INFINITY;
    let asked: [(&str, Asked); 3] = [
        ("another largest norm in each step", |number| Some((1.0 + number as f64, Norm::L2))),
        ("another norm between", |number| Some((NEVER, if number == 2 { Norm::Infinity } else { Norm::L2 }))),
        ("in every second step", |number| number.is_multiple_of(2).then_some((NEVER, Norm::L2))),
    ];
    let clip = |(max, norm): (f64, Norm)| Clip::at(max).with_norm(norm);
    for (ranks, strategy) in ways() {
        let expected = run(ranks, &strategy, by_hand).unwrap();
        let infinity = |model: &_, step: Step, _| step.clip_grad_norm(model, clip((NEVER, Norm::Infinity)));
        let largest = run(ranks, &strategy, infinity).unwrap();
        for (what, asked) in asked {
            let found = run(ranks, &strategy, |model: &_, step: Step, number| match asked(number) {
                Some(asked) => step.clip_grad_norm(model, clip(asked)),
                None => Ok(step),
            });
            for (number, (found, _)) in found.unwrap().into_iter().enumerate() {
                let Some((_, norm)) = asked(number) else { continue };
                let expected = if norm == Norm::Infinity { &largest } else { &expected };
                same(&format!("{what}: {strategy}, step {number}"), found, expected[number].0);
            }
        }
    }
}

/// What a rank does with a step, given its number.
type Way = fn(&Parallel<Lm>, Step, usize) -> Result<Step, Error>;

/// What one rank does alone is an error on all at once, which says what.
#[test]
fn a_rank_that_does_otherwise_ends_all() {
    const AGAIN: [&str; 2] = ["another norm than the one of the step", "`model.clip_grad_norm(step.grads, ..)`"];
    let acts: [(&str, &[&str], Way); 4] = [
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
        let found = run(2, &strategy, |model: &_, mut step: Step, number| {
            if (number, model.replica().0) == (3, 1) {
                halve(model, &mut step);
            }
            by_hand(model, step, number)
        });
        let found = found.unwrap();
        for number in [0, 1, 2, 4] {
            same("by hand", found[number].0, expected[number].0);
        }
        assert!(found[3].0 < expected[3].0);
    }
}
