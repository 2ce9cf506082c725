//! Where the system cannot exchange two names: a checkpoint that another of the same step takes the place of is set
//! aside for a moment.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::channel;

use super::{DIR, model, values};
use crate::checkpoint::directory::{name_of, put_back};
use crate::checkpoint::fault::{self, NO_EXCHANGE};
use crate::checkpoint::index::INDEX_CHECKSUM;
use crate::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use crate::data_parallel::{DataParallel, DataParallelConfig};
use crate::launch::{self, Rank};
use crate::tensor_file::killed::{self, Dir};
use crate::train::ParallelModule;

fn open(world: &Rank, dir: &Path) -> Result<Checkpointer, crate::Error> {
    Checkpointer::new(world, dir, CheckpointConfig::new())
}

/// Run by the test in a process of its own: replaces a checkpoint while another run asks for the latest.
#[test]
#[ignore = "a helper of the other test"]
fn replaces_what_another_reads() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = Path::new(&dir).to_owned();
    let save = |world: &Rank, value| {
        let mut wrapped = model(value).data_parallel(world, DataParallelConfig::new())?;
        open(world, &dir)?.save(1, TrainState::new(&mut wrapped)).map(drop)
    };
    launch::threads(1).run(|world| save(&world, 1)).unwrap();
    let ((ask, asked), (tell, told)) = (channel::<()>(), channel());
    let (asked, of_reader) = (Mutex::new(asked), dir.clone());
    let reader = std::thread::spawn(move || {
        launch::threads(1).run(|world| {
            let mut checkpoints = open(&world, &of_reader)?;
            tell.send(None).unwrap();
            let asked = asked.lock().unwrap();
            while asked.recv().is_ok() {
                tell.send(checkpoints.latest()?).unwrap();
            }
            Ok(())
        })
    });
    assert_eq!(told.recv().unwrap(), None);
    // The deed belongs to the thread of the rank.
    let (ask, told) = (Mutex::new(Some(ask)), Mutex::new(Some(told)));
    let run = launch::threads(1).run(|world| {
        let (ask, told) = (ask.lock().unwrap().take().unwrap(), told.lock().unwrap().take().unwrap());
        let mut times = 0;
        fault::at("old renamed", move || {
            times += 1;
            if times <= 3 {
                ask.send(()).unwrap();
                assert_eq!(told.recv().unwrap(), Some(1));
            }
        });
        save(&world, 7)?;
        fault::at("", || {});
        let mut wrapped = model(100).data_parallel(&world, DataParallelConfig::new())?;
        open(&world, &dir)?.restore(TrainState::new(&mut wrapped))?;
        Ok(values(wrapped.local()))
    });
    assert!(run.unwrap()[0].iter().all(|value| *value == 7.0));
    reader.join().unwrap().unwrap();
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}

/// To whoever looks meanwhile it is there, and the save takes its place all the same.
#[test]
fn one_that_is_set_aside_is_there_to_others() {
    let dir = Dir::new();
    let mut command = killed::helper("checkpoint::tests::aside::replaces_what_another_reads", None);
    assert!(command.env(DIR, &dir.0).env(NO_EXCHANGE, "1").status().unwrap().success());
}

/// Of two that look at the same moment one puts it back, and both find it.
#[test]
fn what_another_has_put_back_is_there() {
    let dir = Dir::new();
    let (whole, aside) = (dir.0.join(name_of(1)), dir.0.join(".step-000000001.replaced"));
    fs::create_dir(&aside).unwrap();
    fs::write(aside.join(INDEX_CHECKSUM), "").unwrap();
    let (from, to) = (aside.clone(), whole.clone());
    fault::at("puts back", move || fs::rename(&from, &to).unwrap());
    put_back(&dir.0).unwrap();
    fault::at("", || {});
    assert!(whole.is_dir() && !aside.exists());
}
