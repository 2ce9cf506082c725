//! Where a run is saved and goes on, and when.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use burn_parallel::launch::{ProcessInfo, StopSignal, StopSignals};
use burn_parallel::prelude::*;
use clap::Args;

use super::flags::up_to;
use super::program::{NAME, refused};

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
    let is_one = |name: &OsStr| name.to_string_lossy().starts_with("step-");
    fs::read_dir(dir).is_ok_and(|mut found| found.any(|it| it.is_ok_and(|it| is_one(&it.file_name()))))
}

fn started_again() -> bool {
    ProcessInfo::from_env().is_ok_and(|process| process.restarts > 0)
}

/// Whether two paths are of one directory.
fn same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}

impl SaveFlags {
    /// Whether what is to be saved comes among checkpoints of another run, which are in `folder` of `--save`.
    pub fn check(&self, folder: fn(&Path) -> PathBuf) -> Result<(), String> {
        match &self.save {
            Some(dir) if self.resumed(folder).is_none_or(|from| !same(from, dir)) && has_checkpoints(&folder(dir)) => {
                Err(format!(
                    "--save {0}: there are checkpoints already: give --resume {0} too, or another directory",
                    dir.display()
                ))
            }
            _ => Ok(()),
        }
    }

    /// The directory to go on from: that of `--resume`, but for ranks that are started again that of `--save`, once
    /// there is a checkpoint.
    fn resumed(&self, folder: fn(&Path) -> PathBuf) -> Option<&PathBuf> {
        let again = self.save.as_ref().filter(|dir| started_again() && has_checkpoints(&folder(dir)));
        again.or(self.resume.as_ref())
    }

    /// The same, with nothing saved and nothing to go on from.
    pub fn none(self) -> Self {
        Self { save: None, resume: None, resume_step: None, ..self }
    }

    /// Opens a directory of checkpoints, which are in `folder` of it.
    fn open(
        &self,
        dir: &Path,
        world: &Communicator,
        folder: fn(&Path) -> PathBuf,
        strategy: &Strategy,
    ) -> Result<Checkpointer, Error> {
        // What other runs have not saved may be missing.
        let missing = [STEPS, MADE_OF, WENT_BACK].map(|name| format!("values/{name}"));
        let options = CheckpointOptions::new().with_allow_missing(missing).with_keep_last(self.keep);
        Checkpointer::new(world, folder(dir), options.with_strategy(strategy))
    }

    /// The step to go on from, if there is a checkpoint.
    fn step(&self, checkpoints: &mut Checkpointer) -> Result<Option<u64>, Error> {
        let latest = checkpoints.latest()?;
        let (Some(back), Some(last)) = (self.resume_step, latest) else { return Ok(self.resume_step.or(latest)) };
        // Ranks that are started again go on from what this run has saved since it went back.
        if !started_again() {
            return Ok(Some(back));
        }
        let by_this_run = checkpoints.read_value::<Option<u64>>(last, WENT_BACK)?.flatten() == Some(back);
        Ok(Some(if by_this_run { last } else { back }))
    }

    /// Goes on from a checkpoint of `--resume`, which has them in `folder`, in a run of so many steps. `restore` is
    /// given the step of it. Returns how many steps were made already, and the checkpoints if the run saves there too.
    /// Collective.
    pub fn resume(
        &self,
        world: &Communicator,
        folder: fn(&Path) -> PathBuf,
        (strategy, all): (&Strategy, usize),
        restore: impl FnOnce(&mut Checkpointer, u64) -> Result<(), Error>,
    ) -> Result<(usize, Option<Checkpointer>), Error> {
        let Some(dir) = self.resumed(folder) else { return Ok((0, None)) };
        let saves = self.save.as_ref().is_some_and(|save| same(save, dir));
        let mut checkpoints = self.open(dir, world, folder, strategy)?;
        let there = checkpoints.steps()?;
        let Some(step) = self.step(&mut checkpoints)? else {
            return match saves {
                true => Ok((0, Some(checkpoints))),
                false => Err(refused(Error::user(format!("--resume {dir:?}: there is no checkpoint")))),
            };
        };
        let list = |steps: &[u64]| steps.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        if !there.contains(&step) {
            let problem = format!("--resume-step {step}: --resume {dir:?} has checkpoints of steps [{}]", list(&there));
            return Err(refused(Error::user(problem)));
        }
        let steps = step as usize;
        let was =
            checkpoints.read_value::<usize>(step, STEPS).and_then(|was| restore(&mut checkpoints, step).map(|()| was));
        let was = was.map_err(|why| match why {
            Error::Checkpoint { problem } => {
                let others: Vec<u64> = there.iter().copied().filter(|other| *other != step).collect();
                let advice = match others.is_empty() {
                    true => String::new(),
                    false => format!("; --resume-step goes on from another one: {}", list(&others)),
                };
                refused(Error::user(format!("{problem}{advice}")))
            }
            Error::User(problem) => refused(Error::User(problem)),
            // Of other ranks.
            why => why,
        })?;
        if steps > all {
            return Err(refused(Error::user(format!(
                "the whole run has {all} steps, and --resume {dir:?} has made {steps}: give more steps"
            ))));
        }
        if let Some(was) = was.filter(|was| *was != all && world.rank() == 0) {
            eprintln!(
                "the whole run has {all} steps from here on, and had {was}: a schedule of learning rates over them is another"
            );
        }
        match world.rank() {
            0 if steps == all => eprintln!("nothing to do: --resume {dir:?} has made all {steps} steps of the run"),
            0 => eprintln!("goes on after step {steps} of {all}, on {} ranks", world.size()),
            _ => {}
        }
        Ok((steps, saves.then_some(checkpoints)))
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

/// The value of a checkpoint that says which step its run went back to by `--resume-step`.
pub const WENT_BACK: &str = "went_back";

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
    /// Begins. The checkpoints are in `folder` of `--save`; `opened` if the run goes on from there. Collective.
    pub fn begin(
        flags: &'a SaveFlags,
        world: &Communicator,
        folder: fn(&Path) -> PathBuf,
        (strategy, all): (&Strategy, usize),
        opened: Option<Checkpointer>,
    ) -> Result<Self, Error> {
        let checkpoints = match (opened, &flags.save) {
            (None, Some(dir)) => Some(flags.open(dir, world, folder, strategy)?),
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
