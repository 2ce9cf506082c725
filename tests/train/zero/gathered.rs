//! Parameters of which each rank holds its rows only.

use std::time::Duration;

use burn::module::{Module, ModuleVisitor, Param, ParamGroup};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use burn_parallel::Error;
use burn_parallel::hf::{self, Mapping, SaveConfig};
use burn_parallel::prelude::*;

use super::bytes::{row_bytes, state_bytes};
use super::{config, optimizer, train, wrap};
use crate::common::cases::{self, Batch, Case};
use crate::common::checkpointing::beside;
use crate::common::dense::Dense;
use crate::common::fill::filled_from;
use crate::common::reference::{all_same, paths, values};
use crate::common::store::Store;

fn gathered(keep: Keep) -> DataParallelConfig {
    config(Sharding::Parameters).with_keep(keep)
}

/// What a gather of all parameters moves on a rank, `(n - 1) / n` of their bytes with zeros, is moved as often as
/// `keep` says, from the first step on; and for each micro-batch once by a reduce-scatter.
#[test]
fn gathers_and_reductions_move_what_the_formulas_say() {
    let case = cases::mlp();
    let micro_batches = 2;
    for size in [2, 3, 4] {
        for (keep, gathers) in [(Keep::Pass, 2 * micro_batches), (Keep::MicroBatch, micro_batches), (Keep::Step, 1)] {
            launch::threads(size)
                .run(|rank| {
                    let mut model = wrap(&rank, &case.model, gathered(keep))?;
                    let mut optim: ModuleOptimizer = AdamWConfig::new().init();
                    let pass = (rank.size() as u64 - 1) * row_bytes(&case.model, rank.size());
                    for step in 0..3 {
                        let before = model.counters();
                        let batches = vec![(case.input)(step, 0..2); micro_batches as usize];
                        let done = model.step_micro_batches(batches, |model, batch| (case.loss)(model, batch))?;
                        model = model.optimize(&mut optim, 1e-2, done)?;
                        let moved = model.counters() - before;
                        assert_eq!(moved.gradients.of("reduce_scatter").bytes, micro_batches * pass, "{keep:?}");
                        assert_eq!(moved.gradients.total().bytes, micro_batches * pass, "{keep:?}");
                        let found = moved.parameters.of("all_gather");
                        // The three layers of a small model are one group. What is in use at the end of forward is
                        // still there when backward begins.
                        assert_eq!(found.bytes, gathers.min(micro_batches) * pass, "{keep:?}, step {step}");
                        assert_eq!(found.calls, gathers.min(micro_batches), "{keep:?}, step {step}");
                    }
                    Ok(())
                })
                .unwrap();
        }
    }
}

#[test]
fn parameters_may_be_kept() {
    let case = cases::transformer();
    let (_, expected) = case.alone(optimizer("adamw"), 1e-2, &[8; 3]);
    for keep in [Keep::Pass, Keep::MicroBatch, Keep::Step] {
        let runs =
            launch::threads(3).run(|rank| train(&rank, &case, gathered(keep), optimizer("adamw"), &[8; 3], 2)).unwrap();
        all_same(&format!("{keep:?}"), &expected, &runs[0].1, 3e-5);
    }
}

/// A rank holds its rows, and the state of these, and nothing of the rest.
#[test]
fn a_rank_holds_its_rows() {
    struct Held(u64);
    impl ModuleVisitor for Held {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let buffer = param.base().inner().try_into_primitive::<burn::backend::Flex>().unwrap();
            self.0 += buffer.bytes().len() as u64;
        }
    }
    let case = cases::transformer();
    for size in [2, 4, 8] {
        launch::threads(size)
            .run(|rank| {
                let mut model = wrap(&rank, &case.model, gathered(Keep::Pass))?;
                let mut optim: ModuleOptimizer = AdamWConfig::new().init();
                for step in 0..2 {
                    let done = model.step((case.input)(step, 0..2), |model, batch| (case.loss)(model, batch))?;
                    model = model.optimize(&mut optim, 1e-2, done)?;
                    let mut held = Held(0);
                    model.local().visit(&mut held);
                    let (mut placeholders, rows) = (Count(0), row_bytes(&case.model, rank.size()));
                    case.model.visit(&mut placeholders);
                    assert_eq!(held.0, rows + 4 * placeholders.0, "one element stands for each parameter");
                    assert_eq!(state_bytes(&optim) as u64, 2 * rows);
                    // From outside each parameter is there once.
                    assert_eq!(paths(&model), paths(&case.model));
                    assert_eq!(4 * model.num_params() as u64, rows);
                }
                Ok(())
            })
            .unwrap();
    }
    struct Count(u64);
    impl ModuleVisitor for Count {
        fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
            self.0 += 1;
        }
    }
}

/// The model's own forward, by `Deref` or for evaluation, gives what the whole model gives; between steps too.
#[test]
fn evaluation_is_that_of_the_whole_model() {
    let case = cases::transformer();
    launch::threads(3)
        .run(|rank| {
            let mut model = wrap(&rank, &case.model, gathered(Keep::Pass))?;
            let mut optim = optimizer("adamw");
            for step in 0..3 {
                let whole = model.assemble()?;
                let batch = beside(&model, (case.input)(9, 0..4));
                let loss = |tensor: Tensor<1>| tensor.inner().into_scalar::<f32>();
                let expected = loss((case.loss)(&whole, batch.clone()));
                // Products of tensors that lie elsewhere in memory may differ in the last bit.
                let same = |found: Tensor<1>| assert!((loss(found) - expected).abs() <= 1e-6 * expected.abs());
                same((case.loss)(&model, batch.clone()));
                let valid = model.valid();
                same((case.loss)(&valid, batch.clone()));
                same(model.forward_with(batch, |model, batch| (case.loss)(model, batch))?);
                let done = model.step((case.input)(step, 0..2), |model, batch| (case.loss)(model, batch))?;
                model = model.optimize(&mut optim, 1e-2, done)?;
            }
            Ok(())
        })
        .unwrap();
}

/// `backward` of a loss that the model's own forward gave, and accumulation before it.
#[test]
fn a_loop_of_ones_own() {
    let case = cases::mlp();
    let run = |size: usize, config: DataParallelConfig| {
        launch::threads(size)
            .run(|rank| {
                let mut model = wrap(&rank, &case.model, config.clone())?;
                let mut optim = optimizer("sgd");
                for step in 0..3 {
                    let loss = Loss::mean((case.loss)(&model, beside(&model, (case.input)(step, 0..2))), 2);
                    model.accumulate(loss)?;
                    let loss = Loss::mean((case.loss)(&model, beside(&model, (case.input)(step, 2..5))), 3);
                    let grads = model.backward(loss)?;
                    let mut done = model.step_micro_batches(Vec::<Batch>::new(), |_, batch| batch.targets.sum())?;
                    done.grads = grads;
                    model = model.optimize(&mut optim, 1e-2, done)?;
                }
                Ok(values(&model.assemble()?))
            })
            .unwrap()
            .remove(0)
    };
    let expected = run(1, DataParallelConfig::new());
    all_same("2 ranks", &expected, &run(2, gathered(Keep::Pass)), 3e-5);
}

/// Values come from a store by slices: no rank asks for more than its rows.
#[test]
fn rows_are_loaded_by_slices() {
    let case = cases::mlp();
    let stored = values(&filled_from(99, case.model.clone()));
    let read = launch::threads(4)
        .run(|rank| {
            let model = wrap(&rank, &case.model, gathered(Keep::Pass))?;
            let mut store = Store::of(stored.clone());
            assert_eq!(values(&model.load(&mut store)?.assemble()?), stored);
            Ok(store.elements_read())
        })
        .unwrap();
    assert_eq!(read.iter().sum::<usize>(), case.model.num_params());
}

fn failure<M: Module + Sync>(
    case: &Case<M>,
    run: impl Fn(&Rank, burn_parallel::data_parallel::Replica<burn_parallel::data_parallel::Eager<M>>) -> Result<(), Error>
    + Sync,
) -> String {
    let threads = launch::threads(3).timeout(Duration::from_secs(3));
    let error = threads.run(|rank| run(&rank, wrap(&rank, &case.model, gathered(Keep::Pass))?));
    error.unwrap_err().to_string()
}

/// Whoever fails, leaves, or goes another way, all ranks end with the error, none waits for ever.
#[test]
fn failures_end_all_ranks() {
    let case = cases::transformer();
    let error = failure(&case, |rank, mut model| {
        model.step((case.input)(0, 0..2), |model, batch| {
            assert!(rank.rank() != 1, "there is no such token");
            (case.loss)(model, batch)
        })?;
        Ok(())
    });
    assert!(error.contains("there is no such token"), "{error}");
    // Evaluation on one rank only, while the others are at a step, or done.
    let alone = failure(&case, |rank, mut model| {
        if rank.rank() == 0 {
            model.forward_with((case.input)(0, 0..2), |model, batch| (case.loss)(model, batch))?;
        } else {
            model.step((case.input)(0, 0..2), |model, batch| (case.loss)(model, batch))?;
        }
        Ok(())
    });
    assert!(alone.contains("rank"), "{alone}");
    let alone = failure(&case, |rank, model| {
        if rank.rank() == 0 {
            drop((case.loss)(&model, beside(&model, (case.input)(0, 0..2))));
        }
        Ok(())
    });
    assert!(alone.contains("left group") || alone.contains("time-out"), "{alone}");
    let backward = failure(&case, |rank, mut model| {
        match rank.rank() {
            2 => drop(model.backward_without_data()?),
            _ => {
                let loss = (case.loss)(&model, beside(&model, (case.input)(0, 0..2)));
                drop(model.backward(loss)?);
            }
        }
        Ok(())
    });
    assert!(backward.contains("step_micro_batches"), "{backward}");
}

/// Two layers of equal dims, used in another order on one rank: no rank may take the one for the other.
#[test]
fn ranks_that_use_other_layers_are_told_so() {
    #[derive(Module, Debug)]
    struct Two {
        layers: Vec<burn::nn::Linear>,
    }
    let device = Device::flex().autodiff();
    // Large enough to be groups of their own.
    let layer = |_| burn::nn::LinearConfig::new(130, 130).init(&device);
    let model = Two { layers: (0..2).map(layer).collect() };
    let error = launch::threads(2)
        .timeout(Duration::from_secs(3))
        .run(|rank| {
            let mut model = wrap(&rank, &model, gathered(Keep::Pass))?;
            let x = Tensor::<2>::ones([2, 130], &rank.device().autodiff());
            model.step(x, |model, x| {
                let order = if rank.rank() == 0 { [0, 1] } else { [1, 0] };
                order.iter().fold(x, |x, at| model.layers[*at].forward(x)).mean()
            })?;
            Ok(())
        })
        .unwrap_err()
        .to_string();
    assert!(error.contains("do not agree"), "{error}");
    assert!(error.contains("parameters of `layers.0`") && error.contains("parameters of `layers.1`"), "{error}");
    // First what helps.
    let (setting, captured) = (error.find("allow_unused_parameters"), error.find("captured"));
    assert!(setting.is_some() && setting < captured, "{error}");
}

/// Frozen parameters are divided too, and trained from some step on.
#[test]
fn frozen_parameters_are_divided() {
    let case = cases::transformer();
    let frozen = || ParamGroup::from_regex("encoder").unwrap();
    let run = |size: usize, config: DataParallelConfig| {
        launch::threads(size)
            .run(|rank| {
                let frozen_model = case.model.clone().freeze_group(frozen());
                let mut model = wrap(&rank, &frozen_model, config.clone())?;
                let mut optim = optimizer("adamw");
                for step in 0..4 {
                    if step == 2 {
                        model = model.unfreeze_group(frozen());
                    }
                    let rows = burn_parallel::comm::part(6, rank.size(), rank.rank());
                    let done = model.step((case.input)(step, rows), |model, batch| (case.loss)(model, batch))?;
                    model = model.optimize(&mut optim, 1e-2, done)?;
                }
                let model = model.sync_buffers()?;
                Ok(values(&model.assemble()?))
            })
            .unwrap()
            .remove(0)
    };
    let expected = run(1, DataParallelConfig::new());
    for keep in [Keep::Pass, Keep::MicroBatch] {
        all_same(&format!("{keep:?}"), &expected, &run(3, gathered(keep)), 3e-5);
    }
}

/// Layers of one size, each a group.
#[derive(Module, Debug)]
struct Deep {
    layers: Vec<burn::nn::Linear>,
}

const DEEP: usize = 5;

impl Deep {
    fn new(device: &Device) -> Self {
        Self {
            layers: (0..DEEP).map(|_| burn::nn::LinearConfig::new(128, 130).with_bias(false).init(device)).collect(),
        }
    }

    fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        self.layers.iter().fold(x, |x, layer| layer.forward(x).tanh().narrow(1, 0, 128)).powi_scalar(2).mean()
    }
}

/// Every group is gathered for forward, and again for backward, but for the one that is in use where these meet, and
/// for the first, whose input has no gradient: the same in the first step, which knows of no order, and in those that
/// gather ahead. Nothing is gathered that is not used.
#[test]
fn groups_are_gathered_once_a_pass() {
    let model = Deep::new(&Device::flex().autodiff());
    for size in [2, 4] {
        for (keep, groups) in [(Keep::Pass, 2 * DEEP - 2), (Keep::MicroBatch, DEEP), (Keep::Step, DEEP)] {
            launch::threads(size)
                .run(|rank| {
                    let mut model = wrap(&rank, &model, gathered(keep))?;
                    let mut optim: ModuleOptimizer = AdamWConfig::new().init();
                    let micro_batches = 3;
                    for step in 0..4 {
                        let before = model.counters();
                        let x = Tensor::<2>::ones([2, 128], &rank.device().autodiff());
                        let done = model.step_micro_batches(vec![x; micro_batches], |model, x| model.loss(x))?;
                        let moved = model.counters() - before;
                        let passes = if keep == Keep::Step { 1 } else { micro_batches };
                        let calls = (groups * passes) as u64;
                        assert_eq!(moved.parameters.of("all_gather").calls, calls, "{keep:?}, step {step}");
                        let bytes = 128 * 130 * 4 * (rank.size() as u64 - 1) / rank.size() as u64;
                        assert_eq!(moved.parameters.total().bytes, calls * bytes, "{keep:?}, step {step}");
                        model = model.optimize(&mut optim, 1e-2, done)?;
                    }
                    Ok(())
                })
                .unwrap();
        }
    }
}

#[test]
fn groups_that_are_gathered_ahead_train_like_one_device() {
    let model = Deep::new(&Device::flex().autodiff());
    let run = |size: usize, config: DataParallelConfig| {
        launch::threads(size)
            .run(|rank| {
                let mut model = wrap(&rank, &model, config.clone())?;
                let mut optim = optimizer("adamw");
                for step in 0..4 {
                    let rows = burn_parallel::comm::part(7, rank.size(), rank.rank());
                    let x = Dense::fractions(&[7, 128], step).rows(0, rows);
                    let x = x.tensor(&rank.device().autodiff(), burn::tensor::DType::F32);
                    let done = model.step(x, |model, x: Tensor<2>| model.loss(x))?;
                    model = model.optimize(&mut optim, 1e-2, done)?;
                }
                Ok(values(&model.assemble()?))
            })
            .unwrap()
            .remove(0)
    };
    let expected = run(1, DataParallelConfig::new());
    for size in [2, 3] {
        for keep in [Keep::Pass, Keep::Step] {
            all_same(&format!("{size} ranks, {keep:?}"), &expected, &run(size, gathered(keep)), 3e-5);
        }
    }
}

/// What is saved from rows is what the whole model is.
#[test]
fn a_directory_is_saved_from_rows() {
    let case = cases::transformer();
    let dir = std::env::temp_dir().join(format!("burn-parallel-zero-{}", std::process::id()));
    launch::threads(3)
        .run(|rank| {
            let model = wrap(&rank, &case.model, gathered(Keep::Pass))?;
            hf::save(&model, &rank, &dir, &SaveConfig::new(Mapping::identity()))?;
            Ok(())
        })
        .unwrap();
    let other = filled_from(99, case.model.clone());
    assert_ne!(values(&other), values(&case.model));
    let loaded = launch::threads(1)
        .run(|rank| wrap(&rank, &other, DataParallelConfig::new())?.load(&mut hf::open(&dir)?)?.assemble())
        .unwrap();
    assert_eq!(values(&loaded[0]), values(&case.model));
    std::fs::remove_dir_all(&dir).unwrap();
}

/// What burn asks for again in backward depends on what has a gradient, and with `Linear` on the number of rows: ranks
/// whose inputs have different ones, and that detach what some layers give, gather the same all the same, also of
/// layers that a forward uses several times.
#[test]
fn ranks_with_different_backwards_gather_the_same() {
    // Where there is one row all layers before the third have no gradient.
    let deep = |input: Tensor<3>, model: &Deep, order: &[usize]| {
        let detaches = input.dims()[0] == 1;
        let forward = |x: Tensor<3>, (number, place): (usize, &usize)| {
            let x = if detaches && number == 2 { x.detach() } else { x };
            model.layers[*place].forward(x).tanh().narrow(2, 0, 128)
        };
        order.iter().enumerate().fold(input, forward).powi_scalar(2).mean()
    };
    let whole = Deep::new(&Device::flex().autodiff());
    // Dims of the inputs: 5 rows of 3 are a matrix of 15, 32 rows of 2 stay what they are.
    let input = |rank: usize, step: usize| {
        let dims = [[2, 32, 128], [5, 3, 128], [1, 7, 128]][(rank + step) % 3];
        let x = Dense::fractions(&dims, (step * 3 + rank) as u64);
        x.tensor::<3>(&Device::flex().autodiff(), burn::tensor::DType::F32)
    };
    let run = |config: DataParallelConfig, frozen: Option<&str>, order: &[usize]| {
        let model = match frozen {
            Some(pattern) => whole.clone().freeze_group(ParamGroup::from_regex(pattern).unwrap()),
            None => whole.clone(),
        };
        launch::threads(3)
            .timeout(Duration::from_secs(20))
            .run(|rank| {
                let mut model = wrap(&rank, &model, config.clone())?;
                let mut optim = optimizer("sgd");
                for step in 0..4 {
                    // In the last step one rank has less.
                    let batches =
                        (0..if step == 3 && rank.rank() == 1 { 1 } else { 2 }).map(|at| input(rank.rank(), step + at));
                    let done = model.step_micro_batches(batches, |model, x| deep(x, model, order))?;
                    model = model.optimize(&mut optim, 1e-2, done)?;
                }
                Ok(values(&model.assemble()?))
            })
            .unwrap()
            .remove(0)
    };
    let several: &[usize] = &[0, 1, 2, 0, 0, 3, 1, 4, 0];
    for (frozen, order) in [(None, &[0, 1, 2, 3, 4][..]), (Some("layers.[023]"), &[0, 1, 2, 3, 4]), (None, several)] {
        let expected = run(config(Sharding::None), frozen, order);
        let what = format!("frozen: {frozen:?}, {order:?}");
        all_same(&what, &expected, &run(gathered(Keep::Pass), frozen, order), 3e-5);
    }
}

/// The next group is gathered while one is in use, in forward as soon as a step has shown which it is.
#[test]
fn the_next_group_is_gathered_ahead() {
    let model = Deep::new(&Device::flex().autodiff());
    launch::threads(2)
        .run(|rank| {
            let mut model = wrap(&rank, &model, gathered(Keep::Pass))?;
            let x = Tensor::<2>::ones([2, 128], &rank.device().autodiff());
            model.step(x.clone(), |model, x| model.loss(x))?;
            let counted = model.clone();
            let before = counted.counters();
            model.step(x, |model, x| {
                drop(model.layers[0].forward(x.clone()));
                let began = std::time::Instant::now();
                let gathers = || (counted.counters() - before.clone()).parameters.of("all_gather").calls;
                while gathers() < 2 {
                    assert!(began.elapsed() < Duration::from_secs(10), "the second group is not gathered ahead");
                    std::thread::sleep(Duration::from_millis(1));
                }
                model.loss(x)
            })?;
            Ok(())
        })
        .unwrap();
}

/// A rank whose items count for nothing, and whose loss depends on no parameter, gathers for the backward of the
/// others.
#[test]
fn a_loss_of_nothing_takes_part() {
    let case = Deep::new(&Device::flex().autodiff());
    let run = |size: usize, config: DataParallelConfig| {
        let ran = launch::threads(size).timeout(Duration::from_secs(20)).run(|rank| {
            let mut model = wrap(&rank, &case, config.clone())?;
            let mut optim = optimizer("sgd");
            for step in 0..3 {
                let x = Tensor::<2>::ones([2, 128], &rank.device().autodiff()) * (step as f32 + 0.5);
                let none = rank.rank() == 1;
                let done = model.step(x, |model, x| match none {
                    true => Loss::sum(model.loss(x).detach(), 0),
                    false => Loss::sum(model.loss(x), 2),
                })?;
                model = model.optimize(&mut optim, 1e-2, done)?;
            }
            Ok(values(&model.assemble()?))
        });
        ran.unwrap().remove(0)
    };
    let expected = run(1, config(Sharding::None));
    for keep in [Keep::Pass, Keep::MicroBatch] {
        all_same(&format!("{keep:?}"), &expected, &run(3, gathered(keep)), 3e-5);
    }
}

/// What no backward has needed is not gathered again, and whether any does is asked in 8 bytes from each rank; once one
/// does, it is. A layer whose input has no gradient needs no weight in backward.
#[test]
fn what_no_backward_needs_is_not_gathered_again() {
    let whole = Deep::new(&Device::flex().autodiff());
    // Each layer has a loss of its own, and its input a gradient or none.
    let loss = |model: &Deep, (x, apart): (Tensor<3>, bool)| {
        let mut losses = Vec::new();
        model.layers.iter().fold(x, |x, layer| {
            let x = layer.forward(if apart { x.detach() } else { x }).tanh().narrow(2, 0, 128);
            losses.push(x.clone().powi_scalar(2).mean());
            x
        });
        Tensor::cat(losses, 0).sum()
    };
    let input = |apart: bool, seed: usize| {
        let x = Dense::fractions(&[2, 32, 128], seed as u64);
        (x.tensor::<3>(&Device::flex().autodiff(), burn::tensor::DType::F32), apart)
    };
    // How many groups are gathered in each step, how often and with how many bytes the ranks ask for something, and
    // what comes of it all. In the third step the layers of one of the ranks depend on each other.
    let run = |config: DataParallelConfig| {
        let ran = launch::threads(3).timeout(Duration::from_secs(20)).run(|rank| {
            let mut model = wrap(&rank, &whole, config.clone())?;
            let (mut optim, mut counts) = (optimizer("sgd"), Vec::new());
            for step in 0..4 {
                let before = model.counters();
                let done = model.step(input((step, rank.rank()) != (2, 1), 3 * step + rank.rank()), loss)?;
                let counted = model.counters() - before;
                let asked = counted.control.of("all_reduce");
                counts.push([counted.parameters.of("all_gather").calls, asked.calls, asked.bytes]);
                model = model.optimize(&mut optim, 1e-2, done)?;
            }
            Ok((counts, values(&model.assemble()?)))
        });
        ran.unwrap().remove(0)
    };
    let (expected, kept, pass) =
        (run(config(Sharding::None)).1, run(gathered(Keep::MicroBatch)), run(gathered(Keep::Pass)));
    all_same("three ranks", &expected, &pass.1, 3e-5);
    // The ranks ask once for each group that none has needed so far, but for the last, which is whole still.
    let asked =
        |(pass, kept): (&[u64; 3], &[u64; 3])| [pass[0], pass[1] - kept[1], (pass[2] - kept[2]) / (pass[1] - kept[1])];
    let counts: Vec<_> = pass.0.iter().zip(&kept.0).map(asked).collect();
    // One number is reduced by one of the three ranks: it takes in two, and gives two.
    assert_eq!(counts, [[5, 4, 32], [5, 4, 32], [8, 4, 32], [8, 1, 32]]);
}
