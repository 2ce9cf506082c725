//! Dropout by rows of the global batch: the same on every mesh, and a run goes on with it on any other.

use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig};
use burn::optim::ModuleOptimizer;
use burn::prelude::*;
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::comm::part;
use burn_parallel::prelude::*;
use burn_parallel::train::{Engine, Parallel};

use crate::Dir;
use crate::common::models::{Numbers, device};
use crate::common::reference::{filled, optimizer, own};

const ROWS: usize = 12;

#[derive(Module, Debug)]
struct Net {
    layers: Vec<Layer>,
}

#[derive(Module, Debug)]
struct Layer {
    up: Linear,
    down: Linear,
    dropout: Dropout,
}

impl Net {
    fn new() -> Self {
        let layer = || Layer {
            up: LinearConfig::new(6, 8).init(&device()),
            down: LinearConfig::new(8, 6).init(&device()),
            dropout: DropoutConfig::new(0.3).init(),
        };
        filled(Self { layers: vec![layer(), layer()] })
    }

    /// Dropout of what is split, of what is not, and of rows and places of a sequence as one dim.
    fn loss(&self, x: Tensor<3>) -> Tensor<1> {
        let y = self.layers.iter().fold(x, |x, layer| {
            let [b, s, width] = x.dims();
            let hidden = layer.dropout.forward(layer.up.forward(x.clone()).tanh());
            let flat = layer.dropout.forward(layer.down.forward(hidden).reshape([b * s, width]));
            x + flat.reshape([b, s, width])
        });
        y.powi_scalar(2).mean()
    }
}

/// Axes dp, pp, tp, micro-batches of a replica, and whether it takes every n-th row.
type Spread = (usize, usize, usize, usize, bool);

fn wrap(world: &Rank, net: &Net, (dp, pp, tp, micro_batches, _): Spread) -> Result<Parallel<Net>, Error> {
    let mut strategy = Strategy::new().with_dp(dp).with_engine(Engine::Captured);
    if tp > 1 {
        let plan = Plan::new().shard("*.up.weight", 1).shard("*.up.bias", 0).shard("*.down.weight", 0);
        strategy = strategy.with_tp(tp, plan);
    }
    if pp > 1 {
        strategy = strategy.with_pp(pp, PipelineConfig::new(micro_batches).with_cut(Cut::before(["layers.1.*"])));
    }
    own(net).parallelize(world, &strategy)
}

fn train(
    mut model: Parallel<Net>,
    optim: &mut ModuleOptimizer,
    mesh: Spread,
    (first, end): (u64, u64),
    by_rows: bool,
) -> Result<(Parallel<Net>, Vec<f64>), Error> {
    let (dp, pp, _, micro_batches, every_nth) = mesh;
    let replica = model.mesh().coordinate("dp")?;
    let mut losses = Vec::new();
    for step in first..end {
        let batch = Numbers(step + 3).tensor::<3>([ROWS, 2, 6], &device());
        let rows: Vec<usize> = match every_nth {
            true => (replica..ROWS).step_by(dp).collect(),
            false => part(ROWS, dp, replica).collect(),
        };
        if by_rows {
            model.draw_rows(step, rows[0] as u64, if every_nth { dp as u64 } else { 1 });
        }
        let parts = if pp > 1 { 1 } else { micro_batches };
        let inputs = rows.chunks(rows.len().div_ceil(parts)).map(|rows| {
            let rows = rows.iter().map(|row| batch.clone().slice([*row..*row + 1, 0..2, 0..6])).collect();
            Tensor::cat(rows, 0)
        });
        let gave = model.step_micro_batches(inputs.collect::<Vec<_>>(), Net::loss)?;
        losses.push(gave.loss.item());
        model = model.optimize(optim, 0.05, gave)?;
    }
    Ok((model, losses))
}

fn run(net: &Net, mesh: Spread, by_rows: bool) -> Vec<f64> {
    let run = |world: Rank| Ok(train(wrap(&world, net, mesh)?, &mut optimizer(), mesh, (0, 4), by_rows)?.1);
    launch::threads(mesh.0 * mesh.1 * mesh.2).run(run).unwrap().swap_remove(0)
}

const MESHES: [Spread; 7] = [
    (2, 1, 1, 1, false),
    (3, 1, 1, 2, true),
    (5, 1, 1, 1, false),
    (1, 1, 2, 3, false),
    (2, 1, 2, 1, true),
    (1, 2, 1, 5, false),
    (2, 2, 2, 2, false),
];

#[track_caller]
fn same(expected: &[f64], found: &[f64], mesh: Spread) {
    let near = expected.iter().zip(found).all(|(a, b)| (a - b).abs() <= 1e-5 * a.abs());
    assert!(near && expected.len() == found.len(), "{mesh:?}: {expected:?} {found:?}");
}

#[test]
fn a_run_goes_on_with_its_dropout_on_any_mesh() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let alone = run(&net, (1, 1, 1, 1, false), true);
    let other = run(&net, (1, 1, 1, 1, false), false);
    assert!(alone.iter().zip(&other).all(|(a, b)| (a - b).abs() > 1e-4), "{alone:?} {other:?}");
    for (number, saved) in MESHES.into_iter().enumerate() {
        same(&alone, &run(&net, saved, true), saved);
        let at = dir.path().join(number.to_string());
        launch::threads(saved.0 * saved.1 * saved.2)
            .run(|world| {
                let mut optim = optimizer();
                let (mut model, _) = train(wrap(&world, &net, saved)?, &mut optim, saved, (0, 2), true)?;
                let mut checkpoints = Checkpointer::new(&world, &at, CheckpointConfig::new())?;
                checkpoints.save(2, TrainState::new(&mut model).with_optimizer("adamw", &mut optim))
            })
            .unwrap();
        let mesh = MESHES[(number + 3) % MESHES.len()];
        let losses = launch::threads(mesh.0 * mesh.1 * mesh.2)
            .run(|world| {
                let (mut model, mut optim) = (wrap(&world, &net, mesh)?, optimizer());
                let mut checkpoints = Checkpointer::new(&world, &at, CheckpointConfig::new())?;
                checkpoints.restore(TrainState::new(&mut model).with_optimizer("adamw", &mut optim))?;
                Ok(train(model, &mut optim, mesh, (2, 4), true)?.1)
            })
            .unwrap();
        same(&alone[2..], &losses[0], mesh);
    }
}

/// What the index says of it: for readers, and for the warning of a restore on another number of replicas.
#[test]
fn the_index_says_what_the_numbers_go_by() {
    let (dir, net, mesh) = (Dir::fresh(), Net::new(), (2, 1, 1, 1, false));
    for (step, steps, by_rows, said) in [(1, 0, false, "unused"), (2, 1, false, "replicas"), (3, 1, true, "rows")] {
        let run = launch::threads(2).run(|world| {
            let mut optim = optimizer();
            let (mut model, _) = train(wrap(&world, &net, mesh)?, &mut optim, mesh, (0, steps), by_rows)?;
            Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.save(step, TrainState::new(&mut model))
        });
        let saved = run.unwrap().swap_remove(0);
        let index = std::fs::read(saved.dir.join("checkpoint.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        assert_eq!((&index["random_by"], &index["replicas"]), (&said.into(), &2.into()));
    }
}
