//! The same update, however a batch is divided into ranks and micro-batches.

use std::ops::Range;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn::tensor::{DType, TensorData, activation};
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use super::LEVELS;
use crate::common::checkpointing::own_by;
use crate::common::models::device;
use crate::common::reference::{all_same, filled, own, values};
use crate::grad_norm::lm::{Batch, Kind, Lm, ROWS, WORDS, batch};

/// Of which the rest of a row is ignored: its targets are the word 0.
fn length(row: usize) -> usize {
    1 + row * 2 % 5
}

/// Some rows, as far as the longest of them goes.
fn rows(rows: Range<usize>) -> Batch {
    let (tokens, targets) = batch(0, &device());
    let [_, width] = targets.dims();
    let seen = rows.clone().flat_map(|row| (0..width).map(move |at| i64::from(at < length(row)))).collect();
    let seen = Tensor::<2, Int>::from_data(TensorData::new(seen, [rows.len(), width]), &device());
    let longest = rows.clone().map(length).max().unwrap_or(1);
    let part = |whole: Tensor<2, Int>| whole.slice([rows.clone()]).narrow(1, 0, longest);
    (part(tokens), part(targets) * seen.narrow(1, 0, longest))
}

/// Cross-entropy with smoothed labels over the targets that count, of which data say how many there are.
fn smoothed(model: &Lm, (tokens, targets): Batch) -> Loss {
    let count = targets.shape().num_elements();
    let (logits, targets) = (model.logits(tokens).reshape([count, WORDS]), targets.reshape([count, 1]));
    let counts = targets.clone().not_equal_elem(0).float();
    let log = activation::log_softmax(logits, 1);
    let nats = log.clone().gather(1, targets) * 0.9 + log.mean_dim(1) * 0.1;
    Loss::sum((nats * counts.clone()).sum().neg(), counts.sum())
}

fn sgd() -> ModuleOptimizer {
    SgdConfig::new().init()
}

#[test]
fn every_split_of_a_batch_gives_the_same_gradients() {
    let model = Kind { tied: true, frozen: false, dtype: DType::F32 }.init(&device());
    let trained = |world: &Rank, strategy: &Strategy, parts: Vec<Range<usize>>| {
        let mut model = own_by(&model, strategy).parallelize(world, strategy)?;
        let step = model.step_micro_batches(parts.into_iter().map(rows), smoothed)?;
        let (loss, weight) = (step.loss.item(), step.weight);
        let step = step.clip_grad_norm(&model, Clip::never())?;
        let norm = step.grad_norm.unwrap();
        Ok::<_, Error>((loss, weight, norm, values(&model.optimize(&mut sgd(), 0.5, step)?.assemble()?)))
    };
    let whole = || std::iter::once(0..ROWS).collect();
    let alone = launch::threads(1).run(|world| trained(&world, &Strategy::new(), whole())).unwrap().remove(0);
    // By rank, its micro-batches.
    let splits: [Vec<Vec<Range<usize>>>; 4] = [
        vec![vec![0..4], vec![4..9]],
        vec![vec![0..1, 1..2, 2..5], vec![5..9]],
        vec![vec![0..7], vec![7..8, 8..9], vec![]],
        vec![vec![], vec![0..2, 2..9], vec![], vec![]],
    ];
    for engine in [Engine::Eager, Engine::Captured] {
        for sharding in [Sharding::None].into_iter().chain(LEVELS) {
            let strategy = Strategy::new().with_engine(engine);
            let strategy = strategy.with_data(DataParallelConfig::new().with_sharding(sharding));
            for split in &splits {
                let what = format!("{engine:?}, {sharding}, {split:?}");
                let found =
                    launch::threads(split.len()).run(|world| trained(&world, &strategy, split[world.rank()].clone()));
                for (loss, weight, norm, after) in found.unwrap() {
                    assert_eq!(weight, alone.1, "{what}");
                    assert!((loss - alone.0).abs() < 1e-5 * alone.0, "{what}: loss {loss}, not {}", alone.0);
                    assert!((norm - alone.2).abs() < 2e-5 * alone.2, "{what}: norm {norm}, not {}", alone.2);
                    all_same(&what, &alone.3, &after, 1e-4);
                }
            }
        }
    }
}

#[derive(Module, Debug)]
struct Branches {
    left: Linear,
    right: Linear,
}

impl Branches {
    fn loss(&self, x: Tensor<2>, left: bool) -> Tensor<1> {
        let layer = if left { &self.left } else { &self.right };
        layer.forward(x).powi_scalar(2).mean()
    }
}

/// Parameters that only some ranks use. Divided, eager steps need them to be of one group, which all ranks gather then;
/// captured steps gather no more of a group than they read, and take part in what others read.
#[test]
fn parameters_that_some_ranks_use() {
    let layer = || LinearConfig::new(3, 5).init(&device());
    let model = filled(Branches { left: layer(), right: layer() });
    let x = |rank: usize| Tensor::<2>::ones([2, 3], &device()) * (rank as f32 + 1.0);
    let expected = launch::threads(1)
        .run(|world| {
            let mut model = own(&model).data_parallel(&world, DataParallelConfig::new())?;
            let step = model.step_micro_batches([0, 1, 2].map(|rank| (x(rank),)), |model, (x,)| {
                let first = x.clone().inner().narrow(0, 0, 1).narrow(1, 0, 1).into_scalar::<f32>();
                model.loss(x, first < 1.5)
            })?;
            Ok(values(&model.optimize(&mut sgd(), 0.5, step)?.assemble()?))
        })
        .unwrap()
        .remove(0);
    let run = |engine, sharding| {
        launch::threads(3).run(|world| {
            let strategy = Strategy::new().with_engine(engine);
            let strategy = strategy.with_data(DataParallelConfig::new().with_sharding(sharding));
            let mut model = own_by(&model, &strategy).parallelize(&world, &strategy)?;
            let rank = world.rank();
            let step = model.step(x(rank), |model, x| model.loss(x, rank == 0))?;
            Ok(values(&model.optimize(&mut sgd(), 0.5, step)?.assemble()?))
        })
    };
    for sharding in LEVELS {
        for found in run(Engine::Eager, sharding).unwrap() {
            all_same(&format!("{sharding}"), &expected, &found, 1e-5);
        }
    }
    for found in run(Engine::Captured, Sharding::Parameters).unwrap() {
        all_same("captured", &expected, &found, 1e-5);
    }
}
