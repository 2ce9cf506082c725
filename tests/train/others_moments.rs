//! An optimizer that was given the moments of another rank, whose parts of the parameters are of equal dims.

use burn::module::ParamGroup;
use burn::nn::{Linear, LinearConfig};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamWConfig, ModuleOptimizer, MuonConfig, SgdConfig};
use burn::prelude::*;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::failing::says;
use crate::common::models::{Numbers, device};
use crate::common::reference::{difference, filled, values};

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

/// What comes of two steps, and a third one with an optimizer that was loaded: with this rank's own state, or with that
/// of the first rank.
fn third_step(strategy: &Strategy, optimizer: fn() -> ModuleOptimizer, own: bool) -> Result<(), Error> {
    let threads = launch::threads(strategy.dp.unwrap() * strategy.tp);
    let ran = threads.run(|rank| {
        let mut model = layers().parallelize(&rank, strategy)?;
        let mut optim = optimizer();
        for number in 0..2 {
            let done = model.step(input(number), |layers: &Vec<Linear>, x| loss(layers, x))?;
            model = model.optimize(&mut optim, 0.05, done)?;
        }
        let mine = optim.clone().into_bytes().unwrap().to_vec();
        let lens = rank.all_gather(vec![mine.len() as u64])?;
        let first = rank.all_gather(mine.clone())?[..lens[0] as usize].to_vec();
        let bytes = if own { mine } else { first };
        let mut loaded = optimizer().from_bytes(burn::tensor::Bytes::from_bytes_vec(bytes)).unwrap();
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
        let optimizers: [(&str, fn() -> ModuleOptimizer); 3] =
            [("adamw", adamw), ("momentum", momentum), ("muon", muon)];
        for (name, optimizer) in optimizers {
            third_step(&strategy, optimizer, true).unwrap_or_else(|error| panic!("{name}, {strategy}: {error}"));
            let error = third_step(&strategy, optimizer, false).expect_err(name);
            assert!(matches!(error, Error::Optimizer { .. }), "{name}, {strategy}: {error}");
            // Of what is updated as a whole its dims may say it first.
            if name != "muon" {
                says(&error, &["hold different parts", "the same moments", "checkpoint"]);
            }
        }
    }
    // Replicas that hold all of it share them.
    third_step(&of(2), adamw, false).unwrap();
}
