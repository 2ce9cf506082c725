//! A parameter that several stages of a pipeline hold: each of them goes on with its moments.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamWConfig, ModuleOptimizer, MuonConfig, SgdConfig};
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::Parallel;

use crate::Dir;
use crate::common::models::{cross_entropy, device};
use crate::common::reference::{filled, optimizer, own};
use crate::net::{Tokens, batch};

/// As many words as the batches have; a width that two ranks divide.
const WORDS: usize = 13;
const WIDTH: usize = 8;

/// The embedding is also the head.
#[derive(Module, Debug)]
struct Tied {
    tokens: Embedding,
    blocks: Vec<Linear>,
}

impl Tied {
    fn new() -> Self {
        let block = || LinearConfig::new(WIDTH, WIDTH).init(&device());
        filled(Self {
            tokens: EmbeddingConfig::new(WORDS, WIDTH).init(&device()),
            blocks: vec![block(), block(), block()],
        })
    }

    fn loss(&self, (tokens, targets): Tokens) -> Tensor<1> {
        let [b, s] = tokens.dims();
        let x = self.tokens.forward(tokens);
        let x = self.blocks.iter().fold(x, |x, block| x.clone() + activation::tanh(block.forward(x)));
        let logits = x.reshape([b * s, WIDTH]).matmul(self.tokens.weight.val().transpose());
        cross_entropy(logits, targets.reshape([b * s]))
    }
}

#[derive(Debug, Clone, Copy)]
struct Spread {
    dp: usize,
    pp: usize,
    tp: usize,
    sharding: Sharding,
    /// Of each rank.
    stages: usize,
}

const fn mesh(dp: usize, pp: usize, tp: usize) -> Spread {
    Spread { dp, pp, tp, sharding: Sharding::None, stages: 1 }
}

impl Spread {
    const fn sharded(self, sharding: Sharding) -> Self {
        Self { sharding, ..self }
    }

    const fn interleaved(self) -> Self {
        Self { stages: 2, ..self }
    }

    fn ranks(self) -> usize {
        self.dp * self.pp * self.tp
    }

    fn wrap(self, world: &Rank, model: &Tied) -> Result<Parallel<Tied>, Error> {
        let mut strategy = Strategy::new().with_dp(self.dp);
        strategy.data.sharding = self.sharding;
        if self.tp > 1 {
            strategy = strategy.with_tp(self.tp, Plan::tied_vocabulary("tokens"));
        }
        if self.pp > 1 {
            let schedule = match self.stages {
                1 => Schedule::OneForwardOneBackward,
                stages_per_rank => Schedule::Interleaved { stages_per_rank },
            };
            strategy = strategy.with_pp(self.pp, PipelineConfig::new(2).with_schedule(schedule));
        }
        own(model).parallelize(world, &strategy)
    }
}

fn share(model: &Parallel<Tied>, step: u64) -> Result<Tokens, Error> {
    Ok(batch(step, model.mesh().axis("dp")?.size(), model.mesh().coordinate("dp")?))
}

fn train(
    mut model: Parallel<Tied>,
    optim: &mut ModuleOptimizer,
    (first, end): (u64, u64),
) -> Result<(Parallel<Tied>, Vec<f64>), Error> {
    let mut losses = Vec::new();
    for step in first..end {
        let gave = model.step(share(&model, step)?, Tied::loss)?;
        losses.push(gave.loss.item());
        model = model.optimize(optim, 0.05, gave)?;
    }
    Ok((model, losses))
}

fn sgd() -> ModuleOptimizer {
    let momentum = MomentumConfig { momentum: 0.9, dampening: 0.0, nesterov: false };
    SgdConfig::new().with_momentum(Some(momentum)).init()
}

fn fused() -> ModuleOptimizer {
    AdamWConfig::new().with_weight_decay(0.01).with_epsilon(1e-2).init_fused()
}

fn muon() -> ModuleOptimizer {
    let tied = burn::module::ParamGroup::from_regex("tokens.weight$").unwrap();
    optimizer().with_group(tied, MuonConfig::new().build(), None)
}

/// A maker of optimizers, and its name.
type Made = (&'static str, fn() -> ModuleOptimizer);

const OPTIMIZERS: [Made; 4] = [("adamw", optimizer), ("sgd", sgd), ("fused", fused), ("muon", muon)];

const MESHES: [Spread; 7] = [
    mesh(1, 1, 1),
    mesh(1, 2, 1),
    mesh(2, 2, 1).sharded(Sharding::Optimizer),
    mesh(1, 2, 1).interleaved(),
    mesh(2, 2, 1).sharded(Sharding::Parameters),
    mesh(1, 2, 2),
    mesh(1, 3, 1),
];

/// Under each mesh from another one, which is another for each optimizer, and saved once more.
#[test]
fn every_stage_that_holds_a_parameter_goes_on_with_its_moments() {
    let (dir, model) = (Dir::fresh(), Tied::new());
    for (place, (name, optimizer)) in OPTIMIZERS.into_iter().enumerate() {
        let alone =
            launch::threads(1).run(|world| Ok(train(mesh(1, 1, 1).wrap(&world, &model)?, &mut optimizer(), (0, 4))?.1));
        let alone = alone.unwrap().swap_remove(0);
        let at = |number: usize| dir.path().join(format!("{name}-{number}"));
        for (number, saved) in MESHES.into_iter().enumerate() {
            let run = launch::threads(saved.ranks()).run(|world| {
                let mut optim = optimizer();
                let (mut model, _) = train(saved.wrap(&world, &model)?, &mut optim, (0, 2))?;
                let mut checkpoints = Checkpointer::new(&world, at(number), CheckpointConfig::new())?;
                checkpoints.save(2, TrainState::new(&mut model).with_optimizer("optim", &mut optim))
            });
            run.unwrap();
        }
        for (number, axes) in MESHES.into_iter().enumerate() {
            let from = (number + place) % MESHES.len();
            let run = launch::threads(axes.ranks()).run(|world| {
                let (mut model, mut optim) = (axes.wrap(&world, &model)?, optimizer());
                model.prepare(share(&model, 2)?, Tied::loss)?;
                let mut checkpoints = Checkpointer::new(&world, at(from), CheckpointConfig::new())?;
                checkpoints.restore(TrainState::new(&mut model).with_optimizer("optim", &mut optim))?;
                let (mut model, losses) = train(model, &mut optim, (2, 4))?;
                checkpoints.save(4, TrainState::new(&mut model).with_optimizer("optim", &mut optim))?;
                Ok(losses)
            });
            let losses = run.unwrap_or_else(|why| panic!("{name}, {:?} to {axes:?}: {why}", MESHES[from]));
            for (found, expected) in losses[0].iter().zip(&alone[2..]) {
                let same = (found - expected).abs() <= 1e-5 * expected.abs();
                assert!(same, "{name}, {:?} to {axes:?}: {found} {expected}", MESHES[from]);
            }
        }
    }
}

/// Before the first step it is not known that the last stage needs the embedding: what cannot go on right is an error.
#[test]
fn moments_that_came_before_the_cut_are_refused() {
    let (dir, model) = (Dir::fresh(), Tied::new());
    let run = launch::threads(1).run(|world| {
        let mut optim = optimizer();
        let (mut model, _) = train(mesh(1, 1, 1).wrap(&world, &model)?, &mut optim, (0, 1))?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        checkpoints.save(1, TrainState::new(&mut model).with_optimizer("adamw", &mut optim))
    });
    run.unwrap();
    for dp in [1, 2] {
        let run = launch::threads(2 * dp).run(|world| {
            let config = PipelineConfig::new(2).with_cut(Cut::before(["blocks.1.*"]));
            let wrap = || own(&model).parallelize(&world, &Strategy::new().with_dp(dp).with_pp(2, config.clone()));
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            // The values alone go to all that need them.
            let (mut bare, mut optim) = (wrap()?, optimizer());
            checkpoints.restore(TrainState::new(&mut bare))?;
            train(bare, &mut optim, (1, 2))?;
            let (mut model, mut optim) = (wrap()?, optimizer());
            checkpoints.restore(TrainState::new(&mut model).with_optimizer("adamw", &mut optim))?;
            Ok(train(model, &mut optim, (1, 2)).map(drop).unwrap_err().to_string())
        });
        for said in run.unwrap() {
            assert!(said.contains("`tokens.weight`") && said.contains("`prepare`"), "{said}");
        }
    }
}

/// Values alone may come before the cut: a stage that turns out to need some reads them then, or is sent them if they
/// are not to be had any more.
#[test]
fn values_that_came_before_the_cut_are_read_where_they_are_needed() {
    let (dir, model) = (Dir::fresh(), Tied::new());
    let alone = launch::threads(1).run(|world| {
        let mut optim = optimizer();
        let (mut model, _) = train(mesh(1, 1, 1).wrap(&world, &model)?, &mut optim, (0, 2))?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        checkpoints.save(2, TrainState::new(&mut model))?;
        Ok(train(model, &mut optimizer(), (2, 4))?.1)
    });
    let alone = alone.unwrap().swap_remove(0);
    for (gone, sent) in [(false, 0), (true, 1)] {
        let run = launch::threads(2).run(|world| {
            let config = PipelineConfig::new(2).with_cut(Cut::before(["blocks.1.*"]));
            let mut wrapped = own(&Tied::new()).parallelize(&world, &Strategy::new().with_pp(2, config))?;
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            checkpoints.restore(TrainState::new(&mut wrapped))?;
            world.barrier()?;
            if gone && world.rank() == 0 {
                std::fs::remove_dir_all(dir.path().join("step-000000002")).unwrap();
            }
            world.barrier()?;
            let (wrapped, losses) = train(wrapped, &mut optimizer(), (2, 4))?;
            Ok((losses, wrapped.counters().pipeline.of("broadcast").calls))
        });
        for (losses, found) in run.unwrap() {
            assert_eq!(found, sent, "{gone}");
            for (found, expected) in losses.iter().zip(&alone) {
                assert!((found - expected).abs() <= 1e-5 * expected.abs(), "{gone}: {found} {expected}");
            }
        }
    }
}
