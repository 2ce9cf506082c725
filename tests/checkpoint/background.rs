//! Saves in the background hold what there was when they began, and nothing is lost at the end.

use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;

use crate::Dir;
use crate::common::reference::{optimizer, values};
use crate::net::{Axes, Net, train};

#[test]
fn training_goes_on_meanwhile() {
    let (dir, net) = (Dir::fresh(), Net::wide(64));
    for axes in [Axes::new(2, 1, 1), Axes::new(1, 1, 2), Axes::new(1, 2, 1)] {
        let run = launch::threads(2).run(|world| {
            let (mut model, mut optim) = (axes.wrap(&world, &net)?, optimizer());
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            assert_eq!(checkpoints.wait()?, None);
            let mut states = Vec::new();
            for step in 0..4 {
                states.push(values(&model.assemble()?));
                checkpoints.save_async(step, TrainState::new(&mut model).with_optimizer("adamw", &mut optim))?;
                model = train(model, &mut optim, (step, step + 1))?.0;
            }
            // Waits for the last.
            drop(checkpoints);
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            for (step, expected) in states.iter().enumerate() {
                checkpoints.restore_step(step as u64, TrainState::new(&mut model))?;
                assert_eq!(values(&model.assemble()?), *expected, "{axes:?}, step {step}");
            }
            checkpoints.save_async(9, TrainState::new(&mut model))?;
            assert_eq!(checkpoints.wait()?.unwrap().step, 9);
            Ok(())
        });
        run.unwrap();
    }
}

#[test]
fn an_error_is_that_of_the_next_call() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let run = launch::threads(2).run(|world| {
        let mut model = Axes::new(2, 1, 1).wrap(&world, &net)?;
        let root = dir.path().join("runs");
        let mut checkpoints = Checkpointer::new(&world, &root, CheckpointConfig::new())?;
        world.barrier()?;
        if world.rank() == 0 {
            std::fs::remove_dir_all(&root).unwrap();
            std::fs::write(&root, "a file in its place").unwrap();
        }
        world.barrier()?;
        checkpoints.save_async(1, TrainState::new(&mut model))?;
        let error = checkpoints.wait().unwrap_err().to_string();
        assert!(error.contains("runs"), "{error}");
        assert_eq!(checkpoints.wait()?, None);
        Ok(())
    });
    run.unwrap();
}
