//! Directories that somebody may not list, change or write to. Root may do anything: so in a process of nobody.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{DIR, model, values};
use crate::Error;
use crate::checkpoint::directory::name_of;
use crate::checkpoint::fault::NO_EXCHANGE;
use crate::checkpoint::index::INDEX_CHECKSUM;
use crate::checkpoint::{CheckpointConfig, Checkpointer, TrainState, saved_steps};
use crate::data_parallel::{DataParallel, DataParallelConfig};
use crate::launch::{self, Rank};
use crate::tensor_file::killed::{self, Dir};
use crate::train::ParallelModule;

fn allow(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn open(world: &Rank, dir: &Path) -> Result<Checkpointer, Error> {
    Checkpointer::new(world, dir, CheckpointConfig::new().with_keep_last(1))
}

fn save(world: &Rank, checkpoints: &mut Checkpointer, step: u64, value: u64) -> Result<(), Error> {
    let mut wrapped = model(value).data_parallel(world, DataParallelConfig::new())?;
    checkpoints.save(step, TrainState::new(&mut wrapped)).map(drop)
}

fn alone(run: impl Fn(&Rank) -> Result<(), Error> + Send + Sync) {
    launch::threads(1).run(|world| run(&world)).unwrap();
}

fn hidden(dir: &Path, step: u64, what: &str) -> PathBuf {
    dir.join(format!(".{}.{what}", name_of(step)))
}

/// What was replaced and cannot be removed is not there again when the one in its place is removed.
fn replaced_ones_do_not_come_back(dir: &Path) {
    alone(|world| {
        let mut checkpoints = open(world, dir)?;
        save(world, &mut checkpoints, 1, 1)?;
        allow(&dir.join(name_of(1)), 0o555);
        save(world, &mut checkpoints, 1, 7)?;
        assert!(!hidden(dir, 1, "replaced").exists());
        assert_eq!(checkpoints.steps()?, [1]);
        save(world, &mut checkpoints, 2, 2)?;
        assert_eq!(checkpoints.steps()?, [2]);
        // One of which a killed save has left both.
        let replaced = hidden(dir, 2, "replaced");
        fs::create_dir(&replaced).unwrap();
        fs::write(replaced.join(INDEX_CHECKSUM), "").unwrap();
        allow(&replaced, 0o555);
        save(world, &mut checkpoints, 3, 3)?;
        assert_eq!(checkpoints.steps()?, [3]);
        Ok(())
    });
}

/// Nobody knows what is in it.
fn what_cannot_be_listed_stays(dir: &Path) {
    alone(|world| {
        let mut checkpoints = open(world, dir)?;
        save(world, &mut checkpoints, 1, 1)?;
        allow(&dir.join(name_of(1)), 0o311);
        save(world, &mut checkpoints, 2, 2)?;
        assert_eq!(checkpoints.steps()?, [1, 2]);
        let refused = save(world, &mut checkpoints, 1, 7).unwrap_err().to_string();
        assert!(
            refused.contains("step-000000001: is in the place of") && refused.contains("cannot be listed"),
            "{refused}"
        );
        Ok(())
    });
}

/// One that is set aside stays so, and the others are read; but nobody takes another for the latest.
fn readers_need_not_write(dir: &Path) {
    alone(|world| {
        save(world, &mut open(world, dir)?, 1, 1)?;
        fs::create_dir(hidden(dir, 2, "replaced")).unwrap();
        fs::write(hidden(dir, 2, "replaced").join(INDEX_CHECKSUM), "").unwrap();
        allow(dir, 0o555);
        let mut checkpoints = open(world, dir)?;
        assert_eq!(checkpoints.steps()?, [1]);
        let mut wrapped = model(100).data_parallel(world, DataParallelConfig::new())?;
        let restored = checkpoints.restore(TrainState::new(&mut wrapped)).map(drop);
        for refused in [restored, checkpoints.latest().map(drop)] {
            let said = refused.unwrap_err().to_string();
            assert!(said.contains(".step-000000002.replaced") && said.contains("another step by its number"), "{said}");
        }
        checkpoints.restore_step(1, TrainState::new(&mut wrapped))?;
        assert!(values(wrapped.local()).iter().all(|value| *value == 1.0));
        assert_eq!(saved_steps(dir)?, [1, 2]);
        allow(dir, 0o755);
        Ok(())
    });
}

/// What a rank may not look into may be the latest.
fn what_cannot_be_looked_into_is_not_passed_over(dir: &Path) {
    alone(|world| {
        let mut checkpoints = Checkpointer::new(world, dir, CheckpointConfig::new().with_keep_last(2))?;
        save(world, &mut checkpoints, 1, 1)?;
        save(world, &mut checkpoints, 2, 2)?;
        allow(&dir.join(name_of(2)), 0);
        assert_eq!((checkpoints.latest()?, checkpoints.steps()?, saved_steps(dir)?), (Some(2), vec![1, 2], vec![1, 2]));
        let mut wrapped = model(100).data_parallel(world, DataParallelConfig::new())?;
        let said = checkpoints.restore(TrainState::new(&mut wrapped)).unwrap_err().to_string();
        assert!(said.contains("step-000000002") && said.contains("Permission denied"), "{said}");
        checkpoints.restore_step(1, TrainState::new(&mut wrapped))?;
        // Nor is it removed or replaced.
        let said = save(world, &mut checkpoints, 2, 7).unwrap_err().to_string();
        assert!(said.contains("step-000000002") && said.contains("cannot be listed"), "{said}");
        allow(&dir.join(name_of(2)), 0o755);
        assert_eq!(checkpoints.restore(TrainState::new(&mut wrapped))?.map(|restored| restored.step), Some(2));
        Ok(())
    });
}

/// Run by the test in a process of its own.
#[test]
#[ignore = "a helper of the other test"]
fn as_nobody() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    // SAFETY: no memory is involved.
    unsafe {
        if libc::getuid() == 0 {
            assert_eq!(libc::seteuid(65_534), 0);
        }
    }
    let cases: [fn(&Path); 4] = [
        replaced_ones_do_not_come_back,
        what_cannot_be_listed_stays,
        readers_need_not_write,
        what_cannot_be_looked_into_is_not_passed_over,
    ];
    for (number, case) in cases.into_iter().enumerate() {
        case(&Path::new(&dir).join(number.to_string()));
    }
}

#[test]
fn what_may_not_be_touched_is_in_nobodys_way() {
    let dir = Dir::new();
    allow(&dir.0, 0o777);
    let mut command = killed::helper("checkpoint::tests::forbidden::as_nobody", None);
    let output = command.env(DIR, &dir.0).env(NO_EXCHANGE, "1").stderr(std::process::Stdio::piped()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
