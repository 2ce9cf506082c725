//! A small language model, meshes for it, and steps of training.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::optim::ModuleOptimizer;
use burn::prelude::*;
use burn::tensor::activation;
use burn_parallel::comm::part;
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::Parallel;

use crate::common::models::{Numbers, cross_entropy, device};
use crate::common::reference::{filled, optimizer, own};

/// Words, a prime; and a prime width inside: no number of ranks divides them.
const WORDS: usize = 13;
const INNER: usize = 7;
const WIDTH: usize = 8;
const ROWS: usize = 8;

#[derive(Module, Debug)]
pub struct Net {
    tokens: Embedding,
    blocks: Vec<Block>,
    head: Linear,
}

#[derive(Module, Debug)]
pub struct Block {
    up: Linear,
    down: Linear,
}

pub type Tokens = (Tensor<2, Int>, Tensor<2, Int>);

impl Net {
    pub fn new() -> Self {
        Self::wide(INNER)
    }

    pub fn wide(inner: usize) -> Self {
        let device = &device();
        let block = || Block {
            up: LinearConfig::new(WIDTH, inner).init(device),
            down: LinearConfig::new(inner, WIDTH).init(device),
        };
        filled(Self {
            tokens: EmbeddingConfig::new(WORDS, WIDTH).init(device),
            blocks: vec![block(), block()],
            head: LinearConfig::new(WIDTH, WORDS).init(device),
        })
    }

    pub fn loss(&self, (tokens, targets): Tokens) -> Tensor<1> {
        let [b, s] = tokens.dims();
        let block = |x: Tensor<3>, block: &Block| x.clone() + block.down.forward(activation::gelu(block.up.forward(x)));
        let x = self.blocks.iter().fold(self.tokens.forward(tokens), block);
        cross_entropy(self.head.forward(x).reshape([b * s, WORDS]), targets.reshape([b * s]))
    }
}

/// One replica's rows of the batch of a step.
pub fn batch(step: u64, replicas: usize, replica: usize) -> Tokens {
    let mut numbers = Numbers(step + 60);
    let rows = part(ROWS, replicas, replica);
    let mut tokens = || numbers.classes([ROWS, 5], WORDS, &device()).slice([rows.clone(), 0..5]);
    (tokens(), tokens())
}

fn plan() -> Plan {
    let inner = Plan::new().shard_padded("*.up.*", 1).shard_padded("*.down.weight", 0);
    Plan::new().shard_padded("*.up.bias", 0).then(inner).then(Plan::vocabulary("tokens", "head"))
}

/// A strategy by the sizes of its axes, and how replicas divide what they hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Axes {
    pub dp: usize,
    pub pp: usize,
    pub tp: usize,
    pub sharding: Sharding,
}

impl Axes {
    pub const fn new(dp: usize, pp: usize, tp: usize) -> Self {
        Self { dp, pp, tp, sharding: Sharding::None }
    }

    pub const fn sharded(self, sharding: Sharding) -> Self {
        Self { sharding, ..self }
    }

    pub fn ranks(self) -> usize {
        self.dp * self.pp * self.tp
    }

    pub fn strategy(self) -> Strategy {
        let mut strategy = Strategy::new().with_dp(self.dp);
        strategy.data.sharding = self.sharding;
        if self.tp > 1 {
            strategy = strategy.with_tp(self.tp, plan());
        }
        if self.pp > 1 {
            let cut = Cut::before(["blocks.1.*"]);
            strategy = strategy.with_pp(self.pp, PipelineConfig::new(2).with_cut(cut));
        }
        strategy
    }

    pub fn wrap(self, world: &Rank, model: &Net) -> Result<Parallel<Net>, Error> {
        own(model).parallelize(world, &self.strategy())
    }
}

/// Trains from step `first` on to step `end`, and gives the losses.
pub fn train(
    mut model: Parallel<Net>,
    optim: &mut ModuleOptimizer,
    (first, end): (u64, u64),
) -> Result<(Parallel<Net>, Vec<f64>), Error> {
    let mut losses = Vec::new();
    let (replicas, replica) = (model.mesh().axis("dp")?.size(), model.mesh().coordinate("dp")?);
    for step in first..end {
        let gave = model.step(batch(step, replicas, replica), Net::loss)?;
        losses.push(gave.loss.item());
        model = model.optimize(optim, 0.05, gave)?;
    }
    Ok((model, losses))
}

/// The losses of one device that is not interrupted.
pub fn alone(model: &Net, steps: u64) -> Vec<f64> {
    let run = |world: Rank| Ok(train(Axes::new(1, 1, 1).wrap(&world, model)?, &mut optimizer(), (0, steps))?.1);
    launch::threads(1).run(run).unwrap().swap_remove(0)
}
