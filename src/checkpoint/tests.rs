//! A process that is ended in the middle of a save, at every point: the checkpoint before is untouched, and the next
//! run goes on.
#![cfg(unix)]

use std::fs;
use std::path::Path;
use std::process::Command;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor};

use super::fault::{NO_EXCHANGE, POINTS, STALL, STALL_MS};
use super::{CheckpointConfig, Checkpointer, TrainState};
use crate::Error;
use crate::data_parallel::{DataParallel, DataParallelConfig};
use crate::launch::{self, Rank};
use crate::tensor_file::killed::{self, Dir, killed, two_ranks};
use crate::train::ParallelModule;

mod aside;
mod beside;
mod forbidden;
// Elsewhere it is not known whether a process of this machine has ended.
#[cfg(target_os = "linux")]
mod locks;

/// Where a rank in a process of its own saves.
const DIR: &str = "BURN_PARALLEL_TEST_CHECKPOINTS";

/// A model whose values are all the number of a step.
fn model(step: u64) -> Linear {
    struct Fill(f64);
    impl ModuleMapper for Fill {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|value| (value.zeros_like() + self.0).detach().require_grad())
        }
    }
    LinearConfig::new(5, 3).init(&Device::flex().autodiff()).map(&mut Fill(step as f64))
}

fn values(model: &Linear) -> Vec<f32> {
    struct Values(Vec<f32>);
    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.extend(param.val().into_data().iter::<f32>());
        }
    }
    let mut values = Values(Vec::new());
    model.visit(&mut values);
    values.0
}

/// Goes on from the latest checkpoint, whose values are those of its step, and saves two more. Returns the step that
/// was found.
fn two_saves(world: &Rank, dir: &Path) -> Result<Option<u64>, Error> {
    let mut wrapped = model(100).data_parallel(world, DataParallelConfig::new())?;
    let mut checkpoints = Checkpointer::new(world, dir, CheckpointConfig::new().with_keep_last(1))?;
    let found = checkpoints.restore(TrainState::new(&mut wrapped))?.map(|restored| restored.step);
    if let Some(step) = found {
        assert!(values(wrapped.local()).iter().all(|value| *value == step as f32));
    }
    for step in [found.unwrap_or(0) + 1, found.unwrap_or(0) + 2] {
        let mut wrapped = model(step).data_parallel(world, DataParallelConfig::new())?;
        checkpoints.save(step, TrainState::new(&mut wrapped))?;
    }
    Ok(found)
}

/// Run by the tests in a process of its own: a rank of two, or all of them.
#[test]
#[ignore = "a helper of the other tests"]
fn some_ranks() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let run = |rank: Rank| two_saves(&rank, Path::new(&dir)).map(|_| ());
    match std::env::var_os("RANK") {
        Some(_) => launch::from_env().unwrap().run(run).unwrap(),
        None => drop(launch::threads(2).run(run).unwrap()),
    }
}

fn helper(dir: &Dir, kill: Option<&str>) -> Command {
    let mut command = killed::helper("checkpoint::tests::some_ranks", kill);
    command.env(DIR, &dir.0);
    command
}

/// The next run finds a whole checkpoint, whatever there is, and what it leaves is clean.
fn goes_on(dir: &Dir, at: &str) -> u64 {
    let found = launch::threads(2).run(|world| two_saves(&world, &dir.0)).unwrap();
    let step = found[0].unwrap_or(0);
    assert_eq!(found[0], found[1]);
    let names: Vec<String> =
        fs::read_dir(&dir.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names, [super::directory::name_of(step + 2)], "killed at `{at}`");
    step
}

#[test]
fn all_ranks_are_killed_at_every_point() {
    for point in POINTS {
        let dir = Dir::new();
        assert!(helper(&dir, None).status().unwrap().success());
        // The first of two saves after step 2.
        assert!(killed(helper(&dir, Some(point)).spawn().unwrap()), "{point}");
        let committed = ["committed", "removing"].contains(&point);
        assert_eq!(goes_on(&dir, point), if committed { 3 } else { 2 }, "{point}");
    }
}

/// Names the step that a rank in a process of its own goes back to, and the one that it saves then.
const BACK: &str = "BURN_PARALLEL_TEST_BACK";

/// Run by the test in a process of its own: goes back, and replaces a checkpoint of the run before.
#[test]
#[ignore = "a helper of the other test"]
fn goes_back() {
    let (Some(dir), Ok(back)) = (std::env::var_os(DIR), std::env::var(BACK)) else { return };
    let (from, to) = back.split_once(' ').unwrap();
    let run = launch::threads(2).run(|world| {
        let mut wrapped = model(100).data_parallel(&world, DataParallelConfig::new())?;
        let mut checkpoints = Checkpointer::new(&world, &dir, CheckpointConfig::new())?;
        if let Ok(step) = from.parse() {
            checkpoints.restore_step(step, TrainState::new(&mut wrapped))?;
        }
        let step = to.parse().unwrap();
        // The very values that the run before had.
        let mut wrapped = model(step).data_parallel(&world, DataParallelConfig::new())?;
        checkpoints.save(step, TrainState::new(&mut wrapped)).map(drop)
    });
    run.unwrap();
}

/// From its commit on a checkpoint is the latest, and not before: also one that takes the place of that of another run,
/// and one of a lower step that nobody has gone back for.
#[test]
fn a_run_that_went_back_is_killed_at_every_point() {
    let exchanged = ["planned", "draft made", "half written", "index written", "names exchanged", "committed"];
    let renamed = ["old renamed", "new renamed"];
    let points = exchanged.map(|point| (point, false)).into_iter().chain(renamed.map(|point| (point, true)));
    for (point, renames) in points {
        let twice = ["index written", "committed"].contains(&point);
        for back in if twice { &["1", "none"][..] } else { &["1"] } {
            let dir = Dir::new();
            let save = |world: Rank| {
                let mut checkpoints = Checkpointer::new(&world, &dir.0, CheckpointConfig::new())?;
                for step in 1..4 {
                    let mut wrapped = model(step).data_parallel(&world, DataParallelConfig::new())?;
                    checkpoints.save(step, TrainState::new(&mut wrapped))?;
                }
                Ok(())
            };
            launch::threads(2).run(save).unwrap();
            let mut command = killed::helper("checkpoint::tests::goes_back", Some(point));
            command.env(DIR, &dir.0).env(BACK, format!("{back} 2"));
            if renames {
                command.env(NO_EXCHANGE, "1");
            }
            assert!(killed(command.spawn().unwrap()), "{point}");
            let committed = ["names exchanged", "new renamed", "committed"].contains(&point);
            let expected = match *back {
                _ if committed => 2,
                "1" if point != "planned" => 1,
                _ => 3,
            };
            let latest = |world: Rank| Checkpointer::new(&world, &dir.0, CheckpointConfig::new())?.latest();
            assert_eq!(launch::threads(1).run(latest).unwrap(), [Some(expected)], "{point}, back to {back}");
        }
    }
}

/// The other rank ends with an error.
#[test]
fn one_rank_is_killed_at_every_point() {
    for (rank, point) in
        [(0, "draft made"), (1, "half written"), (0, "tensors written"), (0, "index written"), (1, "planned")]
    {
        let dir = Dir::new();
        assert!(helper(&dir, None).status().unwrap().success());
        let (victim, other) = two_ranks(rank, |kill| helper(&dir, kill.then_some(point)));
        assert!(killed(victim), "{rank} {point}");
        let outcome = other.wait_with_output().unwrap();
        assert!(!outcome.status.success(), "{rank} {point}");
        assert_eq!(goes_on(&dir, point), 2, "{rank} {point}");
    }
}

/// Run by the test in a process of its own: saves onto a disk that stops to answer.
#[test]
#[ignore = "a helper of the other test"]
fn onto_a_disk_that_does_not_answer() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let began = std::time::Instant::now();
    let run = launch::threads(2).timeout(std::time::Duration::from_millis(1500)).run(|world| {
        let mut wrapped = model(1).data_parallel(&world, DataParallelConfig::new())?;
        let mut checkpoints = Checkpointer::new(&world, &dir, CheckpointConfig::new())?;
        checkpoints.save_async(1, TrainState::new(&mut wrapped))?;
        let error = checkpoints.wait().unwrap_err().to_string();
        // Neither does what comes later wait again.
        assert_eq!(checkpoints.latest().unwrap_err().to_string(), error);
        Ok(error)
    });
    let errors = run.unwrap();
    assert!(errors.iter().all(|error| error.contains("does the disk still answer?")), "{errors:?}");
    assert!(began.elapsed().as_secs() < 20);
}

#[test]
fn a_run_ends_though_the_disk_does_not_answer() {
    let dir = Dir::new();
    let mut command = killed::helper("checkpoint::tests::onto_a_disk_that_does_not_answer", None);
    command.env(DIR, &dir.0).env(STALL, "half written");
    assert!(command.status().unwrap().success());
}

/// Run by the test in a process of its own: gives up a save onto a slow disk, and saves the same step again, which is
/// under way as the disk answers the first.
#[test]
#[ignore = "a helper of the other test"]
fn onto_a_slow_disk() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let run = launch::threads(1).timeout(std::time::Duration::from_millis(100)).run(|world| {
        let mut wrapped = model(1).data_parallel(&world, DataParallelConfig::new())?;
        let mut checkpoints = Checkpointer::new(&world, &dir, CheckpointConfig::new())?;
        checkpoints.save_async(1, TrainState::new(&mut wrapped))?;
        assert!(checkpoints.wait().unwrap_err().to_string().contains("does the disk still answer?"));
        let mut wrapped = model(7).data_parallel(&world, DataParallelConfig::new())?;
        let mut again = Checkpointer::new(&world, &dir, CheckpointConfig::new())?;
        again.save(1, TrainState::new(&mut wrapped))?;
        let mut wrapped = model(100).data_parallel(&world, DataParallelConfig::new())?;
        again.restore(TrainState::new(&mut wrapped))?;
        assert!(values(wrapped.local()).iter().all(|value| *value == 7.0));
        Ok(())
    });
    run.unwrap();
    assert_eq!(fs::read_dir(dir).unwrap().count(), 1);
}

/// It neither writes into the draft of the other nor takes its place.
#[test]
fn a_save_that_was_given_up_leaves_the_next_alone() {
    let dir = Dir::new();
    let mut command = killed::helper("checkpoint::tests::onto_a_slow_disk", None);
    command.env(DIR, &dir.0).env(STALL, "half written").env(STALL_MS, "2000");
    assert!(command.status().unwrap().success());
}
