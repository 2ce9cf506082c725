//! Where the run is saved, and from where it goes on.

use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::optim::ModuleOptimizer;
use burn_parallel::checkpoint::DataPosition;
use burn_parallel::prelude::*;
use burn_parallel::train::Parallel;

use crate::args::Args;
use crate::input::Input;
use crate::model::Llama;
use crate::report::HeldOut;

/// What a run is made of that a checkpoint holds.
pub struct Run {
    pub model: Parallel<Llama>,
    pub optim: ModuleOptimizer,
    pub schedule: ModuleLrScheduler,
    /// The loss of every step so far, and the norm of its gradient.
    pub losses: Vec<f64>,
    pub grad_norms: Vec<f64>,
    pub held_out: Vec<HeldOut>,
    /// Which row comes next.
    position: DataPosition,
    /// The rows that it is counted in.
    data: u64,
}

impl Run {
    /// A run that begins.
    pub fn new(model: Parallel<Llama>, optim: ModuleOptimizer, schedule: ModuleLrScheduler, input: &Input) -> Self {
        let (losses, grad_norms, held_out) = (Vec::new(), Vec::new(), Vec::new());
        let (position, data) = (DataPosition::default(), input.data.fingerprint());
        Self { model, optim, schedule, losses, grad_norms, held_out, position, data }
    }

    /// The number of the next row, through all epochs.
    pub fn position(&self, input: &Input) -> u64 {
        self.position.epoch as u64 * input.data.rows() + self.position.items as u64
    }

    /// Goes on with row `next`.
    pub fn advance(&mut self, next: u64, input: &Input) {
        let rows = input.data.rows();
        self.position = DataPosition { epoch: (next / rows) as usize, items: (next % rows) as usize };
    }

    fn state(&mut self) -> TrainState<'_, Parallel<Llama>> {
        TrainState::new(&mut self.model)
            .with_optimizer("adamw", &mut self.optim)
            .with_scheduler("lr", &mut self.schedule)
            .with_value("losses", &mut self.losses)
            .with_value("grad_norms", &mut self.grad_norms)
            .with_value("held_out", &mut self.held_out)
            .with_value("position", &mut self.position)
            .with_value("data", &mut self.data)
    }

    /// Goes on from the last checkpoint of `--resume`. Returns how many steps were made already.
    pub fn resume(&mut self, world: &Communicator, args: &Args, input: &Input) -> Result<usize, Error> {
        let Some(dir) = &args.resume else { return Ok(0) };
        let mut checkpoints = Checkpointer::new(world, dir.join("checkpoints"), CheckpointOptions::new())?;
        let steps = match checkpoints.restore(self.state())? {
            Some(restored) => restored.step as usize,
            None if args.save.as_ref() == Some(dir) => return Ok(0),
            None => return Err(Error::user(format!("--resume {}: there is no checkpoint", dir.display()))),
        };
        if self.data != input.data.fingerprint() {
            let problem = "the run was on other rows: it had another --data, --seq, --seed or tokenizer";
            return Err(Error::user(format!("--resume {}: {problem}", dir.display())));
        }
        if world.rank() == 0 {
            eprintln!("goes on after step {steps} of {}", input.steps(args));
        }
        Ok(steps)
    }

    /// Saves the run in the background after this many steps, if it is to be saved.
    pub fn save(&mut self, steps: usize, checkpoints: &mut Option<Checkpointer>) -> Result<(), Error> {
        match checkpoints {
            Some(checkpoints) => checkpoints.save_async(steps as u64, self.state()),
            None => Ok(()),
        }
    }
}

/// What keeps the checkpoints of `--save`.
pub fn checkpointer(world: &Communicator, args: &Args) -> Result<Option<Checkpointer>, Error> {
    let options = || CheckpointOptions::new().with_keep_last(args.keep).with_strategy(&args.strategy);
    args.save.as_ref().map(|dir| Checkpointer::new(world, dir.join("checkpoints"), options())).transpose()
}
