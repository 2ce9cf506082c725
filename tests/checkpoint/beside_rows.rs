//! Replicas that hold rows of parameters, and beside these some whole, of which each updates its rows: adapters.

use burn::module::{Lora, Module};
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::{Engine, Parallel};

use crate::Dir;
use crate::common::checkpointing::own_by;
use crate::common::reference::{filled, optimizer};
use crate::net::{Net, alone, train};

const MESHES: [(usize, Sharding, Engine); 5] = [
    (1, Sharding::None, Engine::Auto),
    (2, Sharding::Parameters, Engine::Eager),
    (3, Sharding::Parameters, Engine::Eager),
    (2, Sharding::Parameters, Engine::Captured),
    (2, Sharding::Optimizer, Engine::Auto),
];

fn wrap(world: &Rank, model: &Net, (dp, sharding, engine): (usize, Sharding, Engine)) -> Result<Parallel<Net>, Error> {
    let mut strategy = Strategy::new().with_dp(dp).with_engine(engine);
    strategy.data.sharding = sharding;
    own_by(model, &strategy).parallelize(world, &strategy)
}

/// Under each of these from each other.
#[test]
fn adapters_go_on_with_their_moments() {
    let (dir, model) = (Dir::fresh(), filled(Net::new().apply_lora(Lora::new(2, 4.0))));
    let expected = alone(&model, 4);
    let at = |number: usize| dir.path().join(number.to_string());
    for (number, mesh) in MESHES.into_iter().enumerate() {
        let run = launch::threads(mesh.0).run(|world| {
            let mut optim = optimizer();
            let (mut model, _) = train(wrap(&world, &model, mesh)?, &mut optim, (0, 2))?;
            let mut checkpoints = Checkpointer::new(&world, at(number), CheckpointConfig::new())?;
            checkpoints.save(2, TrainState::new(&mut model).with_optimizer("optim", &mut optim))
        });
        run.unwrap();
    }
    for (from, saved) in MESHES.into_iter().enumerate() {
        for mesh in MESHES {
            let run = launch::threads(mesh.0).run(|world| {
                let (mut model, mut optim) = (wrap(&world, &model, mesh)?, optimizer());
                let mut checkpoints = Checkpointer::new(&world, at(from), CheckpointConfig::new())?;
                checkpoints.restore(TrainState::new(&mut model).with_optimizer("optim", &mut optim))?;
                Ok(train(model, &mut optim, (2, 4))?.1)
            });
            let losses = run.unwrap_or_else(|why| panic!("{saved:?} to {mesh:?}: {why}"));
            for (found, expected) in losses[0].iter().zip(&expected[2..]) {
                let same = (found - expected).abs() <= 1e-5 * expected.abs();
                assert!(same, "{saved:?} to {mesh:?}: {found} {expected}");
            }
        }
    }
}
