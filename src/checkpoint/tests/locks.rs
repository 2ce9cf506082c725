//! Drafts, and the locks by which it is known whether a run writes them still.

use std::cell::RefCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::rc::Rc;

use super::{goes_on, helper, model, values};
use crate::Error;
use crate::checkpoint::draft_lock::{Lock, lock_of};
use crate::checkpoint::fault::{self, STALL};
use crate::checkpoint::opened::Opened;
use crate::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use crate::data_parallel::{DataParallel, DataParallelConfig};
use crate::launch::{self, Rank};
use crate::tensor_file::killed::Dir;
use crate::train::ParallelModule;

/// Starts a run that stays in the middle of its first save.
fn another_in_a_save(dir: &Dir) -> Child {
    let mut other = helper(dir, None).env(STALL, "half written").spawn().unwrap();
    let writes = |draft: fs::DirEntry| draft.path().join("rank-00000.safetensors").exists();
    while !fs::read_dir(&dir.0).unwrap().any(|draft| draft.is_ok_and(writes)) {
        assert!(other.try_wait().unwrap().is_none(), "it is to be killed");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    other
}

/// What a living run writes is in the way of a save, whether it has begun before the directory was opened or after.
#[test]
fn a_run_that_is_killed_in_a_save_is_not_in_the_way_of_others() {
    for before in [false, true] {
        let dir = Dir::new();
        let run = launch::threads(1).run(|world| {
            let mut wrapped = model(1).data_parallel(&world, DataParallelConfig::new())?;
            let early = before.then(|| another_in_a_save(&dir));
            let mut checkpoints = Checkpointer::new(&world, &dir.0, CheckpointConfig::new()).unwrap();
            let mut other = early.unwrap_or_else(|| another_in_a_save(&dir));
            let refused = checkpoints.save(1, TrainState::new(&mut wrapped)).unwrap_err().to_string();
            assert!(refused.contains("another run saves here"), "{refused}");
            assert_eq!(refused.contains("is being written"), before, "{refused}");
            other.kill().unwrap();
            other.wait().unwrap();
            checkpoints.save(1, TrainState::new(&mut wrapped)).map(drop)
        });
        run.unwrap();
        assert_eq!(goes_on(&dir, "half written"), 1);
    }
}

fn drafts(dir: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.to_string_lossy().ends_with(".unfinished")).collect()
}

fn lock_held(dir: &Path) -> File {
    match lock_of(dir) {
        Lock::Own(held) => held,
        _ => panic!("{} is another's", dir.display()),
    }
}

/// Others ask for its lock just then, or have asked and remove it for what a killed run has left.
#[test]
fn a_draft_is_locked_whoever_asks_for_it_as_it_is_made() {
    let dir = Dir::new();
    let run = launch::threads(1).run(|world| {
        let opened = Opened::new(&dir.0, &world)?;
        let draft = opened.draft(&dir.0.join("step-000000001"))?;
        let (made_in, asks, times) = (draft.made_in.clone(), Rc::new(RefCell::new(None)), Rc::default());
        let counts: Rc<RefCell<usize>> = Rc::clone(&times);
        fault::at("draft begun", move || {
            *counts.borrow_mut() += 1;
            match *counts.borrow() {
                1 => *asks.borrow_mut() = Some(lock_held(&made_in)),
                2 => fs::remove_dir(&made_in).unwrap(),
                _ => {}
            }
        });
        let held = opened.begin(&draft)?;
        assert!(held.is_some() && draft.made_in.is_dir() && matches!(lock_of(&draft.made_in), Lock::Anothers));
        assert_eq!(*times.borrow(), 3);
        drop(held);
        assert!(matches!(lock_of(&draft.made_in), Lock::Own(_)));
        Ok(())
    });
    run.unwrap();
}

/// Nobody can write into it any more once its files begin to go, nor take it for its own that asks meanwhile.
#[test]
fn a_draft_is_removed_under_its_lock_and_another_name() {
    let dir = Dir::new();
    let run = launch::threads(1).run(|world| {
        let (one, other) = (Opened::new(&dir.0, &world)?, Opened::new(&dir.0, &world)?);
        let draft = one.draft(&dir.0.join("step-000000001"))?;
        let held = one.begin(&draft)?;
        fs::write(draft.made_in.join("rank-00000.safetensors"), "half").unwrap();
        other.clean_up()?;
        assert!(draft.made_in.join("rank-00000.safetensors").is_file());
        drop(held);
        let (path, made_in, looks) = (dir.0.clone(), draft.made_in.clone(), Rc::new(RefCell::new(0)));
        let counts = Rc::clone(&looks);
        fault::at("removing", move || {
            *counts.borrow_mut() += 1;
            assert!(fs::write(made_in.join("checkpoint.json"), "").is_err());
            let left = fs::read_dir(&path).unwrap().next().unwrap().unwrap().path();
            assert!(left.join("rank-00000.safetensors").is_file() && matches!(lock_of(&left), Lock::Anothers));
        });
        other.clean_up()?;
        assert_eq!((fs::read_dir(&dir.0).unwrap().count(), *looks.borrow()), (0, 1));
        Ok(())
    });
    run.unwrap();
}

/// A program that knows no locks may do so.
#[test]
fn a_draft_of_which_a_file_is_gone_is_no_checkpoint() {
    let dir = Dir::new();
    let save = |world: &Rank, step| {
        let mut wrapped = model(step).data_parallel(world, DataParallelConfig::new())?;
        Checkpointer::new(world, &dir.0, CheckpointConfig::new().with_keep_last(1))?
            .save(step, TrainState::new(&mut wrapped))
            .map(drop)
    };
    let deeds: [fn(&Path); 2] = [
        |file| fs::remove_file(file).unwrap(),
        |file| File::options().write(true).open(file).unwrap().set_len(8).unwrap(),
    ];
    for deed in deeds {
        let run = launch::threads(2).run(|world| {
            save(&world, 1)?;
            let path = dir.0.clone();
            if world.rank() == 0 {
                fault::at("index written", move || deed(&drafts(&path)[0].join("rank-00000.safetensors")));
            }
            let said = save(&world, 2).unwrap_err().to_string();
            let mut wrapped = model(100).data_parallel(&world, DataParallelConfig::new())?;
            let mut checkpoints = Checkpointer::new(&world, &dir.0, CheckpointConfig::new())?;
            checkpoints.restore(TrainState::new(&mut wrapped))?;
            assert!(values(wrapped.local()).iter().all(|value| *value == 1.0));
            Ok::<_, Error>(said)
        });
        let said = run.unwrap();
        assert!(
            said[0] == said[1] && said[0].contains("rank-00000.safetensors: is not there as it was written"),
            "{said:?}"
        );
    }
}
