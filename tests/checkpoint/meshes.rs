//! Saved on one mesh and restored on another: the losses of the next steps are those of a run that was not interrupted.

use std::fs;

use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::Module;
use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, DataPosition, TrainState};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;

use crate::Dir;
use crate::common::models::{Cnn, device, images};
use crate::common::reference::{optimizer, own, values};
use crate::net::{Axes, Net, alone, train};

const MESHES: [Axes; 12] = [
    Axes::new(1, 1, 1),
    Axes::new(2, 1, 1),
    Axes::new(1, 1, 2),
    Axes::new(1, 1, 3),
    Axes::new(1, 2, 1),
    Axes::new(2, 1, 2),
    Axes::new(2, 2, 2),
    Axes::new(3, 1, 1).sharded(Sharding::Optimizer),
    Axes::new(2, 1, 2).sharded(Sharding::Gradients),
    Axes::new(1, 2, 3),
    Axes::new(2, 1, 2).sharded(Sharding::Parameters),
    Axes::new(3, 1, 1).sharded(Sharding::Parameters),
];

#[test]
fn any_mesh_goes_on_from_any_other() {
    let (dir, model) = (Dir::fresh(), Net::new());
    let expected = alone(&model, 4);
    for (number, axes) in MESHES.into_iter().enumerate() {
        let at = dir.path().join(number.to_string());
        launch::threads(axes.ranks())
            .run(|world| {
                let mut optim = optimizer();
                let (mut model, _) = train(axes.wrap(&world, &model)?, &mut optim, (0, 2))?;
                let config = CheckpointConfig::new().with_strategy(axes.strategy());
                let mut checkpoints = Checkpointer::new(&world, &at, config)?;
                checkpoints.save(2, TrainState::new(&mut model).with_optimizer("adamw", &mut optim))
            })
            .unwrap();
    }
    // Each under every other, on one world for each mesh.
    for (number, axes) in MESHES.into_iter().enumerate() {
        let others = || MESHES.into_iter().enumerate().filter(|(other, _)| *other != number);
        let losses = launch::threads(axes.ranks())
            .run(|world| {
                let mut losses = Vec::new();
                // Other values than those that were saved, and from the second on those of the last step.
                let mut model = axes.wrap(&world, &Net::new().map(&mut Negate))?;
                for (other, _) in others() {
                    let mut optim = optimizer();
                    let at = dir.path().join(other.to_string());
                    let mut checkpoints = Checkpointer::new(&world, at, CheckpointConfig::new())?;
                    let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
                    let restored = checkpoints.restore(state)?.unwrap();
                    assert_eq!(restored.step, 2);
                    let (trained, next) = train(model, &mut optim, (2, 4))?;
                    model = trained;
                    losses.push(next);
                }
                Ok(losses)
            })
            .unwrap();
        for ((_, saved), losses) in others().zip(&losses[0]) {
            for (found, expected) in losses.iter().zip(&expected[2..]) {
                assert!((found - expected).abs() <= 1e-5 * expected.abs(), "{saved:?} to {axes:?}: {found} {expected}");
            }
        }
    }
}

struct Negate;

impl burn::module::ModuleMapper for Negate {
    fn map_float<const D: usize>(
        &mut self,
        param: burn::module::Param<burn::tensor::Tensor<D>>,
    ) -> burn::module::Param<burn::tensor::Tensor<D>> {
        param.map(|value| (value.neg() * 3.0).detach().require_grad())
    }
}

/// Also of a run that was resumed before, with the learning rate of a schedule and the place in the data.
#[test]
fn on_the_same_mesh_to_the_bit() {
    let net = Net::new();
    for axes in [Axes::new(1, 1, 1), Axes::new(2, 1, 1), Axes::new(1, 1, 2), Axes::new(2, 2, 1)] {
        let dir = Dir::fresh();
        let run = |pieces: &[u64]| {
            let mut losses = Vec::new();
            let mut begun = 0;
            for end in pieces {
                let found = launch::threads(axes.ranks()).run(|world| {
                    let (mut model, mut optim) = (axes.wrap(&world, &net)?, optimizer());
                    let mut schedule = schedule();
                    let mut position = DataPosition::default();
                    let sampler = DistributedSampler::new(5, &world);
                    let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
                    let found = checkpoints.restore(
                        TrainState::new(&mut model)
                            .with_optimizer("adamw", &mut optim)
                            .with_scheduler("lr", &mut schedule)
                            .with_value("position", &mut position),
                    )?;
                    assert_eq!(found.map_or(0, |found| found.step), begun);
                    assert_eq!(position, DataPosition { epoch: begun as usize / 3, items: begun as usize % 3 * 2 });
                    let mut losses = Vec::new();
                    for step in begun..*end {
                        let (replicas, replica) = (model.mesh().axis("dp")?.size(), model.mesh().coordinate("dp")?);
                        let gave = model.step(crate::net::batch(step, replicas, replica), Net::loss)?;
                        losses.push(gave.loss.item());
                        model = model.optimize(&mut optim, schedule.step(), gave)?;
                        position.advance(2, &sampler);
                    }
                    let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
                    let state = state.with_scheduler("lr", &mut schedule).with_value("position", &mut position);
                    checkpoints.save(*end, state)?;
                    Ok(losses)
                });
                losses.extend(found.unwrap().swap_remove(0));
                begun = *end;
            }
            fs::remove_dir_all(dir.path()).unwrap();
            losses
        };
        assert_eq!(run(&[5]), run(&[2, 4, 5]), "{axes:?}");
    }
}

fn schedule() -> ModuleLrScheduler {
    CosineAnnealingLrSchedulerConfig::new(0.05, 7).init().unwrap()
}

/// What several ranks hold alike is written once, and each of them writes some of it.
#[test]
fn replicated_tensors_are_written_once() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let floats: usize = values(&net).values().map(|whole| whole.values.len()).sum();
    for axes in [Axes::new(4, 1, 1), Axes::new(2, 1, 3), Axes::new(2, 2, 2)] {
        let wrote = launch::threads(axes.ranks())
            .run(|world| {
                let mut optim = optimizer();
                let (mut model, _) = train(axes.wrap(&world, &net)?, &mut optim, (0, 1))?;
                let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
                let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
                Ok(checkpoints.save(1, state)?.bytes_written)
            })
            .unwrap();
        let files = fs::read_dir(dir.path().join("step-000000001")).unwrap().flatten();
        let files = files.filter(|file| file.file_name().to_str().unwrap().ends_with("safetensors"));
        let mut tensors = 0;
        for file in files {
            let bytes = fs::read(file.path()).unwrap();
            tensors += bytes.len() - 8 - u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        }
        // A parameter and two moments.
        assert_eq!(tensors, 3 * 4 * floats, "{axes:?}");
        assert!(wrote.iter().all(|bytes| *bytes > 0), "{axes:?}: {wrote:?}");
    }
}

/// Running statistics: those of the first replica, on all.
#[test]
fn running_statistics_are_those_of_the_first_replica() {
    let (dir, cnn) = (Dir::fresh(), Cnn::new(&device()));
    let wrap = |world: &Rank| own(&cnn).data_parallel(world, DataParallelConfig::new());
    let saved = launch::threads(2).run(|world| {
        let mut model = wrap(&world)?;
        let gave = model.step(images(4, world.rank() as u64 + 1, &device()), |m, (x, t)| m.loss(x, t))?;
        let mut optim = optimizer();
        model = model.optimize(&mut optim, 0.1, gave)?;
        let mut number = 7;
        let state = TrainState::new(&mut model).with_value("number", &mut number);
        Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.save(1, state)?;
        Ok(values(model.local()))
    });
    let restored = launch::threads(3).run(|world| {
        let mut model = wrap(&world)?;
        Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.restore(TrainState::new(&mut model))?;
        Ok(values(model.local()))
    });
    let refused = launch::threads(2).run(|world| {
        let mut model = wrap(&world)?;
        let before = values(model.local());
        let mut number = String::new();
        let state = TrainState::new(&mut model).with_value("number", &mut number);
        Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.restore(state).unwrap_err();
        assert_eq!(values(model.local()), before);
        Ok(())
    });
    refused.unwrap();
    let saved = saved.unwrap();
    assert_ne!(saved[0], saved[1]);
    for restored in restored.unwrap() {
        for (path, expected) in &saved[0] {
            assert_eq!(restored[path], *expected, "{path}");
        }
    }
}
