//! Who opens a directory, and who saves in it: one run at a time.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;

use crate::Dir;
use crate::net::{Axes, Net};

const AXES: Axes = Axes::new(2, 1, 1);

fn open(world: &Rank, dir: &Path) -> Result<Checkpointer, Error> {
    Checkpointer::new(world, dir, CheckpointConfig::new())
}

/// That another saves there too is an error of the one that finds it out, which harms nothing that the other has made.
#[test]
fn a_second_run_that_saves_in_a_directory_is_refused() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let (mut one, mut other) = (open(&world, dir.path())?, open(&world, dir.path())?);
        one.save(10, TrainState::new(&mut model))?;
        let mut refused = vec![other.save(20, TrainState::new(&mut model)).unwrap_err().to_string()];
        // Not for the step that the first has saved, either.
        refused.push(other.save(10, TrainState::new(&mut model)).unwrap_err().to_string());
        one.save(10, TrainState::new(&mut model))?;
        one.save(30, TrainState::new(&mut model))?;
        // What was there when a run began is its own to go on from, or to replace.
        let mut next = open(&world, dir.path())?;
        next.save(30, TrainState::new(&mut model))?;
        next.save(40, TrainState::new(&mut model))?;
        refused.push(one.save(50, TrainState::new(&mut model)).unwrap_err().to_string());
        // Nor is one the other's that takes the place of what was there.
        let mut last = open(&world, dir.path())?;
        next.save(30, TrainState::new(&mut model))?;
        refused.push(last.save(60, TrainState::new(&mut model)).unwrap_err().to_string());
        assert_eq!(one.steps()?, [10, 30, 40]);
        Ok(refused)
    });
    let refused = run.unwrap();
    assert_eq!(refused[0], refused[1]);
    for (said, made) in refused[0].iter().zip([10, 10, 40, 30]) {
        assert!(said.contains(&format!("another run saves here: `step-{made:09}`")), "{said}");
    }
}

/// Neither is what another writes at the moment removed, by a run that saves or by one that only reads.
#[test]
fn what_another_run_is_writing_stays() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let theirs = dir.path().join(".step-000000005.0123456789abcdef.unfinished");
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        let mut saves = open(&world, dir.path())?;
        saves.save(1, TrainState::new(&mut model))?;
        world.barrier()?;
        if world.rank() == 0 {
            fs::create_dir(&theirs).unwrap();
        }
        world.barrier()?;
        let mut reads = open(&world, dir.path())?;
        reads.restore(TrainState::new(&mut model))?;
        let refused = saves.save(2, TrainState::new(&mut model)).unwrap_err().to_string();
        assert!(refused.contains(".step-000000005.0123456789abcdef.unfinished"), "{refused}");
        assert!(
            refused.contains("killed in the middle of a save, remove that, or open this directory again"),
            "{refused}"
        );
        assert!(theirs.is_dir());
        world.barrier()?;
        // A run that is started then takes it for what a killed one has left.
        reads.save(2, TrainState::new(&mut model))?;
        assert!(!theirs.exists());
        reads.steps()
    });
    assert_eq!(run.unwrap(), vec![vec![1, 2]; 2]);
}

/// As a run that is started does while the first is in the middle of a save.
#[test]
fn a_draft_that_somebody_removes_is_an_error_that_says_so() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let done = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for entry in fs::read_dir(dir.path()).into_iter().flatten().flatten() {
                    if entry.file_name().to_string_lossy().ends_with(".unfinished") {
                        let _ = fs::remove_dir_all(entry.path());
                    }
                }
            }
        });
        let run = launch::threads(2).run(|world| {
            let mut model = AXES.wrap(&world, &net)?;
            let (mut checkpoints, began) = (open(&world, dir.path())?, Instant::now());
            let mut said = String::new();
            // Sooner or later it is removed while the files are written.
            while !said.contains("is not there while it is written") {
                let late = began.elapsed() > Duration::from_secs(240);
                assert!(!world.all_gather(vec![u8::from(late)])?.contains(&1), "{said}");
                said = checkpoints.save(1, TrainState::new(&mut model)).map_or_else(|why| why.to_string(), |_| said);
            }
            Ok(said)
        });
        done.store(true, Ordering::Relaxed);
        let said = run.unwrap();
        assert_eq!(said[0], said[1]);
        assert!(said[0].contains("a directory of its own"), "{}", said[0]);
    });
}

/// Not even to make a directory of checkpoints in it.
#[test]
fn a_checkpoint_is_not_opened_as_a_directory_of_them() {
    let (dir, net) = (Dir::fresh(), Net::new());
    let run = launch::threads(2).run(|world| {
        let mut model = AXES.wrap(&world, &net)?;
        open(&world, dir.path())?.save(100, TrainState::new(&mut model))?;
        Ok(open(&world, &dir.path().join("step-000000100")).map(drop).unwrap_err().to_string())
    });
    for said in run.unwrap() {
        assert!(said.contains("is itself the checkpoint of step 100: open the directory that it is in"), "{said}");
    }
}
