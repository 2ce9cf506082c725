//! What is saved of a run, and from where it goes on.

use std::path::{Path, PathBuf};

use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::optim::ModuleOptimizer;
use burn_parallel::checkpoint::DataPosition;
use burn_parallel::prelude::*;
use burn_parallel::train::Parallel;

use crate::args::Args;
use crate::base::MadeOf;
use crate::common::batch::Batch;
use crate::common::resume::run_names;
use crate::common::saving::{MADE_OF, RUN, STEPS};
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
    /// How large the batch is, and how noisy the gradient.
    pub batch: Batch,
    /// Which row comes next.
    position: DataPosition,
    /// The rows that it is counted in.
    data: u64,
    made_of: MadeOf,
    /// How many steps the whole run has.
    steps: usize,
    /// By what launchers know it.
    run: Vec<String>,
}

impl Run {
    /// A run that begins.
    pub fn new(
        model: Parallel<Llama>,
        optim: ModuleOptimizer,
        schedule: ModuleLrScheduler,
        args: &Args,
        input: &Input,
    ) -> Self {
        let (steps, made_of) = (input.steps(args), MadeOf::of(args, input));
        let (losses, grad_norms, held_out) = (Vec::new(), Vec::new(), Vec::new());
        let (batch, position, data) = (Batch::default(), DataPosition::default(), input.data.fingerprint());
        let run = run_names();
        Self { model, optim, schedule, losses, grad_norms, held_out, batch, position, data, made_of, steps, run }
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
            .with_value("batch", &mut self.batch)
            .with_value("position", &mut self.position)
            .with_value("data", &mut self.data)
            .with_value(MADE_OF, &mut self.made_of)
            .with_value(STEPS, &mut self.steps)
            .with_value(RUN, &mut self.run)
    }

    /// Goes on from a checkpoint of `--resume`. Returns how many steps were made already, and the checkpoints if it
    /// saves there.
    pub fn resume(
        &mut self,
        world: &Communicator,
        args: &Args,
        input: &Input,
    ) -> Result<(usize, Option<Checkpointer>), Error> {
        let (data, made_of) = (self.data, self.made_of.clone());
        let begun = args.saving.resume(world, folder, (&args.strategy, input.steps(args)), |checkpoints, step| {
            let dir = args.saving.resume.as_deref().unwrap_or(Path::new(""));
            let was = checkpoints.read_value::<MadeOf>(step, MADE_OF)?;
            let mut changed = was.map_or(Vec::new(), |was| made_of.compare(&was, dir));
            if checkpoints.read_value::<u64>(step, "data")?.is_some_and(|was| was != data) {
                let problem = "the run was on other rows: it had another --data, --seq, --seed or tokenizer";
                changed.push(format!("--resume {}: {problem}", dir.display()));
            }
            if !changed.is_empty() {
                return Err(Error::User(changed.join("; ")));
            }
            checkpoints.restore_step(step, self.state()).map(drop)
        })?;
        // Where the model is now.
        self.made_of = made_of;
        (self.steps, self.run) = (input.steps(args), run_names());
        self.batch = self.batch.clone().begin(args.batch(), args.growth, input.steps(args))?;
        Ok(begun)
    }

    /// Saves the run in the background after this many steps.
    pub fn save(&mut self, steps: usize, checkpoints: &mut Checkpointer) -> Result<(), Error> {
        checkpoints.save_async(steps as u64, self.state())
    }
}

/// Where the checkpoints are in a directory.
pub fn folder(dir: &Path) -> PathBuf {
    dir.join("checkpoints")
}
