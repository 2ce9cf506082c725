//! Where the run is saved, and from where it goes on.

use std::path::{Path, PathBuf};

use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::optim::ModuleOptimizer;
use burn_parallel::prelude::*;
use burn_parallel::train::Parallel;
use serde::{Deserialize, Serialize};

use crate::args::Args;
use crate::common::batch::Batch;
use crate::common::resume::run_names;
use crate::common::saving::{RUN, STEPS, other_model};
use crate::gpt::Gpt;
use crate::text::Text;

/// The flags of a run that its checkpoints hold.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedFlags {
    layers: usize,
    d_model: usize,
    heads: usize,
    seq: usize,
    batch: usize,
    seed: u64,
    lr: f64,
    clip: Option<f64>,
    /// Which text it was; checkpoints from before lack it.
    #[serde(default)]
    text: Option<String>,
}

impl SavedFlags {
    pub fn of(args: &Args, text: &Text) -> Self {
        let Args { layers, d_model, heads, seq, batch, seed, lr, clip, .. } = *args;
        Self { layers, d_model, heads, seq, batch, seed, lr, clip, text: Some(text.fingerprint()) }
    }

    /// Demands the same model as `now`. Returns lines about what else is not as it was.
    fn compare(&self, now: &Self, args: &Args) -> Result<Vec<String>, Error> {
        let model = [
            ("layers", self.layers, now.layers),
            ("d-model", self.d_model, now.d_model),
            ("heads", self.heads, now.heads),
            ("seq", self.seq, now.seq),
        ];
        let changed = model.into_iter().filter(|(_, was, is)| was != is);
        let changed: Vec<_> =
            changed.map(|(flag, was, is)| (format!("--{flag} {is}"), format!("with --{flag} {was}"))).collect();
        let dir = args.saving.resume.as_deref().unwrap_or(Path::new(""));
        if let Some(other) = other_model(dir, &changed) {
            return Err(Error::User(other));
        }
        let clip = |clip: Option<f64>| clip.map_or("none".into(), |norm| norm.to_string());
        let others = [
            ("batch", self.batch.to_string(), now.batch.to_string()),
            ("seed", self.seed.to_string(), now.seed.to_string()),
            ("lr", self.lr.to_string(), now.lr.to_string()),
            ("clip", clip(self.clip), clip(now.clip)),
        ];
        let changed = others.into_iter().filter(|(_, was, is)| was != is);
        let changed = changed.map(|(flag, was, is)| format!("--{flag} is {is} from here on, and was {was}"));
        let other_text = self.text.is_some() && self.text != now.text;
        Ok(changed.chain(other_text.then(|| "--text is another from here on than it was".into())).collect())
    }
}

/// What a run is made of that a checkpoint holds.
pub struct Run {
    pub model: Parallel<Gpt>,
    pub optim: ModuleOptimizer,
    pub schedule: ModuleLrScheduler,
    /// The flags that a run goes on with.
    pub flags: SavedFlags,
    /// The loss of every step so far, and the norm of its gradient if they are clipped.
    pub losses: Vec<f64>,
    pub grad_norms: Vec<f64>,
    /// How large the batch is, and how noisy the gradient.
    pub batch: Batch,
    /// How many steps the whole run has.
    pub steps: usize,
    /// By what launchers know it.
    pub run: Vec<String>,
}

impl Run {
    fn state(&mut self) -> TrainState<'_, Parallel<Gpt>> {
        TrainState::new(&mut self.model)
            .with_optimizer("adamw", &mut self.optim)
            .with_scheduler("lr", &mut self.schedule)
            .with_value("flags", &mut self.flags)
            .with_value("losses", &mut self.losses)
            .with_value("grad_norms", &mut self.grad_norms)
            .with_value("batch", &mut self.batch)
            .with_value(STEPS, &mut self.steps)
            .with_value(RUN, &mut self.run)
    }

    /// Goes on from a checkpoint of `--resume`. Returns how many steps were made already, and the checkpoints if it
    /// saves there.
    pub fn resume(&mut self, world: &Communicator, args: &Args) -> Result<(usize, Option<Checkpointer>), Error> {
        let now = self.flags.clone();
        args.saving.resume(world, folder, (&args.strategy, args.steps), |checkpoints, step| {
            let saved = checkpoints.read_value::<SavedFlags>(step, "flags")?;
            let changed = saved.map_or(Ok(Vec::new()), |saved| saved.compare(&now, args))?;
            if world.rank() == 0 {
                changed.iter().for_each(|flag| eprintln!("{flag}"));
            }
            checkpoints.restore_step(step, self.state())?;
            (self.flags, self.steps, self.run) = (now.clone(), args.steps, run_names());
            Ok(())
        })
    }

    /// Saves the run in the background after this many steps.
    pub fn save(&mut self, steps: usize, checkpoints: &mut Checkpointer) -> Result<(), Error> {
        checkpoints.save_async(steps as u64, self.state())
    }
}

/// Where the checkpoints are in a directory: at the top.
pub fn folder(dir: &Path) -> PathBuf {
    dir.into()
}
