//! What somebody else has in a directory of checkpoints stays as it is, and is named where it is in the way.

use std::fs;

use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;

use crate::Dir;
use crate::keep::{AXES, names};
use crate::net::Net;

/// What is called as a checkpoint and is none is not passed over, which could be one that was damaged: an error names
/// it, and says what to do.
#[test]
fn what_somebody_has_in_the_place_of_the_latest_is_named() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let ours = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?.save(1, TrainState::new(&mut model)).map(drop)
    });
    ours.unwrap();
    let theirs = dir.path().join("step-000000009");
    fs::create_dir(&theirs).unwrap();
    fs::write(theirs.join("checkpoint.json"), "{}").unwrap();
    let restored = || {
        let run = launch::threads(2).run(|world| {
            let mut model = AXES.wrap(&world, &net)?;
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
            let latest = checkpoints.latest()?;
            let restored = checkpoints.restore(TrainState::new(&mut model)).map_err(|why| why.to_string());
            checkpoints.restore_step(1, TrainState::new(&mut model))?;
            Ok((latest, restored.map(|restored| restored.unwrap().step)))
        });
        run.unwrap().swap_remove(0)
    };
    let (latest, refused) = restored();
    assert_eq!(latest, Some(9));
    let refused = refused.unwrap_err();
    for words in ["step-000000009/checkpoint.json.xxh3: is not there", "move it elsewhere", "`restore_step`"] {
        assert!(refused.contains(words), "`{words}` is missing in: {refused}");
    }
    fs::rename(&theirs, dir.path().join("theirs")).unwrap();
    assert_eq!(restored(), (Some(1), Ok(1)));
}

/// The one before it would be restored, and then saved over it, without a word.
#[test]
fn a_latest_that_lost_its_index_is_named() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        for step in [1, 2] {
            checkpoints.save(step, TrainState::new(&mut model))?;
        }
        if world.rank() == 0 {
            fs::remove_file(dir.path().join("step-000000002/checkpoint.json")).unwrap();
        }
        world.barrier()?;
        let latest = checkpoints.latest()?;
        let refused = checkpoints.restore(TrainState::new(&mut model)).unwrap_err().to_string();
        checkpoints.restore_step(1, TrainState::new(&mut model))?;
        Ok((latest, refused))
    });
    let (latest, refused) = run.unwrap().swap_remove(0);
    assert_eq!(latest, Some(2));
    for words in ["step-000000002/checkpoint.json: is not there", "`restore_step`"] {
        assert!(refused.contains(words), "`{words}` is missing in: {refused}");
    }
}

/// A pipe in its place would never end.
#[cfg(unix)]
#[test]
fn an_order_that_is_no_file_is_named() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        checkpoints.save(1, TrainState::new(&mut model))?;
        if world.rank() == 0 {
            let order = dir.path().join(".order");
            let _ = fs::remove_file(&order);
            assert!(std::process::Command::new("mkfifo").arg(&order).status().unwrap().success());
        }
        world.barrier()?;
        Ok(checkpoints.latest().unwrap_err().to_string())
    });
    assert!(run.unwrap()[0].contains(".order: is not a file"));
}

/// It is in the way of the removal of one checkpoint, and not of the others'.
#[test]
fn what_somebody_has_where_a_checkpoint_is_removed_stays() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let theirs = dir.path().join(".step-000000002.removed");
    fs::create_dir(&theirs).unwrap();
    fs::write(theirs.join("notes.txt"), "of somebody").unwrap();
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new().with_keep_last(1))?;
        for step in 1..6 {
            checkpoints.save(step, TrainState::new(&mut model))?;
        }
        checkpoints.steps()
    });
    assert_eq!(run.unwrap(), vec![vec![2, 5]; 2]);
    assert_eq!(fs::read(theirs.join("notes.txt")).unwrap(), b"of somebody");
}

/// Neither a save nor what it removes takes a directory that no save has made, whatever it is called.
#[test]
fn what_somebody_has_under_the_name_of_a_checkpoint_stays() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let at = |step: u64| dir.path().join(format!("step-{step:09}"));
    for step in [1, 2, 4] {
        fs::create_dir(at(step)).unwrap();
        fs::write(at(step).join("notes.txt"), "of somebody").unwrap();
    }
    // As another program calls its own.
    fs::write(at(1).join("checkpoint.json"), "{}").unwrap();
    fs::write(at(3), "no directory").unwrap();
    let aside = dir.path().join(".step-000000005.replaced");
    fs::rename(at(4), &aside).unwrap();
    let before = names(&dir);
    let config = CheckpointConfig::new().with_keep_last(1);
    let refused = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), config.clone())?;
        let mut refused = Vec::new();
        for step in [1, 2, 3, 5] {
            refused.push(checkpoints.save(step, TrainState::new(&mut model)).unwrap_err().to_string());
            checkpoints.save_async(step, TrainState::new(&mut model))?;
            refused.push(checkpoints.wait().unwrap_err().to_string());
        }
        world.barrier()?;
        assert_eq!(names(&dir), before);
        world.barrier()?;
        for step in [7, 8] {
            checkpoints.save(step, TrainState::new(&mut model))?;
        }
        Ok(refused)
    });
    let refused = refused.unwrap();
    assert_eq!(refused[0], refused[1]);
    let places = [at(1), at(2), at(3), aside.clone()];
    for (said, place) in refused[0].chunks(2).zip(&places) {
        assert!(said[0] == said[1] && said[0].contains(&format!("{}: is in the place", place.display())), "{said:?}");
        assert!(said[0].contains("move it elsewhere"), "{said:?}");
    }
    assert_eq!(names(&dir).len(), before.len() + 1);
    for place in [at(1), at(2), aside] {
        assert_eq!(fs::read(place.join("notes.txt")).unwrap(), b"of somebody");
    }
}

/// Where names cannot be exchanged, a save that is killed may leave the checkpoint under another name alone.
#[test]
fn a_checkpoint_that_was_set_aside_stays_while_somebodys_is_in_its_place() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let save = |step| {
        let run = launch::threads(2).run(|world| {
            let mut model = AXES.wrap(&world, &net)?;
            let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new().with_keep_last(1))?;
            checkpoints.save(step, TrainState::new(&mut model)).map(drop)
        });
        run.unwrap();
    };
    save(1);
    let (aside, theirs) = (dir.path().join(".step-000000001.replaced"), dir.path().join("step-000000001"));
    fs::rename(&theirs, &aside).unwrap();
    fs::create_dir(&theirs).unwrap();
    save(2);
    assert_eq!(names(&dir), [".step-000000001.replaced", "step-000000001", "step-000000002"]);
    fs::remove_dir(&theirs).unwrap();
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        checkpoints.restore_step(1, TrainState::new(&mut model)).map(|restored| restored.step)
    });
    assert_eq!(run.unwrap(), [1; 2]);
}

/// It would go with the checkpoint.
#[test]
fn what_somebody_has_in_a_checkpoint_stays() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let notes = dir.path().join("step-000000001/export/notes.txt");
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new().with_keep_last(1))?;
        checkpoints.save(1, TrainState::new(&mut model))?;
        if world.rank() == 0 {
            fs::create_dir(notes.parent().unwrap()).unwrap();
            fs::write(&notes, "of somebody").unwrap();
        }
        world.barrier()?;
        for step in [2, 3] {
            checkpoints.save(step, TrainState::new(&mut model))?;
        }
        let refused = checkpoints.save(1, TrainState::new(&mut model)).unwrap_err().to_string();
        Ok((refused, checkpoints.steps()?))
    });
    let (refused, steps) = run.unwrap().swap_remove(1);
    for words in ["step-000000001: is in the place of", "has `export` in it, which no save has made", "move that"] {
        assert!(refused.contains(words), "`{words}` is missing in: {refused}");
    }
    assert!(steps == [1, 3] && notes.exists());
}
