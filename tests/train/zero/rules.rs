//! What sharded replicas promise beside parity.

use std::sync::Arc;

use burn::module::Module;
use burn::optim::{AdamWConfig, LBFGSConfig, ModuleOptimizer, SgdConfig};
use burn::tensor::FloatDType;
use burn_parallel::data_parallel::AllReduceHook;
use burn_parallel::prelude::*;
use burn_parallel::train::NonFinite;

use super::{LEVELS, config, optimizer, train, wrap};
use crate::common::cases;
use crate::common::checkpointing::{beside, own_for};
use crate::common::models::{Numbers, device};
use crate::common::reference::{all_same, values};
use crate::panicking::breaking;

/// burn's own step would update whole parameters by the gradients of rows.
#[test]
fn an_optimizer_that_steps_by_itself_is_told_so() {
    let case = cases::mlp();
    for level in LEVELS {
        let error = launch::threads(2)
            .run(|rank| {
                let mut model = wrap(&rank, &case.model, config(level))?;
                let mut optim: ModuleOptimizer = SgdConfig::new().init();
                let done = model.step((case.input)(0, 0..2), |model, batch| (case.loss)(model, batch))?;
                model = optim.step(0.1, model, done.grads);
                drop(model);
                Ok(())
            })
            .unwrap_err()
            .to_string();
        assert!(error.contains("call `model.optimize(&mut optim, lr, step)` instead"), "{error}");
    }
}

/// One that looks at all parameters at once would see other rows on each rank.
#[test]
fn an_optimizer_that_looks_at_all_parameters_at_once_is_refused() {
    let case = cases::mlp();
    for level in LEVELS {
        let error = launch::threads(2)
            .run(|rank| {
                let model = wrap(&rank, &case.model, config(level))?;
                LBFGSConfig::new().init().step(0.1, model, |mut model| {
                    let step = model.step((case.input)(0, 0..2), |model, batch| (case.loss)(model, batch)).unwrap();
                    (step.loss.item(), step.grads)
                });
                Ok(())
            })
            .unwrap_err();
        let refused = |cause: &Error| matches!(cause, Error::Optimizer { problem } if problem.contains("LBFGS"));
        assert!(matches!(&error, Error::RankFailed { cause, .. } if refused(cause)), "{level}: {error}");
    }
}

/// The model that it was given is gone, and its rows with it, but a clone gathers its own, by the forward of the model
/// itself and in steps.
#[test]
fn a_clone_is_used_after_an_optimizer_was_refused() {
    let case = cases::transformer();
    launch::threads(2)
        .run(|rank| {
            let mut model = wrap(&rank, &case.model, config(Sharding::Parameters))?;
            let rows = 2 * rank.rank()..2 * rank.rank() + 2;
            let batch = beside(&model, (case.input)(0, rows));
            let batch = || batch.clone();
            // Twice: by the second the order of the groups is known, and they are gathered ahead.
            let first: Vec<f64> = (0..2).map(|_| (case.loss)(&model, batch()).into_scalar::<f32>().into()).collect();
            let done = model.step(batch(), |model, batch| (case.loss)(model, batch))?;
            let mut kept = model.clone();
            let refused = model.optimize(&mut breaking(&Arc::new(true.into())), 0.1, done).unwrap_err();
            assert!(matches!(refused, Error::Optimizer { .. }), "{refused}");
            for _ in 0..2 {
                assert_eq!((case.loss)(&kept, batch()).into_scalar::<f32>() as f64, first[0]);
            }
            let done = kept.step(batch(), |model, batch| (case.loss)(model, batch))?;
            kept.optimize(&mut optimizer("adamw"), 0.1, done).map(drop)
        })
        .unwrap();
}

/// The norm counts every row once, and clipping by it trains like one device.
#[test]
fn the_norm_is_that_of_all_rows() {
    let case = cases::transformer();
    let norms = |config: DataParallelConfig, size: usize| {
        launch::threads(size)
            .run(|rank| {
                let mut model = wrap(&rank, &case.model, config.clone())?;
                let mut optim = optimizer("adamw");
                let mut norms = Vec::new();
                for step in 0..3 {
                    let done = model.step((case.input)(step, 0..4), |model, batch| (case.loss)(model, batch))?;
                    let done = done.clip_grad_norm(&model, 0.05)?;
                    norms.push(done.grad_norm.unwrap());
                    model = model.optimize(&mut optim, 1e-2, done)?;
                }
                Ok((norms, values(&model.assemble()?)))
            })
            .unwrap()
            .remove(0)
    };
    let (expected, after) = norms(DataParallelConfig::new(), 1);
    for level in LEVELS {
        for (size, among) in [(2, 2), (3, 3), (4, 4), (4, 2)] {
            let (found, after_all) = norms(config(level).with_sharding_ranks(among), size);
            for (a, b) in expected.iter().zip(&found) {
                assert!((a - b).abs() <= 1e-5 * a, "{size} ranks, {level}: {a} {b}");
            }
            all_same(&format!("{size} ranks, {level}"), &after, &after_all, 3e-5);
        }
    }
}

/// A NaN on one rank, in the first micro-batch, skips the step on all, and is named.
#[test]
fn a_gradient_that_is_not_finite_is_skipped_on_all_ranks() {
    let case = cases::mlp();
    for level in LEVELS {
        launch::threads(3)
            .run(|rank| {
                let mut model = wrap(&rank, &case.model, config(level))?;
                let mut optim = optimizer("adamw");
                let before = values(&model.assemble()?);
                for step in 0..2 {
                    let bad = rank.rank() == 2;
                    let batches = [(0, bad), (1, false)].map(|(number, bad)| {
                        let mut batch = (case.input)(number, 0..2);
                        if bad && step == 0 {
                            batch.targets = batch.targets * f32::NAN;
                        }
                        batch
                    });
                    let done = model.step_micro_batches(batches, |model, batch| (case.loss)(model, batch))?;
                    let done = done.clip_grad_norm(&model, Clip::at(1.0).with_non_finite(NonFinite::Skip))?;
                    assert_eq!(done.skipped, step == 0);
                    if let Some(what) = &done.not_finite {
                        assert_eq!((what.rank, what.path.as_str()), (2, "first.weight"));
                    }
                    model = model.optimize(&mut optim, 1e-2, done)?;
                    let now = values(&model.assemble()?);
                    assert_eq!(now == before, step == 0);
                }
                assert_eq!(model.counters().skipped, 1);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn settings_that_do_not_go_together_are_errors() {
    let case = cases::mlp();
    let wrapped = |config: DataParallelConfig| {
        launch::threads(4).run(|rank| wrap(&rank, &case.model, config.clone()).map(drop)).unwrap_err().to_string()
    };
    let says = |config, words: &str| {
        let said = wrapped(config);
        assert!(said.contains(words), "`{words}` is missing in: {said}");
    };
    says(config(Sharding::Optimizer).with_sharding_ranks(3), "divided among 3 of the 4 replicas");
    says(config(Sharding::Optimizer).with_sharding_ranks(0), "divided among 0 of the 4 replicas");
    says(DataParallelConfig::new().with_sharding_ranks(2), "`sharding_ranks` is set, but `sharding` is \"none\"");
    says(config(Sharding::Gradients).with_keep(Keep::Step), "with `sharding` \"gradients\" none are");
    says(DataParallelConfig::new().with_keep(Keep::MicroBatch), "with `sharding` \"none\" none are");
    says(config(Sharding::Optimizer).with_allow_unused_parameters(true), "with `sharding` \"optimizer\" none are");
    says(config(Sharding::Gradients).with_comm_hook(AllReduceHook), "a communication hook reduces whole gradients");
    says(
        config(Sharding::Parameters).with_compare_every(2),
        "`compare_every` compares parameters that replicas hold alike",
    );
}

/// Settings decide which collectives a rank calls: all are told who has another one, when they wrap.
#[test]
fn ranks_with_other_settings_are_told_so() {
    let case = cases::mlp();
    let wrapped = |one: DataParallelConfig, others: DataParallelConfig| {
        let ended = launch::threads(3).run(|rank| {
            let config = if rank.rank() == 1 { &one } else { &others };
            wrap(&rank, &case.model, config.clone()).map(drop)
        });
        let said = ended.unwrap_err().to_string();
        assert!(said.contains("give all ranks the same `DataParallelConfig`"), "{said}");
        said
    };
    let divided = || config(Sharding::Parameters);
    let said = wrapped(divided().with_keep(Keep::Step), divided());
    assert!(
        said.contains("rank 1 of") && said.contains(r#"`keep = "step"`, and rank 0 with `keep = "pass"`"#),
        "{said}"
    );
    let said = wrapped(divided().with_allow_unused_parameters(true), divided());
    assert!(said.contains("`allow_unused_parameters = true`"), "{said}");
    let said = wrapped(config(Sharding::Gradients), divided());
    assert!(said.contains(r#"`sharding = "gradients"`"#), "{said}");
    let said = wrapped(config(Sharding::None).with_comm_hook(AllReduceHook), config(Sharding::None));
    assert!(said.contains("`comm_hook = present`"), "{said}");
    let said = wrapped(config(Sharding::None).with_reduce_dtype(FloatDType::BF16), config(Sharding::None));
    assert!(said.contains("`reduce_dtype = none`"), "{said}");
}

/// Gradients travel in 16 bits.
#[test]
fn gradients_may_be_reduced_in_another_dtype() {
    let case = cases::mlp();
    let (_, expected) = case.alone(SgdConfig::new().init(), 1e-2, &[8; 3]);
    for level in LEVELS {
        let config = config(level).with_reduce_dtype(FloatDType::BF16);
        let runs = launch::threads(2)
            .run(|rank| train(&rank, &case, config.clone(), SgdConfig::new().init(), &[8; 3], 1))
            .unwrap();
        all_same(&format!("{level}"), &expected, &runs[0].1, 1e-2);
    }
}

/// A parameter that is frozen at first, trained later, and frozen again.
#[test]
fn what_is_trained_may_change() {
    let case = cases::mlp();
    let frozen = || burn::module::ParamGroup::from_paths(vec!["first.weight"]);
    let run = |size: usize, level: Sharding| {
        launch::threads(size)
            .run(|rank| {
                let mut model = wrap(&rank, &case.model, config(level))?;
                let mut optim: ModuleOptimizer = AdamWConfig::new().init();
                for step in 0..6 {
                    model = match step {
                        0 | 4 => model.freeze_group(frozen()),
                        2 => model.unfreeze_group(frozen()),
                        _ => model,
                    };
                    let rows = burn_parallel::comm::part(8, rank.size(), rank.rank());
                    let done = model.step((case.input)(step, rows), |model, batch| (case.loss)(model, batch))?;
                    model = model.optimize(&mut optim, 1e-2, done)?;
                }
                Ok(values(&model.assemble()?))
            })
            .unwrap()
            .remove(0)
    };
    let expected = run(1, Sharding::None);
    for level in LEVELS {
        all_same(&format!("{level}"), &expected, &run(2, level), 3e-5);
    }
}

/// Parameters that get their first gradient in a later step, while those of the first step get none: their moments are
/// no strangers.
#[test]
fn parameters_may_take_turns() {
    use crate::zero_captured::branches::{WIDTH, layers, loss};
    let run = |size: usize, config: DataParallelConfig, optim: &str| {
        let ran = launch::threads(size).run(|rank| {
            let mut model = own_for(&layers(), &config).data_parallel(&rank, config.clone())?;
            let mut optim = optimizer(optim);
            for used in [[1, 0, 0, 0, 0], [0, 1, 0, 0, 1], [1, 1, 0, 0, 0]] {
                let batch = (Numbers(3).tensor::<2>([2, WIDTH], &device()), used.map(|used| used == 1).to_vec());
                let done = model.step(batch, |layers, batch| loss(layers, batch))?;
                model = model.optimize(&mut optim, 1e-2, done)?;
            }
            Ok(values(&model.assemble()?))
        });
        ran.unwrap().swap_remove(0)
    };
    for optim in ["adamw", "muon"] {
        let expected = run(1, DataParallelConfig::new(), optim);
        for level in LEVELS {
            all_same(&format!("{level}, {optim}"), &expected, &run(2, config(level), optim), 3e-4);
        }
    }
}
