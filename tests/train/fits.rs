//! What fits: trials leave no trace, and what a step needs is known on every mesh.

use burn::module::Module;
use burn::optim::{AdamConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::batch::{RankMemory, Trial, largest_that_fits, rows_within_on_all, try_step};
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::checkpointing::own_by;
use crate::common::models::{self, Cnn, Mlp, Numbers, device};
use crate::common::reference::{Wholes, values};

const ROWS: usize = 6;

fn images(step: usize, rows: usize) -> (Tensor<4>, Tensor<1, Int>) {
    models::images(rows, step as u64 + 3, &device())
}

/// Every value of the model, its running statistics too, and every byte of the optimizer.
fn all_of<M: Module>(model: &M, optim: &ModuleOptimizer) -> (Wholes, Vec<u8>) {
    (values(model), optim.to_record().into_bytes().unwrap().to_vec())
}

/// On a device that refuses more than 5 rows, by a panic as burn's are.
#[test]
fn trials_change_no_byte_of_model_and_optimizer() {
    let whole = Cnn::new(&device());
    let train = |tries: bool| {
        launch::threads(2)
            .run(|rank| {
                let mut model =
                    whole.clone().fork(&device()).train().data_parallel(&rank, DataParallelConfig::new())?;
                let mut optim: ModuleOptimizer = AdamConfig::new().init();
                for step in 0..4 {
                    if step == 2 && tries {
                        let before = all_of(&model, &optim);
                        let fit = largest_that_fits(32, &rank, |rows| {
                            Ok(try_step(model.local(), images(9, rows), |model: &Cnn, (x, y)| {
                                // The rows of one rank are fewer than those of the other, in the middle of a step.
                                let loss = model.loss(x, y);
                                assert!(rows <= 5 + 3 * rank.rank(), "the device is out of memory");
                                loss
                            }))
                        })?;
                        assert_eq!(fit.rows, 5);
                        RankMemory::of(&mut model, 2, images(9, 7), |model, (x, y)| model.loss(x, y))?;
                        assert!(before == all_of(&model, &optim), "trials have changed something");
                    }
                    let taken = model.step(images(step, ROWS), |model, (x, y)| model.loss(x, y))?;
                    model = model.optimize(&mut optim, 1e-2, taken)?;
                }
                Ok(all_of(&model, &optim))
            })
            .unwrap()
    };
    let (after, without) = (train(true), train(false));
    for ((values, _), (same, _)) in after.iter().zip(&without) {
        assert!(values == same, "training goes on differently after trials");
    }
}

#[test]
fn what_a_device_says_is_told() {
    let model = Cnn::new(&device());
    let refused = try_step(&model, images(0, 2), |_: &Cnn, _| -> Tensor<1> { panic!("CUDA_ERROR_OUT_OF_MEMORY") });
    assert_eq!(refused, Trial::TooLarge("CUDA_ERROR_OUT_OF_MEMORY".into()));
    assert_eq!(try_step(&model, images(0, 2), |model: &Cnn, (x, y)| model.loss(x, y)), Trial::Fits);
}

/// Ranks of one strategy need what their parts need, and find one number of rows by it.
#[test]
fn every_rank_knows_what_it_needs() {
    const FIT: usize = 24;
    let data = |sharding| DataParallelConfig::new().with_sharding(sharding);
    let dp = |sharding| Strategy::new().with_dp(2).with_data(data(sharding));
    let plan = Plan::new().shard("first.weight", 1).shard("first.bias", 0).shard("second.weight", 0);
    let whole = 4 * Mlp::new(0.0, &device()).num_params();
    for strategy in [
        Strategy::new().with_dp(2),
        dp(Sharding::Optimizer),
        dp(Sharding::Gradients),
        dp(Sharding::Parameters).with_engine(Engine::Eager),
        dp(Sharding::Parameters).with_engine(Engine::Captured),
        Strategy::new().with_tp(2, plan),
        Strategy::new().with_pp(2, PipelineConfig::new(2)),
    ] {
        let found = launch::threads(2)
            .run(|rank| {
                let mut model = own_by(&Mlp::new(0.0, &device()), &strategy).parallelize(&rank, &strategy)?;
                let mut need = |rows| {
                    let batch = (Numbers(1).tensor([rows, 6], &device()), Numbers(2).classes([rows], 4, &device()));
                    RankMemory::of(&mut model, 2, batch, |model, (x, y)| model.loss(x, y))
                };
                let (few, fits) = (need(4)?, need(FIT)?);
                let known = rows_within_on_all(fits.total() as u64, 64, &rank, |rows| Ok(need(rows)?.total()))?;
                Ok((few, fits, known))
            })
            .unwrap();
        for (few, fits, known) in &found {
            assert_eq!((few.parameters, few.optimizer), (fits.parameters, fits.optimizer));
            // One feature of each row at least.
            assert!(few.step + 4 * (FIT - 4) <= fits.step, "{strategy:?}: {few:?}, {fits:?}");
            assert_eq!(*known, FIT, "{strategy:?}");
        }
        let sum = |of: fn(&RankMemory) -> usize| found.iter().map(|(need, ..)| of(need)).sum::<usize>();
        let (split, sharding) = (strategy.tp * strategy.pp > 1, strategy.data.sharding);
        // What is not divided is there twice; of what is, some parameters are not, or are filled up.
        let copies = |divided: bool| if divided { whole..=whole + whole / 4 } else { 2 * whole..=2 * whole };
        let (parameters, moments) = (sum(|need| need.parameters), sum(|need| need.optimizer) / 2);
        assert!(copies(split || sharding == Sharding::Parameters).contains(&parameters), "{strategy:?}: {parameters}");
        assert!(copies(split || sharding != Sharding::None).contains(&moments), "{strategy:?}: {moments}");
    }
}
