//! Optimizers that look at whole matrices: where a matrix is divided one rank has its moments, and they go to any other
//! mesh.

use burn::module::ParamGroup;
use burn::optim::{AdafactorConfig, AdamWConfig, LambConfig, ModuleOptimizer, MuonConfig};
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;

use crate::Dir;
use crate::net::{Axes, Net, train};

const MESHES: [Axes; 8] = [
    Axes::new(1, 1, 1),
    Axes::new(2, 1, 1).sharded(Sharding::Optimizer),
    Axes::new(3, 1, 1).sharded(Sharding::Parameters),
    Axes::new(2, 1, 1),
    Axes::new(3, 1, 1).sharded(Sharding::Gradients),
    Axes::new(1, 1, 3),
    Axes::new(2, 1, 2).sharded(Sharding::Optimizer),
    Axes::new(2, 2, 2).sharded(Sharding::Parameters),
];

/// Makers of one kind of optimizer, and its name: what one has saved the other goes on from.
type Made = (&'static str, [fn() -> ModuleOptimizer; 2]);

fn muon() -> ModuleOptimizer {
    // By path, so that what is restored must find its group again.
    let matrices = ParamGroup::from_regex("(up|down).weight$").unwrap();
    AdamWConfig::new().init().with_group(matrices, MuonConfig::new().build(), None)
}

/// Those of burn that load records into host memory.
fn adafactor() -> ModuleOptimizer {
    AdafactorConfig::new().build().load_on_host().into()
}

fn muon_on_host() -> ModuleOptimizer {
    let matrices = ParamGroup::from_regex("(up|down).weight$").unwrap();
    AdamWConfig::new().init_fused().with_group(matrices, MuonConfig::new().build().load_on_host(), None)
}

const OPTIMIZERS: [Made; 3] = [
    ("muon", [muon, muon_on_host]),
    ("lamb", [|| LambConfig::new().init(); 2]),
    ("adafactor", [|| AdafactorConfig::new().init(), adafactor]),
];

#[test]
fn moments_of_whole_matrices_go_on_under_any_mesh() {
    let (dir, net) = (Dir::fresh(), Net::new());
    for (name, made) in OPTIMIZERS {
        let alone = launch::threads(1)
            .run(|world| Ok(train(Axes::new(1, 1, 1).wrap(&world, &net)?, &mut made[0](), (0, 4))?.1))
            .unwrap()
            .swap_remove(0);
        for (number, saved) in MESHES.into_iter().enumerate() {
            let at = dir.path().join(format!("{name}-{number}"));
            launch::threads(saved.ranks())
                .run(|world| {
                    let mut optim = made[number % 2]();
                    let (mut model, _) = train(saved.wrap(&world, &net)?, &mut optim, (0, 2))?;
                    let mut checkpoints = Checkpointer::new(&world, &at, CheckpointConfig::new())?;
                    checkpoints.save(2, TrainState::new(&mut model).with_optimizer("optim", &mut optim))
                })
                .unwrap();
            for other in [0, 1, 3] {
                let axes = MESHES[(number + other) % MESHES.len()];
                let losses = launch::threads(axes.ranks())
                    .run(|world| {
                        let (mut model, mut optim) = (axes.wrap(&world, &net)?, made[(number + other) % 2]());
                        let mut checkpoints = Checkpointer::new(&world, &at, CheckpointConfig::new())?;
                        checkpoints.restore(TrainState::new(&mut model).with_optimizer("optim", &mut optim))?;
                        Ok(train(model, &mut optim, (2, 4))?.1)
                    })
                    .unwrap();
                for (found, expected) in losses[0].iter().zip(&alone[2..]) {
                    let same = (found - expected).abs() <= 1e-5 * expected.abs();
                    assert!(same, "{name}, {saved:?} to {axes:?}: {found} {expected}");
                }
            }
        }
    }
}
