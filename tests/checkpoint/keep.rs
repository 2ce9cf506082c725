//! Which checkpoints there are: committed, kept, removed; and what goes wrong with the directory.

use std::fs;

use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;

use crate::Dir;
use crate::common::reference::values;
use crate::net::{Axes, Net};

pub(crate) const AXES: Axes = Axes::new(2, 1, 1);

pub(crate) fn names(dir: &Dir) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_last_and_every_so_many_are_kept() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let config = CheckpointConfig::new().with_keep_last(2).with_keep_every(4);
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), config.clone())?;
        assert_eq!(checkpoints.latest()?, None);
        assert_eq!(checkpoints.restore(TrainState::new(&mut model))?, None);
        for step in 1..8 {
            checkpoints.save(step, TrainState::new(&mut model))?;
            assert_eq!(checkpoints.latest()?, Some(step));
        }
        // The same step again.
        checkpoints.save(7, TrainState::new(&mut model))?;
        checkpoints.steps()
    });
    assert_eq!(run.unwrap(), vec![vec![4, 6, 7]; 2]);
    assert_eq!(names(&dir), ["step-000000004", "step-000000006", "step-000000007"]);
}

/// A run that goes on from an earlier step keeps what it writes, and those of the run before go first.
#[test]
fn a_run_that_went_back_keeps_what_it_saves() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let config = CheckpointConfig::new().with_keep_last(2);
    let line = |from: Option<u64>, saves: &[u64]| {
        let run = launch::threads(2).run(|world| {
            let mut model = AXES.wrap(&world, &net)?;
            let mut checkpoints = Checkpointer::new(&world, dir.path(), config.clone())?;
            if let Some(step) = from {
                checkpoints.restore_step(step, TrainState::new(&mut model))?;
            }
            let mut kept = Vec::new();
            for step in saves {
                match step % 2 {
                    0 => drop(checkpoints.save(*step, TrainState::new(&mut model))?),
                    _ => checkpoints.save_async(*step, TrainState::new(&mut model))?,
                }
                kept.push(checkpoints.steps()?);
            }
            Ok(kept)
        });
        run.unwrap().swap_remove(0)
    };
    line(None, &[10, 20, 30]);
    assert_eq!(line(Some(20), &[11, 12, 20, 30]), [[11, 20], [11, 12], [12, 20], [20, 30]]);
    // What it goes on from counts as its own, and one that is saved again as the newest.
    assert_eq!(line(Some(20), &[21, 20, 22]), [[20, 21], [20, 21], [20, 22]]);
}

#[test]
fn what_a_killed_save_left_is_removed_and_what_is_not_ours_stays() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let save = |step| {
        let run = launch::threads(2).run(|world| {
            let mut model = AXES.wrap(&world, &net)?;
            Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.save(step, TrainState::new(&mut model))
        });
        run.unwrap();
    };
    save(1);
    save(3);
    let at = |name: &str| dir.path().join(name);
    for left in [".step-000000002.unfinished", ".step-000000001.replaced", ".step-000000000.removed"] {
        fs::create_dir(at(left)).unwrap();
        fs::write(at(left).join("rank-00000.safetensors"), "half").unwrap();
        fs::write(at(left).join(".nfs0000000000a1b2c300000001"), "").unwrap();
    }
    let others = ["step-9", "step-000000009", "notes", ".other.unfinished"];
    others.into_iter().for_each(|other| fs::create_dir(at(other)).unwrap());
    // Called as what a save leaves.
    let theirs = [".step-000000005.unfinished", ".step-000000006.replaced", ".step-000000007.removed"];
    for name in theirs {
        fs::create_dir(at(name)).unwrap();
        fs::write(at(name).join("notes.txt"), "of somebody").unwrap();
    }
    // Killed between two renames.
    fs::rename(at("step-000000003"), at(".step-000000003.replaced")).unwrap();
    save(2);
    let mut expected =
        [&others[..], &theirs, &[".order", "step-000000001", "step-000000002", "step-000000003"]].concat();
    expected.sort_unstable();
    assert_eq!(names(&dir), expected);
    let run = launch::threads(1).run(|world| Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.latest());
    // The one that was written last.
    assert_eq!(run.unwrap(), [Some(2)]);
}

/// A run that has gone back is gone on with, though the one before has come further: from its first save on, whenever
/// it is ended, and in a copy of the directory too.
#[test]
fn the_latest_is_what_was_written_last() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let run = |from: Option<u64>, saves: &[u64]| {
        let run = launch::threads(2).run(|world| {
            let mut model = AXES.wrap(&world, &net)?;
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            let found = checkpoints.latest()?;
            match from {
                Some(step) => drop(checkpoints.restore_step(step, TrainState::new(&mut model))?),
                None => assert_eq!(checkpoints.restore(TrainState::new(&mut model))?.map(|it| it.step), found),
            }
            // To look at one is not to go back to it.
            assert_eq!(checkpoints.latest()?, found);
            for step in saves {
                checkpoints.save(*step, TrainState::new(&mut model))?;
                assert_eq!(checkpoints.latest()?, Some(*step));
            }
            Ok((found, checkpoints.steps()?))
        });
        run.unwrap().swap_remove(0)
    };
    let order = || fs::read_to_string(dir.path().join(".order")).ok();
    run(None, &[10, 20, 30]);
    assert_eq!(order(), None);
    assert_eq!(run(Some(20), &[]), (Some(30), vec![10, 20, 30]));
    assert_eq!(run(Some(20), &[21]), (Some(30), vec![10, 20, 21, 30]));
    assert_eq!(order().as_deref(), Some("10\n30\n20\n21\n"));
    assert_eq!(run(None, &[22, 30]), (Some(21), vec![10, 20, 21, 22, 30]));
    // As if it had never gone back.
    assert_eq!(order(), None);
    // One that was ended before it could put down what it has written, and one that somebody has removed.
    run(Some(10), &[11]);
    fs::rename(dir.path().join("step-000000022"), dir.path().join("step-000000012")).unwrap();
    fs::remove_dir_all(dir.path().join("step-000000021")).unwrap();
    assert_eq!(run(Some(20), &[]), (Some(12), vec![10, 11, 12, 20, 30]));
    fs::write(dir.path().join(".order"), "ten").unwrap();
    let failed =
        launch::threads(2).run(|world| Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.latest());
    let failed = failed.unwrap_err().to_string();
    assert!(failed.contains(".order: is no list of steps") && failed.contains("remove it"), "{failed}");
}

#[test]
fn a_directory_that_cannot_be_used_is_an_error_on_all_ranks_and_training_goes_on() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let (root, elsewhere) = (dir.path().join("runs"), dir.path().join("elsewhere"));
    let errors = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, &root, CheckpointConfig::new())?;
        checkpoints.save(1, TrainState::new(&mut model))?;
        world.barrier()?;
        if world.rank() == 0 {
            fs::rename(&root, &elsewhere).unwrap();
            fs::write(&root, "a file in its place").unwrap();
        }
        world.barrier()?;
        let failed = checkpoints.save(2, TrainState::new(&mut model)).unwrap_err().to_string();
        let unread = checkpoints.restore(TrainState::new(&mut model)).unwrap_err().to_string();
        world.barrier()?;
        if world.rank() == 0 {
            fs::remove_file(&root).unwrap();
            fs::rename(&elsewhere, &root).unwrap();
        }
        world.barrier()?;
        assert_eq!(checkpoints.latest()?, Some(1));
        checkpoints.save(2, TrainState::new(&mut model))?;
        assert_eq!(checkpoints.latest()?, Some(2));
        let before = values(model.local());
        checkpoints.restore(TrainState::new(&mut model))?;
        assert_eq!(values(model.local()), before);
        Ok((failed, unread))
    });
    let errors = errors.unwrap();
    assert_eq!(errors[0], errors[1]);
    let (failed, unread) = &errors[0];
    assert!(failed.contains("checkpoint: rank 0: ") && failed.contains("runs"), "{failed}");
    assert!(unread.contains("checkpoint: rank 0: ") && unread.contains("runs"), "{unread}");
}

/// A rank whose state cannot be saved fails the save of all, and nothing of it is left.
#[test]
fn a_rank_that_cannot_save_fails_the_save_of_all() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let errors = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        checkpoints.save(1, TrainState::new(&mut model))?;
        let (mut one, mut other) = (1, 2);
        let state = TrainState::new(&mut model).with_value("value", &mut one);
        let state = if world.rank() == 1 { state.with_value("value", &mut other) } else { state };
        let error = checkpoints.save(2, state).unwrap_err().to_string();
        assert_eq!(checkpoints.latest()?, Some(1));
        Ok(error)
    });
    let errors = errors.unwrap();
    assert_eq!(errors[0], errors[1]);
    assert!(errors[0].contains("rank 1: two of the values are called `value`"), "{}", errors[0]);
    assert_eq!(names(&dir), ["step-000000001"]);
}

#[test]
fn ranks_that_want_other_things_are_an_error() {
    let dir = Dir::fresh();
    let run = launch::threads(2).run(|world| {
        let config = CheckpointConfig::new().with_keep_last(world.rank() + 1);
        Checkpointer::new(&world, dir.path(), config).map(|_| ())
    });
    let said = run.unwrap_err().to_string();
    assert!(said.starts_with("`CheckpointConfig.keep_last` is 2 on rank 1 of group `world/checkpoint"), "{said}");
    assert!(said.ends_with("`, and 1 on rank 0: give all ranks the same"), "{said}");
}
