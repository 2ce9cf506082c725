//! An optimizer that was given the moments of another rank, whose parts of the parameters are of equal dims.

use std::time::Duration;

use burn::module::ParamGroup;
use burn::nn::{Linear, LinearConfig};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamWConfig, ModuleOptimizer, MuonConfig, SgdConfig};
use burn::prelude::*;
use burn::tensor::Bytes;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::checkpointing::own_by;
use crate::common::failing::says;
use crate::common::models::{Numbers, device};
use crate::common::reference::{difference, filled, values};

type MakeOptimizer = fn() -> ModuleOptimizer;

fn layers() -> Vec<Linear> {
    filled(vec![LinearConfig::new(4, 8).init(&device()), LinearConfig::new(8, 4).init(&device())])
}

fn loss(layers: &[Linear], x: Tensor<2>) -> Tensor<1> {
    layers[1].forward(layers[0].forward(x).tanh()).powi_scalar(2).mean()
}

fn input(seed: u64) -> Tensor<2> {
    Numbers(seed + 3).tensor([4, 4], &device())
}

fn adamw() -> ModuleOptimizer {
    AdamWConfig::new().init()
}

/// Matrices are updated as wholes, each on one of the ranks.
fn muon() -> ModuleOptimizer {
    adamw().with_group(ParamGroup::from_predicate("weight"), MuonConfig::new().build(), None)
}

/// Whose state each rank loads.
type Whose = fn(usize) -> usize;

const OWN: Whose = |rank| rank;
const FIRST: Whose = |_| 0;

/// The state that an optimizer has on a rank.
fn state_of(rank: &Rank, optim: &ModuleOptimizer, of: usize) -> Result<Bytes, Error> {
    let mine = optim.into_bytes().unwrap().to_vec();
    let lens: Vec<usize> = rank.all_gather(vec![mine.len() as u64])?.into_iter().map(|len| len as usize).collect();
    let all = rank.all_gather(mine)?;
    Ok(Bytes::from_bytes_vec(all[lens[..of].iter().sum()..][..lens[of]].to_vec()))
}

/// What comes of two steps, and a third one with an optimizer that was loaded.
fn third_step(strategy: &Strategy, optimizer: fn() -> ModuleOptimizer, from: Whose) -> Result<(), Error> {
    let threads = launch::threads(strategy.dp.unwrap() * strategy.tp);
    let ran = threads.run(|rank| {
        let mut model = own_by(&layers(), strategy).parallelize(&rank, strategy)?;
        let mut optim = optimizer();
        for number in 0..2 {
            let done = model.step(input(number), |layers: &Vec<Linear>, x| loss(layers, x))?;
            model = model.optimize(&mut optim, 0.05, done)?;
        }
        let mut loaded = optimizer().from_bytes(state_of(&rank, &optim, from(rank.rank()))?).unwrap();
        let mut other = model.clone();
        let done = model.step(input(2), |layers: &Vec<Linear>, x| loss(layers, x))?;
        let same = other.step(input(2), |layers: &Vec<Linear>, x| loss(layers, x))?;
        model = model.optimize(&mut optim, 0.05, done)?;
        other = other.optimize(&mut loaded, 0.05, same)?;
        assert_eq!(difference(&values(&model.assemble()?), &values(&other.assemble()?)), 0.0);
        Ok(())
    });
    ran.map(drop)
}

#[test]
fn the_moments_of_another_rank_are_refused() {
    let plan = || Plan::new().shard("0.weight", 1).shard("0.bias", 0).shard("1.weight", 0);
    let data = |sharding| DataParallelConfig::new().with_sharding(sharding);
    let of = |dp| Strategy::new().with_dp(dp);
    let momentum = || SgdConfig::new().with_momentum(Some(MomentumConfig::new())).init();
    for strategy in [
        of(1).with_tp(2, plan()),
        of(2).with_tp(2, plan()),
        of(2).with_data(data(Sharding::Optimizer)),
        of(4).with_data(data(Sharding::Gradients)),
        of(2).with_data(data(Sharding::Parameters)).with_engine(Engine::Eager),
        of(2).with_data(data(Sharding::Parameters)).with_engine(Engine::Captured),
        of(2).with_tp(2, plan()).with_data(data(Sharding::Optimizer)),
    ] {
        let optimizers: [(&str, MakeOptimizer); 3] = [("adamw", adamw), ("momentum", momentum), ("muon", muon)];
        for (name, optimizer) in optimizers {
            third_step(&strategy, optimizer, OWN).unwrap_or_else(|error| panic!("{name}, {strategy}: {error}"));
            let error = third_step(&strategy, optimizer, FIRST).expect_err(name);
            assert!(matches!(error, Error::Optimizer { .. }), "{name}, {strategy}: {error}");
            // Of what is updated as a whole its dims may say it first.
            if name != "muon" {
                says(&error, &["hold different parts", "the same moments", "checkpoint"]);
            }
        }
    }
    // Replicas that hold all of it share them.
    third_step(&of(2), adamw, FIRST).unwrap();
}

/// Along either axis each rank has moments of its own then.
#[test]
fn the_moments_of_a_rank_at_other_places_of_two_axes_are_refused() {
    let plan = Plan::new().shard("0.weight", 1).shard("0.bias", 0).shard("1.weight", 0);
    for level in [Sharding::Optimizer, Sharding::Gradients] {
        let data = DataParallelConfig::new().with_sharding(level);
        let strategy = Strategy::new().with_dp(2).with_tp(2, plan.clone()).with_data(data);
        let error = third_step(&strategy, adamw, |rank| if rank == 3 { 0 } else { rank }).unwrap_err();
        says(&error, &["ranks 0 and 3 of the world hold different parts", "the same moments"]);
    }
}

/// Where the loss is linear in a split weight, the moments of its parts are equal from the first step on.
#[test]
fn moments_that_are_equal_by_themselves_are_no_others() {
    for ranks in [2, 4] {
        launch::threads(ranks)
            .run(|rank| {
                let layer: Linear = filled(LinearConfig::new(3, 8).init(&device()));
                let mut model = layer.tensor_parallel(&rank, Plan::new().shard("weight", 1).shard("bias", 0))?;
                let mut optim = adamw();
                for number in 0..3 {
                    let x = Numbers(number).tensor([4, 3], &device());
                    let done = model.step(x, |layer: &Linear, x| layer.forward(x).mean())?;
                    // Its own state, which was written and read.
                    optim = adamw().from_bytes(optim.into_bytes().unwrap()).unwrap();
                    model = model.optimize(&mut optim, 0.05, done)?;
                }
                Ok(())
            })
            .unwrap();
    }
}

/// One rank alone loads the state of another into the optimizer that it has: it compares, and the others go on. What it
/// calls has a name.
#[test]
fn a_state_that_one_rank_alone_has_loaded_ends_the_run() {
    let plan = Plan::new().shard("0.weight", 1).shard("0.bias", 0).shard("1.weight", 0);
    let sharded = DataParallelConfig::new().with_sharding(Sharding::Optimizer);
    for strategy in [Strategy::new().with_dp(1).with_tp(2, plan), Strategy::new().with_dp(2).with_data(sharded)] {
        let ran = launch::threads(2).timeout(Duration::from_secs(2)).run(|rank| {
            let (mut model, mut optim) = (layers().parallelize(&rank, &strategy)?, adamw());
            for number in 0..4 {
                let done = model.step(input(number), |layers: &Vec<Linear>, x| loss(layers, x))?;
                let first = state_of(&rank, &optim, 0)?;
                if (number, rank.rank()) == (2, 1) {
                    optim = optim.from_bytes(first).unwrap();
                }
                model = model.optimize(&mut optim, 0.05, done)?;
                assert!(number < 3, "{strategy}: nobody has noticed");
            }
            Ok(())
        });
        let error = ran.unwrap_err();
        says(&error, &["the moments of a new optimizer", "a rank whose optimizer is new", "after the same step"]);
    }
}
