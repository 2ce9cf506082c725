//! Where the run is saved, and from where it goes on.

use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::optim::ModuleOptimizer;
use burn_parallel::prelude::*;
use burn_parallel::train::Parallel;

use crate::args::Args;
use crate::batch::Batch;
use crate::gpt::Gpt;

/// What a run is made of that a checkpoint holds.
pub struct Run {
    pub model: Parallel<Gpt>,
    pub optim: ModuleOptimizer,
    pub schedule: ModuleLrScheduler,
    /// The loss of every step so far, and the norm of its gradient if they are clipped.
    pub losses: Vec<f64>,
    pub grad_norms: Vec<f64>,
    /// How large the batch is, and how noisy the gradient.
    pub batch: Batch,
}

impl Run {
    fn state(&mut self) -> TrainState<'_, Parallel<Gpt>> {
        TrainState::new(&mut self.model)
            .with_optimizer("adamw", &mut self.optim)
            .with_scheduler("lr", &mut self.schedule)
            .with_value("losses", &mut self.losses)
            .with_value("grad_norms", &mut self.grad_norms)
            .with_value("batch", &mut self.batch)
    }

    /// Goes on from the last checkpoint of `--resume`. Returns how many steps were made already.
    pub fn resume(&mut self, world: &Communicator, args: &Args) -> Result<usize, Error> {
        let Some(dir) = &args.resume else { return Ok(0) };
        let mut checkpoints = Checkpointer::new(world, dir, CheckpointOptions::new())?;
        let steps = match checkpoints.restore(self.state())? {
            Some(restored) => restored.step as usize,
            None if args.save.as_ref() == Some(dir) => 0,
            None => return Err(Error::user(format!("--resume {dir:?}: there is no checkpoint"))),
        };
        if world.rank() == 0 {
            eprintln!("goes on after step {steps} of {}", args.steps);
        }
        Ok(steps)
    }

    /// Saves the run in the background after this many steps, if it is time.
    pub fn save(&mut self, steps: usize, checkpoints: &mut Option<Checkpointer>, args: &Args) -> Result<(), Error> {
        let Some(checkpoints) = checkpoints else { return Ok(()) };
        if steps == args.steps || args.save_every.is_some_and(|every| steps.is_multiple_of(every)) {
            checkpoints.save_async(steps as u64, self.state())?;
        }
        Ok(())
    }
}

/// What keeps the checkpoints of `--save`.
pub fn checkpointer(world: &Communicator, args: &Args) -> Result<Option<Checkpointer>, Error> {
    let options = || CheckpointOptions::new().with_keep_last(args.keep).with_strategy(&args.strategy);
    args.save.as_ref().map(|dir| Checkpointer::new(world, dir, options())).transpose()
}
