//! Runs beside each other in one directory: one removes what the other reads.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;

use burn::nn::Linear;

use super::{model, values};
use crate::Error;
use crate::checkpoint::fault;
use crate::checkpoint::{CheckpointConfig, Checkpointer, Restored, TrainState};
use crate::data_parallel::{DataParallel, DataParallelConfig, Eager, Replica};
use crate::launch;
use crate::tensor_file::killed::Dir;
use crate::train::ParallelModule;

/// Saves a step as another run does, which keeps no other. The first has a number beside its values.
fn another_saves(dir: &Path, step: u64, value: u64) {
    let run = launch::threads(1).run(|world| {
        let mut checkpoints = Checkpointer::new(&world, dir, CheckpointConfig::new().with_keep_last(1))?;
        let (mut wrapped, mut number) = (model(value).data_parallel(&world, DataParallelConfig::new())?, value);
        let state = TrainState::new(&mut wrapped);
        checkpoints.save(step, if step == 1 { state.with_value("number", &mut number) } else { state })
    });
    run.unwrap();
}

type Restore = fn(&mut Checkpointer, TrainState<'_, Replica<Eager<Linear>>>) -> Result<Option<Restored>, Error>;

/// Ranks restore while another run saves these steps, each with a value, whenever one of them has read an index.
/// Returns what they say, and how often that was.
fn restored_beside(
    dir: &Path,
    saves: &'static [(u64, u64)],
    restore: Restore,
) -> (Result<(u64, f32, u64), String>, usize) {
    let run = launch::threads(2).run(|world| {
        let done = Rc::new(Cell::new(0));
        if world.rank() == 1 {
            let (dir, done) = (dir.to_owned(), done.clone());
            fault::at("index read", move || {
                let Some((step, value)) = saves.get(done.get()) else { return };
                std::thread::scope(|scope| scope.spawn(|| another_saves(&dir, *step, *value)).join()).unwrap();
                done.set(done.get() + 1);
            });
        }
        let mut wrapped = model(100).data_parallel(&world, DataParallelConfig::new())?;
        let config = CheckpointConfig::new().with_allow_missing(["values/number"]);
        let (mut checkpoints, mut number) = (Checkpointer::new(&world, dir, config)?, 100);
        let restored = restore(&mut checkpoints, TrainState::new(&mut wrapped).with_value("number", &mut number));
        let values = values(wrapped.local());
        assert!(values.iter().all(|value| *value == values[0]));
        let said = restored.map(|restored| (restored.unwrap().step, values[0], number)).map_err(|why| why.to_string());
        assert!(said.is_ok() || values[0] == 100.0);
        Ok((said, done.get()))
    });
    let mut ran = run.unwrap();
    assert_eq!(ran[0].0, ran[1].0);
    ran.swap_remove(1)
}

/// Its place is taken by the next one, though a rank has read what the other has not; it is not said to be damaged.
#[test]
fn a_checkpoint_that_is_removed_while_it_is_read_is_followed_by_the_latest() {
    let dir = Dir::new();
    another_saves(&dir.0, 1, 1);
    let latest: Restore = |checkpoints, state| checkpoints.restore(state);
    assert_eq!(restored_beside(&dir.0, &[(2, 2)], latest), (Ok((2, 2.0, 100)), 1));
    assert_eq!(restored_beside(&dir.0, &[(3, 3), (4, 4), (5, 5)], latest), (Ok((5, 5.0, 100)), 3));
    // The same step again, with other values.
    assert_eq!(restored_beside(&dir.0, &[(5, 6)], latest), (Ok((5, 6.0, 100)), 1));
    // There is an end to it.
    let (said, tries) = restored_beside(&dir.0, &[(7, 7), (8, 8), (9, 9), (10, 10), (11, 11), (12, 12)], latest);
    let said = said.unwrap_err();
    assert!(said.contains("removed or replaced while it was read") && said.contains("step-000000010"), "{said}");
    assert_eq!(tries, 5);
    // One that was asked for is the only one that will do.
    let of_step: Restore = |checkpoints, state| checkpoints.restore_step(11, state).map(Some);
    let (said, tries) = restored_beside(&dir.0, &[(12, 12)], of_step);
    assert!(said.unwrap_err().contains("removed or replaced while it was read") && tries == 1);
    // One that never was is not said to be removed.
    let of_none: Restore = |checkpoints, state| checkpoints.restore_step(12345, state).map(Some);
    let said = restored_beside(&dir.0, &[], of_none).0.unwrap_err();
    assert!(said.contains("is no checkpoint that can be read") && !said.contains("removed"), "{said}");
    assert!(said.contains("checkpoint.json: cannot be read: No such file"), "{said}");
}
