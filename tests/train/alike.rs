//! Ranks of one model that do not update it alike: with other learning rates or optimizers, or not equally often.

use std::time::Duration;

use burn::lr_scheduler::constant::ConstantLr;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::{Module, ParamGroup};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::{Clip, Engine};

use crate::common::checkpointing::own_by;
use crate::common::failing::says;
use crate::common::models::{Numbers, device};
use crate::common::reference::filled;

const STEPS: usize = 4;

type Layers = Vec<Linear>;

fn layers() -> Layers {
    filled(vec![LinearConfig::new(4, 8).init(&device()), LinearConfig::new(8, 4).init(&device())])
}

fn loss(layers: &Layers, x: Tensor<2>) -> Tensor<1> {
    layers[1].forward(layers[0].forward(x).tanh()).powi_scalar(2).mean()
}

fn input(step: usize) -> Tensor<2> {
    Numbers(step as u64 + 3).tensor([4, 4], &device())
}

fn adamw() -> ModuleOptimizer {
    AdamWConfig::new().init()
}

fn split() -> Plan {
    Plan::new().shard("0.weight", 1).shard("0.bias", 0).shard("1.weight", 0)
}

fn of(dp: usize) -> Strategy {
    Strategy::new().with_dp(dp)
}

fn divided(dp: usize, level: Sharding, engine: Engine) -> Strategy {
    of(dp).with_data(DataParallelConfig::new().with_sharding(level)).with_engine(engine)
}

/// Those in which ranks go on by themselves until their next step.
fn independent() -> Vec<Strategy> {
    let pipeline = || PipelineConfig::new(2);
    vec![of(2), of(3), of(1).with_pp(2, pipeline()), of(2).with_pp(2, pipeline())]
}

/// Those in which ranks meet in `optimize` where an optimizer is new.
fn meeting() -> Vec<Strategy> {
    vec![
        of(1).with_tp(2, split()),
        of(2).with_tp(2, split()),
        divided(2, Sharding::Optimizer, Engine::Eager),
        divided(3, Sharding::Gradients, Engine::Eager),
        divided(2, Sharding::Parameters, Engine::Eager),
        divided(2, Sharding::Parameters, Engine::Captured),
        divided(2, Sharding::Optimizer, Engine::Captured).with_tp(2, split()),
    ]
}

/// What one rank gives to `optimize` in a step: the learning rate, and whether it calls it at all.
type Change = fn(&mut ModuleOptimizer, rank: usize, last: usize, step: usize) -> Option<f64>;

/// Makes some steps.
fn train(strategy: &Strategy, change: Change) -> Result<(), Error> {
    let ranks: usize = strategy.dp.unwrap() * strategy.pp * strategy.tp;
    let ran = launch::threads(ranks).timeout(Duration::from_secs(60)).run(|rank| {
        let (mut model, mut optim) = (own_by(&layers(), strategy).parallelize(&rank, strategy)?, adamw());
        for step in 0..STEPS {
            let done = model.step(input(step), loss)?;
            if let Some(rate) = change(&mut optim, rank.rank(), ranks - 1, step) {
                model = model.optimize(&mut optim, rate, done)?;
            }
        }
        Ok(())
    });
    ran.map(drop)
}

/// The error of a change that all ranks find out together.
fn refused(strategy: &Strategy, change: Change) -> Error {
    let error = train(strategy, change).expect_err(&format!("{strategy}: nobody has noticed"));
    assert!(!matches!(error, Error::Timeout { .. }), "{strategy}: {error}");
    error
}

#[test]
fn another_learning_rate_on_one_rank_is_an_error_in_the_next_step() {
    for strategy in independent().into_iter().chain(meeting()) {
        let error = refused(&strategy, |_, rank, last, step| Some(if (rank, step) == (last, 1) { 0.02 } else { 0.01 }));
        assert!(matches!(error, Error::Optimizer { .. }), "{strategy}: {error}");
        let last = strategy.dp.unwrap() * strategy.pp * strategy.tp - 1;
        says(&error, &["update number 2", "different learning rates", "0.01 on rank", &format!("0.02 on rank {last}")]);
    }
}

#[test]
fn an_optimizer_that_is_new_on_one_rank_alone_is_named() {
    let fresh: Change = |optim, rank, last, step| {
        if (rank, step) == (last, 2) {
            *optim = adamw();
        }
        Some(0.01)
    };
    let loaded: Change = |optim, rank, last, step| {
        if (rank, step) == (last, 2) {
            *optim = adamw().load_record(optim.to_record());
        }
        Some(0.01)
    };
    for change in [fresh, loaded] {
        for strategy in independent() {
            let error = refused(&strategy, change);
            assert!(matches!(error, Error::Optimizer { .. }), "{strategy}: {error}");
            says(&error, &["update number 3", "another optimizer on some ranks only", "the one of before on rank"]);
        }
        for strategy in meeting() {
            let error = refused(&strategy, change);
            says(&error, &["the moments of a new optimizer", "a rank whose optimizer is new", "after the same step"]);
        }
    }
}

/// All load a state, one of them another: of replicas each should have the same.
#[test]
fn other_moments_on_one_replica_are_an_error() {
    let change: Change = |optim, rank, last, step| {
        if step == 2 {
            let mut record = optim.to_record();
            if rank == last {
                record = adamw().to_record();
            }
            *optim = adamw().load_record(record);
        }
        Some(0.01)
    };
    for strategy in [of(2), of(4), of(2).with_pp(2, PipelineConfig::new(2))] {
        let error = refused(&strategy, change);
        says(&error, &["update number 3", "different moments of the same parameters"]);
    }
}

#[test]
fn a_rank_that_leaves_out_an_update_is_found() {
    for strategy in independent() {
        let error = refused(&strategy, |_, rank, last, step| ((rank, step) != (last, 1)).then_some(0.01));
        says(&error, &["equally often", "1 on rank", "2 on rank", "`optimize`"]);
    }
}

/// Replicas measure each for itself, and any of them may; they clip alike.
#[test]
fn a_replica_that_clips_in_another_way_is_named() {
    let train = |clip: fn(usize, usize) -> Option<Clip>| {
        let ran = launch::threads(2).timeout(Duration::from_secs(60)).run(|rank| {
            let (mut model, mut optim) = (own_by(&layers(), &of(2)).parallelize(&rank, &of(2))?, adamw());
            for number in 0..STEPS {
                let step = model.step(input(number), loss)?;
                let step = match clip(rank.rank(), number) {
                    Some(clip) => step.clip_grad_norm(&model, clip)?,
                    None => step,
                };
                model = model.optimize(&mut optim, 0.01, step)?;
            }
            Ok(())
        });
        ran.map(drop)
    };
    let error = train(|rank, number| (number == 1).then(|| Clip::at(1.0 + rank as f64))).unwrap_err();
    says(
        &error,
        &["update number 2", "to the L2 norm 1 on rank 0; to the L2 norm 2 on rank 1", "`clip_grad_norm` alike"],
    );
    let error = train(|rank, number| (rank == 1 && number == 1).then(|| Clip::at(1.0))).unwrap_err();
    says(&error, &["not at all on rank 0; to the L2 norm 1 on rank 1"]);
    train(|rank, _| (rank == 0).then(Clip::never)).unwrap();
}

/// Rates of groups of parameters, another rate in each step, and a new optimizer on all ranks: what is alike.
#[test]
fn what_is_alike_goes_on() {
    for strategy in independent().into_iter().chain(meeting()) {
        let ranks: usize = strategy.dp.unwrap() * strategy.pp * strategy.tp;
        launch::threads(ranks)
            .run(|rank| {
                let biases = ParamGroup::from_predicate("bias");
                let mut rates =
                    ModuleLrScheduler::new(ConstantLr::from(0.01)).with_group(biases, ConstantLr::from(0.1));
                let (mut model, mut optim) = (own_by(&layers(), &strategy).parallelize(&rank, &strategy)?, adamw());
                for step in 0..STEPS {
                    if step == 2 {
                        optim = adamw().load_record(optim.to_record());
                    }
                    let done = model.step(input(step), loss)?;
                    model = model.optimize(&mut optim, rates.step(), done)?;
                    let done = model.step(input(step), loss)?;
                    model = model.optimize(&mut optim, 0.01 / (1 + step) as f64, done)?;
                }
                assert!(model.num_params() > 0);
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{strategy}: {error}"));
    }
}

/// A rank alone finds that a state does not fit it, and goes on without the model: the others have its error.
#[test]
fn all_ranks_of_a_split_have_the_error_of_one() {
    let ran = launch::threads(2).timeout(Duration::from_secs(60)).run(|rank| {
        let mut model = layers().parallelize(&rank, &of(1).with_tp(2, split()))?;
        let mut optim = adamw();
        let whole: Linear = filled(LinearConfig::new(3, 3).init(&device()));
        if rank.rank() == 1 {
            // Moments of what is no part of the model.
            let grads = burn::optim::GradientsParams::from_grads(
                whole.forward(Tensor::<2>::ones([1, 3], &device())).sum().backward(),
                &whole,
            );
            drop(optim.step(0.1, whole, grads));
        }
        let done = model.step(input(0), loss)?;
        // Nobody ends the run by returning the error.
        Ok(model.optimize(&mut optim, 0.01, done).map(drop))
    });
    for outcome in ran.unwrap() {
        let error = outcome.unwrap_err();
        assert!(matches!(error, Error::Optimizer { .. }), "{error}");
        says(&error, &["on rank 1 of the world", "has moments of"]);
    }
}

/// The axes, what is divided, and the engine decide what ranks call: they are compared before anything else is.
#[test]
fn ranks_that_spread_the_model_in_another_way_are_told() {
    let divided = DataParallelConfig::new().with_sharding(Sharding::Parameters);
    let strategies: [[Strategy; 2]; 3] = [
        [of(2).with_engine(Engine::Eager), of(2).with_engine(Engine::Captured)],
        [of(2), of(1).with_tp(2, split())],
        [of(2), of(2).with_data(divided)],
    ];
    let words = [
        "rank 1 has captured steps, and rank 0 eager steps",
        "dp 1, pp 1 and tp 2",
        "rank 1 has ZeRO 3, and rank 0 ZeRO 0: give all ranks the same `sharding`",
    ];
    for (pair, words) in strategies.iter().zip(words) {
        let ran = launch::threads(2).run(|rank| layers().parallelize(&rank, &pair[rank.rank()]).map(drop));
        let error = ran.unwrap_err();
        assert!(matches!(error, Error::Strategy { .. }), "{error}");
        says(&error, &[words]);
    }
}

/// A batch of other dims on one rank of those that share a model: after steps, and in the first.
#[test]
fn a_batch_of_other_dims_is_named() {
    let with = |strategy: &Strategy, at: usize| {
        let ranks: usize = strategy.pp * strategy.tp;
        let ran = launch::threads(ranks).timeout(Duration::from_secs(60)).run(|rank| {
            let mut model = own_by(&layers(), strategy).parallelize(&rank, strategy)?;
            for step in 0..3 {
                let rows = if (rank.rank(), step) == (ranks - 1, at) { 6 } else { 4 };
                model.step(Numbers(step as u64).tensor::<2>([rows, 4], &device()), loss)?;
            }
            Ok(())
        });
        ran.unwrap_err()
    };
    let pipeline = || PipelineConfig::new(2);
    for strategy in
        [of(1).with_tp(2, split()), of(1).with_pp(2, pipeline()), of(1).with_tp(2, split()).with_pp(2, pipeline())]
    {
        for at in [1, 2] {
            let error = with(&strategy, at);
            assert!(matches!(error, Error::InvalidArgument { .. }), "{strategy}: {error}");
            says(&error, &["another input", "of dims [6, 4] and not [4, 4]"]);
        }
    }
}
