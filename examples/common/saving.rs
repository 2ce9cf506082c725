//! Where a run is saved, and when.

use std::path::{Path, PathBuf};
use std::{fs, io, process};

use burn_parallel::checkpoint::saved_steps;
use burn_parallel::launch::{StopSignal, StopSignals};
use burn_parallel::prelude::*;
use clap::Args;

use super::flags::up_to;
use super::program::{NAME, refused};
use super::resume::taken;

/// Where checkpoints are.
#[derive(Args, Clone, Debug)]
pub struct SaveFlags {
    /// A directory for checkpoints, made if it is not there: one every --save-every steps, and one at the end
    #[arg(long, value_name = "DIR")]
    pub save: Option<PathBuf>,

    /// After how many steps each checkpoint is saved [default: at the end alone]
    #[arg(long, value_name = "N", requires = "save", value_parser = up_to::<1_000_000_000>)]
    save_every: Option<usize>,

    /// How many checkpoints are kept: the last ones
    #[arg(long, value_name = "K", requires = "save", default_value_t = 3, value_parser = up_to::<1_000_000>)]
    keep: usize,

    /// A directory of checkpoints, to go on from the one that was written last: with any flags that do not change the
    /// model. --steps counts the whole run. If it is the directory of --save, and there is none yet, the run begins
    /// anew
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,

    /// Which checkpoint of --resume to go on from, by its step [default: the one that was written last]
    #[arg(long, value_name = "N", requires = "resume")]
    pub resume_step: Option<u64>,
}

/// Whether there are checkpoints in a directory.
pub fn has_checkpoints(dir: &Path) -> bool {
    saved_steps(dir).is_ok_and(|steps| !steps.is_empty())
}

/// Finds out before the training, not after it, that nothing can be saved in a directory; what is made for that is
/// taken away.
pub(super) fn writable(dir: &Path) -> Result<(), String> {
    if dir.exists() && !dir.is_dir() {
        return Err(format!("--save {}: it is not a directory", dir.display()));
    }
    let made: Vec<&Path> = dir.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists()).collect();
    let trial = dir.join(format!(".trial-{}", process::id()));
    let write = || fs::create_dir_all(dir).and_then(|()| fs::write(&trial, "")).and_then(|()| fs::remove_file(&trial));
    // Other ranks find it out as well, and take away what they have made.
    let gone = |written: &io::Result<()>| matches!(written, Err(why) if why.kind() == io::ErrorKind::NotFound);
    let written = (0..100).map(|_| write()).find(|written| !gone(written)).unwrap_or_else(write);
    made.iter().for_each(|dir| drop(fs::remove_dir(dir)));
    written.map_err(|why| format!("--save {}: {why}", dir.display()))
}

impl SaveFlags {
    /// The same, with nothing saved and nothing to go on from.
    pub fn none(self) -> Self {
        Self { save: None, resume: None, resume_step: None, ..self }
    }

    /// Opens a directory of checkpoints, which are in `folder` of it.
    pub(super) fn open(
        &self,
        dir: &Path,
        world: &Communicator,
        folder: fn(&Path) -> PathBuf,
        strategy: &Strategy,
    ) -> Result<Checkpointer, Error> {
        // What other runs have not saved may be missing.
        let missing = [STEPS, MADE_OF, RUN].map(|name| format!("values/{name}"));
        let config = CheckpointConfig::new().with_allow_missing(missing).with_keep_last(self.keep);
        Checkpointer::new(world, folder(dir), config.with_strategy(strategy))
    }
}

/// What makes another model, in one line: what a run has now and had before, each with the flag.
pub fn other_model(dir: &Path, changed: &[(String, String)]) -> Option<String> {
    let all = |side: fn(&(String, String)) -> &str| changed.iter().map(side).collect::<Vec<_>>().join(" and ");
    let (now, before) = (all(|(now, _)| now), all(|(_, before)| before));
    let make = if changed.len() == 1 { "makes" } else { "make" };
    let said = format!("{now} {make} another model than --resume {}, which was saved {before}", dir.display());
    (!changed.is_empty()).then_some(said)
}

/// The value of a checkpoint that says how many steps the whole run has.
pub const STEPS: &str = "steps";

/// The value of a checkpoint that says what the model is made of.
pub const MADE_OF: &str = "made_of";

/// The value of a checkpoint that says by what launchers know the run that saved it.
pub const RUN: &str = "run";

/// Saves a run of so many steps when it is time, and when it is asked to end.
pub struct Saving<'a> {
    flags: &'a SaveFlags,
    all: usize,
    speaks: bool,
    checkpoints: Option<Checkpointer>,
    /// Without checkpoints there is nothing to be done before the end.
    signals: Option<StopSignals>,
}

impl<'a> Saving<'a> {
    /// Begins. The checkpoints are in `folder` of `--save`; `opened` if the run goes on from there: those of another
    /// are left alone. Collective.
    pub fn begin(
        flags: &'a SaveFlags,
        world: &Communicator,
        folder: fn(&Path) -> PathBuf,
        (strategy, all): (&Strategy, usize),
        opened: Option<Checkpointer>,
    ) -> Result<Self, Error> {
        let checkpoints = match (opened, &flags.save) {
            (None, Some(dir)) => {
                let mut checkpoints = flags.open(dir, world, folder, strategy)?;
                if !checkpoints.steps()?.is_empty() {
                    return Err(refused(Error::user(taken(dir))));
                }
                Some(checkpoints)
            }
            (opened, _) => opened,
        };
        let signals = checkpoints.is_some().then(|| StopSignals::listen(world)).transpose()?;
        Ok(Self { flags, all, speaks: world.rank() == 0, checkpoints, signals })
    }

    /// After this many steps: has `save` save the run, in the background, if it is time. Returns the signal by which
    /// the run was asked to end, when that is saved on the disk. Collective.
    pub fn after_step(
        &mut self,
        steps: usize,
        save: impl FnOnce(&mut Checkpointer) -> Result<(), Error>,
    ) -> Result<Option<StopSignal>, Error> {
        let asked = self.signals.as_mut().map_or(Ok(None), StopSignals::asked)?;
        let Some(checkpoints) = &mut self.checkpoints else { return Ok(None) };
        let due = self.flags.save_every.is_some_and(|every| steps.is_multiple_of(every));
        if due || steps == self.all || asked.is_some() {
            save(checkpoints)?;
        }
        // At the last step the run ends by itself.
        let Some(signal) = asked.filter(|_| steps < self.all) else { return Ok(None) };
        checkpoints.wait()?;
        if let (true, Some(dir)) = (self.speaks, &self.flags.save) {
            let all = self.all;
            eprintln!(
                "{NAME}: {signal} ends the run after step {steps} of {all}; it is saved, --resume {dir:?} goes on"
            );
        }
        Ok(Some(signal))
    }

    /// Ends when all is on the disk.
    pub fn end(self) -> Result<(), Error> {
        self.checkpoints.map_or(Ok(()), |mut checkpoints| checkpoints.wait().map(drop))
    }
}
