//! Ranks that have not made their last update alike, which nothing else than a save would notice.

use burn_parallel::checkpoint::{CheckpointConfig, Checkpointer, TrainState};
use burn_parallel::prelude::*;
use burn_parallel::train::Parallel;

use crate::Dir;
use crate::common::checkpointing::own_by;
use crate::common::failing::{LONG, says};
use crate::common::reference::optimizer;
use crate::net::{Axes, Net, batch};

const STEPS: u64 = 4;

/// What the last rank does with its last step before its update, for which it gives a learning rate.
type Last = fn(&Parallel<Net>, Step) -> Result<(Step, f64), Error>;

const RATE: f64 = 0.05;

fn clips(model: &Parallel<Net>, step: Step) -> Result<(Step, f64), Error> {
    Ok((step.clip_grad_norm(model, 1.0)?, RATE))
}

/// Trains, saves before the last step and after it, and gives the error of the last save.
fn save(axes: Axes, last: Last, in_background: bool) -> Result<(), Error> {
    let (net, dir) = (Net::new(), Dir::fresh());
    let ran = launch::threads(axes.ranks()).timeout(LONG).run(|world| {
        let mut model = own_by(&net, &axes.strategy()).parallelize(&world, &axes.strategy())?;
        let (mut optim, (replica, replicas)) = (optimizer(), model.replica());
        let mut checkpoints = Checkpointer::new(&world, dir.path(), CheckpointConfig::new())?;
        for number in 0..STEPS {
            let is_last = (number, world.rank()) == (STEPS - 1, axes.ranks() - 1);
            let step = model.step(batch(number, replicas, replica), Net::loss)?;
            let (step, rate) = if is_last { last(&model, step)? } else { clips(&model, step)? };
            model = model.optimize(&mut optim, rate, step)?;
            if number >= STEPS - 2 {
                let state = TrainState::new(&mut model).with_optimizer("adamw", &mut optim);
                match in_background {
                    true => checkpoints.save_async(number, state)?,
                    false => drop(checkpoints.save(number, state)?),
                }
            }
        }
        checkpoints.wait().map(drop)
    });
    ran.map(drop)
}

#[test]
fn a_save_tells_what_ranks_have_not_done_alike_in_their_last_update() {
    let plain = Axes::new(2, 1, 1);
    for (axes, in_background) in [
        (plain, false),
        (plain.sharded(Sharding::Optimizer), true),
        (plain.sharded(Sharding::Parameters), false),
        (Axes::new(1, 1, 2), false),
        (Axes::new(1, 2, 1), false),
        (Axes::new(2, 1, 2).sharded(Sharding::Gradients), false),
    ] {
        save(axes, clips, in_background).unwrap();
        let error = save(axes, |model, step| Ok((clips(model, step)?.0, 2.0 * RATE)), in_background).unwrap_err();
        assert!(matches!(error, Error::Optimizer { .. }), "{axes:?}: {error}");
        says(&error, &["update number 4", "different learning rates"]);
    }
    // The norm came with the step, or is measured by each replica.
    for axes in [plain, plain.sharded(Sharding::Optimizer), plain.sharded(Sharding::Parameters)] {
        let error = save(axes, |_, step| Ok((step, RATE)), false).unwrap_err();
        assert!(matches!(error, Error::Optimizer { .. }), "{axes:?}: {error}");
        says(&error, &["update number 4", "not at all on rank 1"]);
    }
}
